/*
 * The door to a device that another vfio-user server has: its client.
 *
 * Any thread may ask; a reader thread gives each reply to whom it belongs.
 * What the server sends by itself (DMA_READ, DMA_WRITE) is queued for Python.
 */
#ifndef VS_CLIENT_H
#define VS_CLIENT_H

#include <stddef.h>
#include <stdint.h>

#include "door.h"

struct vs_client;

struct vs_command {
    struct vs_command *next;
    uint16_t id, command;
    size_t len;
    uint8_t data[];
};

/* Takes over a connected socket; nothing is sent. */
struct vs_client *vs_client_open(int sock, size_t max_maps);
struct vs_door *vs_client_door(struct vs_client *client);
/*
 * One request and its reply: the length of the reply's body, or -errno (the
 * server's, -ETIMEDOUT, -ENODEV once it is gone). Reply fds go to `fds`, up
 * to `*nr_fds`. A region access that times out declares the device gone.
 */
long vs_client_request(struct vs_client *client, unsigned command, const void *data, size_t len, const int *send_fds,
                       size_t nr_send_fds, void *reply, size_t cap, int *fds, size_t *nr_fds, int timeout_ms);
/* Readable when there is a command of the server, or the server is gone. */
int vs_client_fileno(struct vs_client *client);
struct vs_command *vs_client_next_command(struct vs_client *client);
void vs_command_free(struct vs_command *command);
int vs_client_reply(struct vs_client *client, unsigned command, unsigned id, const void *data, size_t len, int error);
/* After the handshake: the largest transfer that the server takes. */
void vs_client_set_max_xfer(struct vs_client *client, size_t max_xfer);
void vs_client_mark_gone(struct vs_client *client);

#endif
