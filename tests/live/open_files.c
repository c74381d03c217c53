/* A program with open files and an io_uring. Each command is a line on standard input, each
 * reply a line on standard output. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static int ring(int mapped) {
    struct io_uring_params parameters;
    memset(&parameters, 0, sizeof parameters);
    int ring = syscall(SYS_io_uring_setup, 4, &parameters);
    if (ring >= 0 && mapped) mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQ_RING);
    return ring;
}

int main(int count, char **arguments) {
    char line[1000], command[100], path[900];
    int number, mode;
    setvbuf(stdout, 0, _IOLBF, 0);
    puts("ready");
    while (fgets(line, sizeof line, stdin)) {
        sscanf(line, "%99s", command);
        if (!strcmp(command, "open")) {
            sscanf(line, "%*s %d %d %899s", &number, &mode, path);
            int opened = open(path, mode, 0600);
            if (opened != number) { dup2(opened, number); close(opened); }
        } else if (!strcmp(command, "close")) {
            sscanf(line, "%*s %d", &number);
            close(number);
        } else if (!strcmp(command, "write")) {
            sscanf(line, "%*s %d %899s", &number, path);
            if (write(number, path, strlen(path)) < 0) { puts("failed"); continue; }
        } else if (!strcmp(command, "where")) {
            sscanf(line, "%*s %d", &number);
            printf("%ld\n", (long)lseek(number, 0, SEEK_CUR));
            continue;
        } else if (!strcmp(command, "ring")) {
            sscanf(line, "%*s %d", &number);
            if (ring(number) < 0) { puts("none"); continue; }
        }
        puts("done");
    }
}
