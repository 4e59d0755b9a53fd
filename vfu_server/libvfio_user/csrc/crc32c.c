/*
 * CRC32C (Castagnoli, reflected 0x82f63b78): by instruction where the
 * processor has one, by table else.
 *
 * The instruction takes one step each cycle but needs three for its result, so
 * three stretches of LANE bytes are summed side by side and joined: a sum
 * moved over n bytes of zeros (`over_lane`) and xored with the sum of n bytes
 * is the sum of both, the second one begun with zero.
 */
#include "crc32c.h"

#include <pthread.h>
#include <stdbool.h>
#include <string.h>

#define LANE 4096

static uint32_t table[8][256];
static uint32_t lane_table[4][256];     /* by byte of the sum: what LANE bytes of zeros make of it */
static pthread_once_t tables_once = PTHREAD_ONCE_INIT;

static uint32_t
over_zeros(uint32_t crc, size_t len)
{
    for (; len > 0; len--) {
        crc = (crc >> 8) ^ table[0][crc & 0xff];
    }
    return crc;
}

static void
fill_tables(void)
{
    uint32_t over[32];

    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;

        for (int bit = 0; bit < 8; bit++) {
            crc = (crc >> 1) ^ (crc & 1 ? 0x82f63b78U : 0);
        }
        table[0][i] = crc;
    }
    for (uint32_t i = 0; i < 256; i++) {
        for (int slice = 1; slice < 8; slice++) {
            table[slice][i] = (table[slice - 1][i] >> 8) ^ table[0][table[slice - 1][i] & 0xff];
        }
    }
    for (int bit = 0; bit < 32; bit++) {
        over[bit] = over_zeros(1U << bit, LANE);
    }
    for (int byte = 0; byte < 4; byte++) {
        for (uint32_t i = 0; i < 256; i++) {
            for (int bit = 0; bit < 8; bit++) {
                lane_table[byte][i] ^= i >> bit & 1 ? over[8 * byte + bit] : 0;
            }
        }
    }
}

uint32_t
vs_crc32c_table(uint32_t crc, const void *data, size_t len)
{
    const uint8_t *p = data;

    pthread_once(&tables_once, fill_tables);
    crc = ~crc;
    for (; len >= 8; len -= 8, p += 8) {
        uint64_t word;

        memcpy(&word, p, 8);
        word ^= crc;
        crc = table[7][word & 0xff] ^ table[6][(word >> 8) & 0xff] ^ table[5][(word >> 16) & 0xff] ^
              table[4][(word >> 24) & 0xff] ^ table[3][(word >> 32) & 0xff] ^ table[2][(word >> 40) & 0xff] ^
              table[1][(word >> 48) & 0xff] ^ table[0][word >> 56];
    }
    for (; len > 0; len--, p++) {
        crc = (crc >> 8) ^ table[0][(crc ^ *p) & 0xff];
    }
    return ~crc;
}

#if defined(__x86_64__)
#include <nmmintrin.h>

#define WITH_INSTRUCTION __attribute__((target("sse4.2")))
#define STEP_8(crc, word) (uint32_t)_mm_crc32_u64((crc), (word))
#define STEP_1(crc, byte) _mm_crc32_u8((crc), (byte))

static bool
have_instruction(void)
{
    return __builtin_cpu_supports("sse4.2");
}
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <sys/auxv.h>

#define WITH_INSTRUCTION __attribute__((target("+crc")))
#define STEP_8(crc, word) __crc32cd((crc), (word))
#define STEP_1(crc, byte) __crc32cb((crc), (byte))

static bool
have_instruction(void)
{
    return (getauxval(AT_HWCAP) & (1UL << 7)) != 0; /* HWCAP_CRC32 */
}
#endif

#ifdef WITH_INSTRUCTION
static uint32_t
over_lane(uint32_t crc)
{
    return lane_table[0][crc & 0xff] ^ lane_table[1][(crc >> 8) & 0xff] ^ lane_table[2][(crc >> 16) & 0xff] ^
           lane_table[3][crc >> 24];
}

static uint64_t
word_at(const uint8_t *p)
{
    uint64_t word;

    memcpy(&word, p, 8);
    return word;
}

WITH_INSTRUCTION static uint32_t
three_lanes(uint32_t crc, const uint8_t *p)
{
    uint32_t second = 0, third = 0;

    for (size_t i = 0; i < LANE; i += 8) {
        crc = STEP_8(crc, word_at(p + i));
        second = STEP_8(second, word_at(p + LANE + i));
        third = STEP_8(third, word_at(p + 2 * LANE + i));
    }
    return over_lane(over_lane(crc) ^ second) ^ third;
}

WITH_INSTRUCTION static uint32_t
crc32c_instruction(uint32_t crc, const void *data, size_t len)
{
    const uint8_t *p = data;

    crc = ~crc;
    if (len >= 3 * LANE) {
        pthread_once(&tables_once, fill_tables);
        for (; len >= 3 * LANE; len -= 3 * LANE, p += 3 * LANE) {
            crc = three_lanes(crc, p);
        }
    }
    for (; len >= 8; len -= 8, p += 8) {
        crc = STEP_8(crc, word_at(p));
    }
    for (; len > 0; len--, p++) {
        crc = STEP_1(crc, *p);
    }
    return ~crc;
}
#endif

uint32_t
vs_crc32c(uint32_t crc, const void *data, size_t len)
{
#ifdef WITH_INSTRUCTION
    if (have_instruction()) {
        return crc32c_instruction(crc, data, len);
    }
#endif
    return vs_crc32c_table(crc, data, len);
}
