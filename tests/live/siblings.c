/* A server that forks one worker. A line of input ends the worker and forks another with the
 * same pid. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static int worker(void) {
    int pid = fork();
    if (!pid) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;) pause();
    }
    return pid;
}

int main(void) {
    char line[64];
    setvbuf(stdout, 0, _IOLBF, 0);
    puts("ready");
    int pid = worker(), next = 0;
    printf("%d\n", pid);
    if (!fgets(line, sizeof line, stdin)) return 0;
    kill(pid, SIGKILL);
    waitpid(pid, 0, 0);
    for (int i = 0; i < 1000 && next != pid; i++) {
        int last = open("/proc/sys/kernel/ns_last_pid", O_WRONLY);
        dprintf(last, "%d", pid - 1);
        close(last);
        next = worker();
        if (next != pid) {
            kill(next, SIGKILL);
            waitpid(next, 0, 0);
        }
    }
    printf("%d\n", next);
    fgets(line, sizeof line, stdin);
    return 0;
}
