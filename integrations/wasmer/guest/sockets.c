// Listens, and replies to each client. One command a line; 's' takes a snapshot.
#include "wasix.h"

#include <stdio.h>
#include <string.h>

#define WASIX(name) __attribute__((import_module("wasix_32v1"), import_name(#name)))

struct buffer { void *bytes; uint32_t length; };
struct address { uint8_t family, padding, port[2], ip[4], rest[12]; };
WASIX(sock_open) int sock_open(int family, int type, int protocol, uint32_t *fd);
WASIX(sock_bind) int sock_bind(uint32_t fd, const struct address *address);
WASIX(sock_listen) int sock_listen(uint32_t fd, uint32_t backlog);
WASIX(sock_accept_v2) int sock_accept(uint32_t fd, int flags, uint32_t *connection, struct address *peer);
WASIX(sock_recv) int sock_recv(uint32_t fd, const struct buffer *in, uint32_t count, int flags, uint32_t *length, uint16_t *out);
WASIX(sock_send) int sock_send(uint32_t fd, const struct buffer *out, uint32_t count, int flags, uint32_t *length);

int main(void) {
    static char line[256], text[128];
    uint32_t listener = 0, connection = 0, length, port;
    uint16_t flags;
    struct address peer;
    while (fgets(line, sizeof line, stdin)) {
        int result = -1;
        if (line[0] == 's') {
            result = proc_snapshot();
        } else if (sscanf(line, "listen %u", &port) == 1) {
            struct address address = {1, 0, {(uint8_t)port, (uint8_t)(port >> 8)}, {127, 0, 0, 1}, {0}};
            result = sock_open(1, 1, 6, &listener);
            if (!result) result = sock_bind(listener, &address);
            if (!result) result = sock_listen(listener, 8);
        } else if (!strncmp(line, "accept", 6)) {
            result = sock_accept(listener, 0, &connection, &peer);
        } else if (!strncmp(line, "echo", 4)) {
            struct buffer buffer = {text, sizeof text};
            length = 0;
            result = sock_recv(connection, &buffer, 1, 0, &length, &flags);
            buffer.length = length;
            if (!result && length) result = sock_send(connection, &buffer, 1, 0, &length);
            printf("%u ", length);
        }
        printf("%d\n", result);
        fflush(stdout);
    }
    return 0;
}
