#!/usr/bin/env bash
# Linux 6.18.44, x86-64; ptrace and /proc/PID/status.
#
# One would expect: a signal that was sent and not yet handled is in SigPnd or ShdPnd of /proc/PID/status; and a signal
# that a tracer passes on with PTRACE_CONT is delivered, as the tracer takes the place of the mask.
# What happens: while the thread is in the stop before the delivery, the signal is in neither set. The kernel looks at
# the mask again when the tracer passes the signal on: if the signal is blocked by then, the kernel does not deliver it
# and does not drop it. The signal becomes pending again, with its siginfo, for the process if it was sent to the process.
#
# Output seen:
#     stopped before the delivery: pending for the thread 0, for the process 0
#     passed on while blocked: pending for the thread 0, for the process 1
#     unblocked and detached: handled 1 time, si_code 0
# For a snapshot of a live process: the pending sets alone lack the signals that stopped threads are about to handle. The
# siginfo of the stop (PTRACE_GETSIGINFO) has to be recorded too. Blocking the signal and passing it on is a way to put
# a signal back without its handler running.
set -euo pipefail
command -v cc >/dev/null || { echo "needs cc"; exit 2; }
[ "$(uname -sm)" = "Linux x86_64" ] || { echo "needs Linux on x86-64"; exit 2; }
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
cat > at.c <<'C'
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>
static const unsigned long USR1 = 1UL << (SIGUSR1 - 1);
static volatile int handled, code;
static void handle(int signal, siginfo_t *info, void *context) { handled++; code = info->si_code; }
static void pending(pid_t pid, const char *when) {
    char path[64], line[256];
    unsigned long thread = 0, process = 0;
    snprintf(path, sizeof path, "/proc/%d/status", pid);
    FILE *status = fopen(path, "r");
    while (fgets(line, sizeof line, status)) {
        sscanf(line, "SigPnd: %lx", &thread);
        sscanf(line, "ShdPnd: %lx", &process);
    }
    fclose(status);
    printf("%s: pending for the thread %d, for the process %d\n", when, !!(thread & USR1), !!(process & USR1));
}
int main(void) {
    setvbuf(stdout, 0, _IONBF, 0);
    int ready[2];
    char byte;
    if (pipe(ready)) return 2;
    pid_t pid = fork();
    if (!pid) {
        struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO};
        sigaction(SIGUSR1, &action, 0);
        if (write(ready[1], "x", 1) != 1) _exit(2);
        while (!handled) usleep(1000);
        usleep(100000);
        printf("unblocked and detached: handled %d time, si_code %d\n", handled, code);
        _exit(0);
    }
    if (read(ready[0], &byte, 1) != 1) return 2;
    int status;
    if (ptrace(PTRACE_SEIZE, pid, 0, 0)) { perror("ptrace"); return 2; }
    kill(pid, SIGUSR1);
    waitpid(pid, &status, 0);
    pending(pid, "stopped before the delivery");
    unsigned long mask, more;
    ptrace(PTRACE_GETSIGMASK, pid, sizeof mask, &mask);
    more = mask | USR1;
    ptrace(PTRACE_SETSIGMASK, pid, sizeof more, &more);
    ptrace(PTRACE_CONT, pid, 0, SIGUSR1);
    usleep(100000);
    pending(pid, "passed on while blocked");
    ptrace(PTRACE_INTERRUPT, pid, 0, 0);
    waitpid(pid, &status, 0);
    ptrace(PTRACE_SETSIGMASK, pid, sizeof mask, &mask);
    ptrace(PTRACE_DETACH, pid, 0, 0);
    waitpid(pid, &status, 0);
    return 0;
}
C
cc -O1 -o at at.c
./at > seen || exit 2
cat seen
diff - seen <<'T' || { echo "changed"; exit 1; }
stopped before the delivery: pending for the thread 0, for the process 0
passed on while blocked: pending for the thread 0, for the process 1
unblocked and detached: handled 1 time, si_code 0
T
