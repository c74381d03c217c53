/* A program that unmaps and maps memory. Each command is a line on standard input, each reply a
 * line on standard output. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#define PAGE 4096L
#define MIB (1024 * 1024L)
#define FAR ((char *)0x200000000000)
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#endif
#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#define PR_SET_VMA_ANON_NAME 0
#endif

/* Areas of 16 pages each, with gaps between them. */
static char *area(int n) { return FAR + n * MIB; }
static char *map(char *at, int protection, int flags, int file, long offset) {
    char *there = mmap(at, 16 * PAGE, protection, flags | MAP_FIXED, file, offset);
    if (there != at) exit(9);
    return at;
}
static char *memory(int n) { return map(area(n), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); }
static long count(const char *at, long bytes, int value) {
    long found = 0;
    for (long i = 0; i < bytes; i++) found += at[i] == value;
    return found;
}

enum { PLAIN, MIDDLE, CLOSED, RESERVED, GUARDED, NAMED, VIEW, SECOND, OTHER, AREAS };

int main(int argc, char **argv) {
    char line[64], text[64];
    /* The C library allocates nothing above the program break for its buffers. */
    static char input[4096], output[4096];
    setvbuf(stdin, input, _IOFBF, sizeof input);
    setvbuf(stdout, output, _IOLBF, sizeof output);
    int has_guard = 0, has_name = argc > 1 && !strcmp(argv[1], "named");
    int file = memfd_create("views", MFD_CLOEXEC), other = memfd_create("views", MFD_CLOEXEC);
    if (ftruncate(file, MIB) || ftruncate(other, MIB)) return 2;
    for (int n = PLAIN; n <= NAMED; n++) memset(memory(n), 'A' + n, 16 * PAGE);
    mprotect(area(RESERVED), 16 * PAGE, PROT_NONE);
    madvise(area(RESERVED), 16 * PAGE, MADV_DONTNEED);
    if (!madvise(area(GUARDED) + 4 * PAGE, PAGE, MADV_GUARD_INSTALL)) has_guard = 1;
    if (has_name) prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, area(NAMED), 16 * PAGE, "records");
    map(area(VIEW), PROT_READ | PROT_WRITE, MAP_SHARED, file, 16 * PAGE);
    map(area(SECOND), PROT_READ, MAP_SHARED, file, 16 * PAGE);
    map(area(OTHER), PROT_READ | PROT_WRITE, MAP_SHARED, other, 0);
    memset(area(VIEW), 'V', 16 * PAGE);
    memset(area(OTHER), 'O', 16 * PAGE);
    char *end = sbrk(64 * PAGE);
    memset(end, 'H', 64 * PAGE);
    puts("ready");
    while (fgets(line, sizeof line, stdin)) {
        const char *answer = "done";
        int n = 0;
        line[strcspn(line, "\n")] = 0;
        if (sscanf(line, "unmap %d", &n) == 1) munmap(area(n), 16 * PAGE);
        else if (sscanf(line, "hole %d", &n) == 1) munmap(area(n) + 3 * PAGE, 5 * PAGE);
        else if (sscanf(line, "reserve %d", &n) == 1)
            map(area(n), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        else if (sscanf(line, "close %d", &n) == 1) mprotect(area(n), 16 * PAGE, PROT_NONE);
        else if (sscanf(line, "open %d", &n) == 1) {
            mprotect(area(n), 16 * PAGE, PROT_READ | PROT_WRITE);
            memset(area(n), 'x', 16 * PAGE);
        } else if (sscanf(line, "private %d", &n) == 1) memset(memory(n), 'p', 16 * PAGE);
        else if (sscanf(line, "other %d", &n) == 1) {
            map(area(n), PROT_READ | PROT_WRITE, MAP_SHARED, other, 16 * PAGE);
            memset(area(n), 'o', 16 * PAGE);
        } else if (sscanf(line, "move %d", &n) == 1) {
            map(area(n), PROT_READ | PROT_WRITE, MAP_SHARED, file, 64 * PAGE);
            memset(area(n), 'm', 16 * PAGE);
        } else if (sscanf(line, "write %d", &n) == 1) memset(area(n), 'w', 16 * PAGE);
        else if (!strcmp(line, "forget")) close(file);
        else if (!strcmp(line, "shrink")) {
            if (brk(end)) answer = "error";
        } else if (sscanf(line, "limit %d", &n) == 1) {
            /* Limits the address space to this many pages more than now. */
            int statm = open("/proc/self/statm", O_RDONLY);
            long pages = 0;
            if (read(statm, text, sizeof text - 1) <= 0 || sscanf(text, "%ld", &pages) != 1) return 3;
            close(statm);
            struct rlimit limit = {(pages + n) * PAGE, RLIM_INFINITY};
            if (setrlimit(RLIMIT_AS, &limit)) answer = "error";
        } else if (sscanf(line, "count %d", &n) == 1) {
            const char *expected = n == VIEW || n == SECOND ? "V" : n == OTHER ? "O" : 0;
            snprintf(text, sizeof text, "%ld", count(area(n), 16 * PAGE, expected ? *expected : 'A' + n) / PAGE);
            answer = text;
        } else if (!strcmp(line, "heap")) {
            snprintf(text, sizeof text, "%ld", count(end, 64 * PAGE, 'H') / PAGE);
            answer = text;
        } else if (!strcmp(line, "guarded")) {
            /* A system call that reads from there fails. */
            int ends[2];
            if (pipe(ends)) return 4;
            long before = count(area(GUARDED), 4 * PAGE, 'A' + GUARDED) + count(area(GUARDED) + 5 * PAGE, 11 * PAGE, 'A' + GUARDED);
            int is_guarded = write(ends[1], area(GUARDED) + 4 * PAGE, 1) != 1;
            snprintf(text, sizeof text, "%ld %s", before / PAGE, is_guarded ? "guarded" : "open");
            answer = has_guard ? text : "none here";
            close(ends[0]);
            close(ends[1]);
        }
        puts(answer);
    }
    return 0;
}
