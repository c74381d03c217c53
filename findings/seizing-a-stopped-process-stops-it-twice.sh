#!/usr/bin/env bash
# Linux 6.18.44, x86-64; ptrace.
#
# One would expect: PTRACE_SEIZE stops nothing, PTRACE_INTERRUPT stops once, and the next PTRACE_SYSCALL runs to the next
# system call.
# What happens: this is so for a process that runs. If the process was stopped by SIGSTOP before, PTRACE_SEIZE itself
# makes it report a stop, and PTRACE_INTERRUPT makes it report one more. Both look the same: SIGSTOP with
# PTRACE_EVENT_STOP. A tracer that waits once per interrupt takes the second for the system call that it asked for.
# It runs on from there although nobody sent SIGCONT.
#
# Output seen:
#     running: stop event; system call
#     stopped: stop event; stop event; system call
# For who runs a system call in a stopped process: compare the kind of each stop (signal 0x85 with
# PTRACE_O_TRACESYSGOOD) and never count stops.
set -euo pipefail
command -v cc >/dev/null || { echo "needs cc"; exit 2; }
[ "$(uname -sm)" = "Linux x86_64" ] || { echo "needs Linux on x86-64"; exit 2; }
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
cat > twice.c <<'C'
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#define SYSTEM_CALL (SIGTRAP | 0x80)
static const char *kind(int status) {
    if (WSTOPSIG(status) == SYSTEM_CALL) return "system call";
    return status >> 16 == PTRACE_EVENT_STOP ? "stop event" : "other";
}
int main(void) {
    for (int stopped = 0; stopped < 2; stopped++) {
        pid_t pid = fork();
        int status;
        if (!pid) for (;;) syscall(SYS_getppid);
        if (stopped) {
            kill(pid, SIGSTOP);
            waitpid(pid, &status, WUNTRACED);
        }
        if (ptrace(PTRACE_SEIZE, pid, 0, PTRACE_O_TRACESYSGOOD)) { perror("ptrace"); return 2; }
        ptrace(PTRACE_INTERRUPT, pid, 0, 0);
        waitpid(pid, &status, __WALL);
        printf("%s: %s", stopped ? "stopped" : "running", kind(status));
        for (int n = 0; n < 4 && WSTOPSIG(status) != SYSTEM_CALL; n++) {
            ptrace(PTRACE_SYSCALL, pid, 0, 0);
            waitpid(pid, &status, __WALL);
            printf("; %s", kind(status));
        }
        printf("\n");
        fflush(stdout);
        kill(pid, SIGKILL);
        waitpid(pid, 0, __WALL);
    }
    return 0;
}
C
cc -O1 -o twice twice.c
timeout 20 ./twice > seen || exit 2
cat seen
diff - seen <<'T' || { echo "changed"; exit 1; }
running: stop event; system call
stopped: stop event; stop event; system call
T
