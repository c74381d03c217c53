/* A program whose pages have further state besides their bytes. Each command is a line on
 * standard input, each reply a line on standard output. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define KIB 1024
#define MIB (1024 * KIB)
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#endif

static char *fresh(size_t bytes) {
    char *at = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    /* Small pages: a huge page would contain adjacent memory too. */
    madvise(at, bytes, MADV_NOHUGEPAGE);
    return at;
}

static long count(const char *at, long bytes, int value) {
    long found = 0;
    for (long i = 0; i < bytes; i++) found += at[i] == value;
    return found;
}

/* A thread with a separate arena. */
static volatile int wanted, grown;
static void *run(void *unused) {
    char *volatile first = malloc(1000);
    first[0] = 1;
    for (;;) {
        while (grown == wanted) usleep(1000);
        for (int i = 0; i < 400; i++) {
            /* calloc assumes that new parts of an arena are zeros. */
            char *volatile more = calloc(1, 1000);
            if (count(more, 1000, 0) != 1000) { puts("not zeros"); fflush(stdout); }
            memset(more, 7, 1000);
        }
        grown++;
    }
    return unused;
}
static void *idle(void *unused) { for (;;) pause(); return unused; }

static int wait_for_ever(void *unused) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (;;) pause();
}

int main(int argc, char **argv) {
    char line[64];
    pthread_t thread;
    setvbuf(stdout, 0, _IOLBF, 0);
    char *page = fresh(MIB), *big = fresh(80 * MIB), *other = fresh(80 * MIB);
    char *closed = mmap(0, 64 * KIB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *file_map = 0, *views[3];
    int memory = memfd_create("views", MFD_CLOEXEC), child = 0, fault = -1;
    memset(page, 'A', MIB);
    if (memory < 0 || ftruncate(memory, MIB)) return 2;
    for (int i = 0; i < 3; i++) views[i] = mmap(0, MIB, PROT_READ | (i < 2 ? PROT_WRITE : 0), MAP_SHARED, memory, 0);
    views[0][5] = 1;
    volatile char *anonymous = mmap(0, MIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    anonymous[7] = 1;
    if (argc > 1) {
        int file = open(argv[1], O_RDWR | O_CREAT, 0600);
        if (file < 0 || ftruncate(file, MIB)) return 3;
        file_map = mmap(0, MIB, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        file_map[0] = 1;
    }
    if (!getenv("ONE_THREAD")) {
        pthread_create(&thread, 0, run, 0);
        pthread_create(&thread, 0, idle, 0);
    }
    usleep(20000);
    puts("ready");
    while (fgets(line, sizeof line, stdin)) {
        const char *answer = "done";
        char text[64];
        line[strcspn(line, "\n")] = 0;
        if (!strcmp(line, "grow")) {
            int until = ++wanted;
            while (grown != until) usleep(1000);
        } else if (!strcmp(line, "free")) {
            if (madvise(page, MIB, MADV_FREE)) answer = "error";
        } else if (!strcmp(line, "keep")) {
            /* Its pages are accessible only here. */
            mprotect(closed, 64 * KIB, PROT_READ | PROT_WRITE);
            closed[9 * KIB]++;
            mprotect(closed, 64 * KIB, PROT_NONE);
        } else if (!strcmp(line, "secret")) {
            int memory_of_own = open("/proc/self/mem", O_RDONLY);
            char there = 0;
            if (pread(memory_of_own, &there, 1, (long)closed + 9 * KIB) != 1) answer = "error";
            close(memory_of_own);
            snprintf(text, sizeof text, "%d", there);
            if (strcmp(answer, "error")) answer = text;
        } else if (!strcmp(line, "pressure")) {
            madvise(page, MIB, MADV_PAGEOUT);
        } else if (!strcmp(line, "write")) {
            memset(page, 'B', MIB);
        } else if (!strcmp(line, "count")) {
            snprintf(text, sizeof text, "%ld", count(page, MIB, 'A'));
            answer = text;
        } else if (!strcmp(line, "protect")) {
            mprotect(page + 64 * KIB, 64 * KIB, PROT_READ);
        } else if (!strcmp(line, "unprotect")) {
            mprotect(page + 64 * KIB, 64 * KIB, PROT_READ | PROT_WRITE);
        } else if (!strcmp(line, "permissions")) {
            /* A system call that writes there fails if the program may not write. */
            int ends[2];
            if (pipe(ends) || write(ends[1], "A", 1) != 1) return 1;
            answer = read(ends[0], page + 64 * KIB, 1) == 1 ? "writable" : "read-only";
            close(ends[0]);
            close(ends[1]);
        } else if (!strcmp(line, "guard")) {
            if (madvise(page + 64 * KIB, 64 * KIB, MADV_GUARD_INSTALL)) answer = "none here";
        } else if (!strcmp(line, "guarded")) {
            /* A system call that reads from there fails if the program may not read. */
            int ends[2];
            if (pipe(ends)) return 1;
            answer = write(ends[1], page + 64 * KIB, 1) == 1 ? "no" : "yes";
            close(ends[0]);
            close(ends[1]);
        } else if (!strcmp(line, "unguard")) {
            madvise(page + 64 * KIB, 64 * KIB, MADV_GUARD_REMOVE);
            memset(page + 64 * KIB, 'C', 64 * KIB);
        } else if (!strcmp(line, "serve")) {
            struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_PAGEFAULT_FLAG_WP};
            struct uffdio_register range = {.range = {(unsigned long)page, MIB}, .mode = UFFDIO_REGISTER_MODE_WP};
            struct uffdio_writeprotect protect = {.range = range.range, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
            fault = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
            if (fault < 0 || ioctl(fault, UFFDIO_API, &api) || ioctl(fault, UFFDIO_REGISTER, &range) ||
                ioctl(fault, UFFDIO_WRITEPROTECT, &protect)) answer = "none here";
        } else if (!strcmp(line, "unserve")) {
            close(fault);
        } else if (!strcmp(line, "set")) {
            views[1][5]++, anonymous[7]++;
            if (file_map) file_map[0]++;
        } else if (!strcmp(line, "look")) {
            snprintf(text, sizeof text, "%d %d %d %d %d", views[0][5], views[1][5], views[2][5], anonymous[7],
                     file_map ? file_map[0] : 0);
            answer = text;
        } else if (!strcmp(line, "fork")) {
            child = fork();
            if (!child) { prctl(PR_SET_PDEATHSIG, SIGKILL); for (;;) pause(); }
        } else if (!strcmp(line, "clone")) {
            static char stack[64 * KIB] __attribute__((aligned(16)));
            child = clone(wait_for_ever, stack + sizeof stack, CLONE_VM | SIGCHLD, 0);
            if (child < 0) answer = "none here";
        } else if (!strcmp(line, "reap")) {
            kill(child, SIGKILL);
            waitpid(child, 0, 0);
        } else if (!strcmp(line, "one")) {
            madvise(other, 80 * MIB, MADV_DONTNEED);
            memset(big, 1, 60 * MIB);
        } else if (!strcmp(line, "two")) {
            madvise(big, 80 * MIB, MADV_DONTNEED);
            memset(other, 2, 60 * MIB);
        } else if (!strcmp(line, "none")) {
            madvise(big, 80 * MIB, MADV_DONTNEED);
            madvise(other, 80 * MIB, MADV_DONTNEED);
        } else if (!strcmp(line, "which")) {
            snprintf(text, sizeof text, "%ld %ld", count(big, 60 * MIB, 1) / MIB, count(other, 60 * MIB, 2) / MIB);
            answer = text;
        }
        puts(answer);
    }
    return 0;
}
