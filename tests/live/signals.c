/* A program with pending signals. Each command is a line on standard input, each reply a line on
 * standard output. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* Page faults, expected or not. */
static volatile int expecting;
static sigjmp_buf back;
static void fault(int signal) {
    if (!expecting) { puts("a fault that nobody expects"); fflush(stdout); _exit(3); }
    siglongjmp(back, 1);
}
static void faults(void) {
    expecting = 1;
    if (!sigsetjmp(back, 1)) *(volatile char *)8 = 1;
    expecting = 0;
}
static void traps(long *count) {
    if (!sigsetjmp(back, 1)) { expecting = 1; __asm__ volatile("int3"); }
    expecting = 0;
    ++*count;
}

/* A thread that stops another one with a signal, as garbage collectors do. */
static sem_t answered;
static volatile long rounds;
static void answer(int signal) { sem_post(&answered); }
static void *spin(void *count) { for (;;) ++*(volatile long *)count; }
static void *stop_other(void *other) {
    for (;;) {
        pthread_kill(*(pthread_t *)other, SIGUSR2);
        while (sem_wait(&answered) && errno == EINTR);
        rounds++;
    }
}

/* Dequeues the blocked pending signals and lists them. */
static void list(void) {
    sigset_t blocked;
    pthread_sigmask(SIG_BLOCK, 0, &blocked);
    struct timespec no_time = {0, 0};
    siginfo_t got;
    char line[2000] = "", *at = line;
    while (sigtimedwait(&blocked, &got, &no_time) > 0)
        at += sprintf(at, "%d:%d:%d:%d ", got.si_signo, got.si_code, got.si_code == SI_TKILL ? 0 : got.si_value.sival_int,
                      got.si_pid == getpid());
    puts(line);
}
static void queue(int signal, int value) {
    siginfo_t information = {0};
    information.si_signo = signal;
    information.si_code = SI_QUEUE;
    information.si_pid = getpid();
    information.si_value.sival_int = value;
    pthread_sigqueue(pthread_self(), signal, information.si_value);
}

int main(void) {
    setvbuf(stdout, 0, _IOLBF, 0);
    struct sigaction action = {0};
    action.sa_handler = fault;
    action.sa_flags = SA_NODEFER;
    sigaction(SIGSEGV, &action, 0);
    sigaction(SIGTRAP, &action, 0);
    action.sa_handler = answer;
    action.sa_flags = SA_RESTART;
    sigaction(SIGUSR2, &action, 0);
    sem_init(&answered, 0, 0);
    sigset_t blocked;
    sigemptyset(&blocked);
    for (int i = 0; i < 3; i++) sigaddset(&blocked, SIGRTMIN + i);
    sigaddset(&blocked, SIGUSR1);
    sigaddset(&blocked, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &blocked, 0);
    puts("ready");
    char line[100];
    static volatile long count;
    static pthread_t threads[2];
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        struct timespec begun, now;
        clock_gettime(CLOCK_MONOTONIC, &begun);
        if (!strcmp(line, "fault") || !strcmp(line, "trap")) {
            puts("begins");
            long trapped = 0;
            do {
                if (line[0] == 'f') faults(); else traps(&trapped);
                clock_gettime(CLOCK_MONOTONIC, &now);
            } while (now.tv_sec - begun.tv_sec < 3);
            puts("done");
        } else if (!strcmp(line, "stop-other")) {
            pthread_create(&threads[0], 0, spin, (void *)&count);
            pthread_create(&threads[1], 0, stop_other, &threads[0]);
            puts("done");
        } else if (!strcmp(line, "rounds")) {
            long before = rounds;
            do { usleep(1000); clock_gettime(CLOCK_MONOTONIC, &now); } while (rounds < before + 50 && now.tv_sec - begun.tv_sec < 5);
            puts(rounds < before + 50 ? "stuck" : "goes on");
        } else if (!strcmp(line, "list")) {
            list();
        } else if (!strncmp(line, "queue ", 6)) {
            int signal, value;
            sscanf(line + 6, "%d %d", &signal, &value);
            queue(signal, value);
            puts("done");
        } else if (!strncmp(line, "raise ", 6)) {
            raise(atoi(line + 6));
            puts("done");
        } else if (!strncmp(line, "kill ", 5)) {
            kill(getpid(), atoi(line + 5));
            puts("done");
        } else if (!strncmp(line, "ignore ", 7)) {
            signal(atoi(line + 7), SIG_IGN);
            puts("done");
        }
    }
}
