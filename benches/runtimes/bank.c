/* Threads that move money between allocated accounts, send each other signals and handle their
 * faults. */
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <signal.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ACCOUNTS = 1000, THREADS = 3 };
static long *accounts[ACCOUNTS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_t threads[THREADS];
static sem_t answered;
static volatile long rounds;
static __thread sigjmp_buf back;
static __thread volatile int expecting;

static void wrong(const char *what) { printf("WRONG %s\n", what); fflush(stdout); _exit(3); }
static void answer(int signal) { sem_post(&answered); }
static void fault(int signal) { if (!expecting) wrong("a fault that nobody expects"); siglongjmp(back, 1); }

static void *work(void *seed) {
    unsigned state = (long)seed;
    for (;;) {
        pthread_mutex_lock(&lock);
        for (int i = 0; i < 50; i++) {
            int from = rand_r(&state) % ACCOUNTS, to = rand_r(&state) % ACCOUNTS;
            long *other = malloc(sizeof(long) + rand_r(&state) % 2000);
            *other = *accounts[from] - 1;
            free(accounts[from]);
            accounts[from] = other;
            ++*accounts[to];
        }
        pthread_mutex_unlock(&lock);
        expecting = 1;
        if (!sigsetjmp(back, 1)) *(volatile char *)8 = 1;
        expecting = 0;
    }
}

static void *stop_the_world(void *unused) {
    for (;;) {
        for (int i = 0; i < THREADS; i++) pthread_kill(threads[i], SIGUSR2);
        for (int i = 0; i < THREADS; i++) while (sem_wait(&answered) && errno == EINTR);
        rounds++;
    }
}

int main(void) {
    setvbuf(stdout, 0, _IOLBF, 0);
    struct sigaction action = {0};
    action.sa_handler = answer;
    action.sa_flags = SA_RESTART;
    sigaction(SIGUSR2, &action, 0);
    action.sa_handler = fault;
    action.sa_flags = SA_NODEFER;
    sigaction(SIGSEGV, &action, 0);
    sem_init(&answered, 0, 0);
    for (int i = 0; i < ACCOUNTS; i++) *(accounts[i] = malloc(sizeof(long))) = 100;
    for (long i = 0; i < THREADS; i++) pthread_create(&threads[i], 0, work, (void *)(i + 1));
    pthread_t stopper;
    pthread_create(&stopper, 0, stop_the_world, 0);
    long last = -1;
    for (long tick = 1;; tick++) {
        usleep(100000);
        pthread_mutex_lock(&lock);
        long sum = 0;
        for (int i = 0; i < ACCOUNTS; i++) sum += *accounts[i];
        pthread_mutex_unlock(&lock);
        if (sum != 100 * ACCOUNTS) wrong("sum");
        if (tick % 20 == 0) { if (rounds == last) wrong("nobody answers"); last = rounds; }
        printf("tick %ld\n", tick);
    }
}
