/* A program whose threads wait in different system calls, and which reports its state on
 * request. Each command is a line on standard input, each reply a line on standard output. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define BIG_BYTES (24u << 20)
static unsigned char big[BIG_BYTES];
static int generation;

static pthread_barrier_t begun;
static atomic_long busy, slept, polled, timed, errors;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER, never = PTHREAD_COND_INITIALIZER;
static long tickets, served;
static int pipe_ends[2];
static atomic_long piped;

static void *run_busy(void *unused) {
    pthread_barrier_wait(&begun);
    volatile double x = 1.5;
    for (;;) {
        /* Keeps floating point and vector registers in use. */
        x = x * 1.0000001 + 0.5;
        if (x > 1e9) x = 1.5;
        atomic_fetch_add(&busy, 1);
    }
    return unused;
}
static void *run_sleep(void *unused) {
    pthread_barrier_wait(&begun);
    for (;;) {
        struct timespec nap = {0, 3000000};
        if (nanosleep(&nap, &nap) && errno != EINTR) atomic_fetch_add(&errors, 1);
        atomic_fetch_add(&slept, 1);
    }
    return unused;
}
static void *run_poll(void *unused) {
    pthread_barrier_wait(&begun);
    for (;;) {
        if (poll(NULL, 0, 4) && errno != EINTR) atomic_fetch_add(&errors, 1);
        atomic_fetch_add(&polled, 1);
    }
    return unused;
}
static void *run_timed_wait(void *unused) {
    pthread_barrier_wait(&begun);
    pthread_mutex_lock(&mutex);
    for (;;) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += 5000000;
        if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
        int answer = pthread_cond_timedwait(&never, &mutex, &until);
        if (answer != ETIMEDOUT && answer != 0) atomic_fetch_add(&errors, 1);
        atomic_fetch_add(&timed, 1);
    }
    return unused;
}
static void *run_server(void *unused) {
    pthread_barrier_wait(&begun);
    pthread_mutex_lock(&mutex);
    for (;;) {
        while (served == tickets) pthread_cond_wait(&condition, &mutex);
        served++;
    }
    return unused;
}
static void *run_reader(void *unused) {
    pthread_barrier_wait(&begun);
    char byte;
    for (;;) {
        if (read(pipe_ends[0], &byte, 1) == 1) atomic_fetch_add(&piped, 1);
        else atomic_fetch_add(&errors, 1);
    }
    return unused;
}

int main(int count, char **arguments) {
    char line[64];
    void *extra = NULL, *block = NULL;
    /* Between inaccessible pages, so that the kernel does not merge it with another mapping. */
    unsigned char *guarded = mmap(NULL, 3 << 16, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    guarded += 1 << 16;
    mprotect(guarded, 1 << 16, PROT_READ | PROT_WRITE);
    unsigned char *shared = mmap(NULL, 1 << 16, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (count > 1 && !strcmp(arguments[1], "threads")) {
        pthread_t thread;
        void *(*all[])(void *) = {run_busy, run_sleep, run_poll, run_timed_wait, run_server, run_reader};
        if (pipe(pipe_ends)) return 1;
        pthread_barrier_init(&begun, NULL, 1 + sizeof all / sizeof *all);
        for (unsigned at = 0; at < sizeof all / sizeof *all; at++) pthread_create(&thread, NULL, all[at], NULL);
        /* Waits until all threads run: only then can a snapshot be rolled back to. */
        pthread_barrier_wait(&begun);
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("ready\n");
    while (fgets(line, sizeof line, stdin)) {
        switch (line[0]) {
        case 'g': /* write the next generation everywhere */
            generation++;
            memset(big, generation, BIG_BYTES);
            printf("%d\n", generation);
            break;
        case '?': { /* print the generation, and whether it is whole */
            unsigned at = 0;
            while (at < BIG_BYTES && big[at] == (unsigned char)generation) at++;
            printf("%d %s\n", generation, at == BIG_BYTES ? "whole" : "torn");
            break;
        }
        case 't': /* a ticket for the server, and a byte for the reader */
            pthread_mutex_lock(&mutex);
            tickets++;
            pthread_cond_signal(&condition);
            pthread_mutex_unlock(&mutex);
            if (write(pipe_ends[1], "x", 1) != 1) return 1;
            printf("%ld\n", tickets);
            break;
        case 's': /* print the counters of all threads */
            pthread_mutex_lock(&mutex);
            printf("%ld %ld %ld %ld %ld %ld %ld %ld\n", tickets, served, piped, busy, slept, polled, timed, errors);
            pthread_mutex_unlock(&mutex);
            break;
        case 'm': { /* block SIGUSR1 */
            sigset_t set;
            sigemptyset(&set);
            sigaddset(&set, SIGUSR1);
            sigprocmask(SIG_BLOCK, &set, NULL);
            printf("blocked\n");
            break;
        }
        case 'b': { /* print whether SIGUSR1 is blocked */
            sigset_t set;
            sigprocmask(SIG_BLOCK, NULL, &set);
            printf("%d\n", sigismember(&set, SIGUSR1));
            break;
        }
        case 'n': /* map new memory */
            extra = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            memset(extra, 1, 1 << 20);
            printf("new\n");
            break;
        case 'u': /* unmap memory */
            munmap(guarded, 1 << 16);
            printf("unmapped\n");
            break;
        case 'p': /* change the protection of memory */
            mprotect(guarded, 1 << 16, PROT_READ);
            printf("protected\n");
            break;
        case 'w': /* write to shared memory */
            shared[5]++;
            printf("%d\n", shared[5]);
            break;
        case 'h': { /* grow the heap and write to it */
            block = malloc(100000);
            for (int at = 0; at < 20; at++) { void *more = malloc(100000); memset(more, 0xee, 100000); }
            memset(block, 0xee, 100000);
            printf("grown\n");
            break;
        }
        case 'c': { /* count bytes of new memory that are not zero */
            long dirty = 0;
            for (int at = 0; at < 20; at++) {
                unsigned char *fresh = calloc(1, 110000);
                for (int byte = 0; byte < 110000; byte++) dirty += fresh[byte] != 0;
            }
            printf("%ld\n", dirty);
            break;
        }
        case 'r': { /* register an area for restartable sequences */
            static char area[32] __attribute__((aligned(32)));
            printf("%ld\n", syscall(SYS_rseq, area, sizeof area, 0, 0x53053053));
            break;
        }
        case 'l': { /* loop in user mode */
            for (volatile long at = 0; at < 30000000000L; at++) {}
            printf("looped\n");
            break;
        }
        }
    }
    return 0;
}
