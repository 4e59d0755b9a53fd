#ifndef VS_CRC32C_H
#define VS_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* Continues `crc` (0 to begin) over `len` bytes. */
uint32_t vs_crc32c(uint32_t crc, const void *data, size_t len);
/* The same without the instruction, for comparison. */
uint32_t vs_crc32c_table(uint32_t crc, const void *data, size_t len);

#endif
