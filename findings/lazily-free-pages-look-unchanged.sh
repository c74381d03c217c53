#!/usr/bin/env bash
# Linux 6.18, MADV_FREE, MADV_PAGEOUT.
#
# One would expect: memory whose bytes are as wanted can be left as it is, so undoing changes means writing what differs.
# What happens: a page that the program gave to MADV_FREE keeps its bytes until the kernel needs room, so comparing finds
# it equal. Reading it through /proc/PID/mem does not take the mark off; the kernel may take the page later, and it is zeros.
# Writing the same bytes takes the mark off. `LazyFree` in smaps tells.
#
# Output seen (of 256 pages filled with 7, then given to MADV_FREE, then pressed out by MADV_PAGEOUT):
#     read only: LazyFree stays, 0 pages left
#     same bytes written: LazyFree 0 kB, 256 pages left
# For whoever puts memory back to an earlier state: write every page of a mapping with LazyFree pages, equal or not.
set -euo pipefail
command -v cc >/dev/null || { echo "needs cc"; exit 2; }
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
cat > lazy.c <<'C'
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
static const size_t bytes = 1 << 20;
static long lazily_free(char *at) {
    FILE *smaps = fopen("/proc/self/smaps", "r");
    char line[512];
    unsigned long start, end, found = 0, kb = 0;
    while (fgets(line, sizeof line, smaps)) {
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2) found = start <= (uintptr_t)at && (uintptr_t)at < end;
        else if (found && sscanf(line, "LazyFree: %lu kB", &kb) == 1) break;
    }
    fclose(smaps);
    return kb;
}
static void try(const char *what, int writes) {
    char *into = malloc(bytes), *at = mmap(0, bytes + 8192, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(at, 4096, PROT_NONE); /* a mapping of its own */
    at += 4096;
    mprotect(at + bytes, 4096, PROT_NONE);
    madvise(at, bytes, MADV_NOHUGEPAGE);
    memset(at, 7, bytes);
    if (madvise(at, bytes, MADV_FREE)) exit(2);
    int mem = open("/proc/self/mem", O_RDWR);
    if (pread(mem, into, bytes, (uintptr_t)at) != (ssize_t)bytes) exit(2);
    if (writes && pwrite(mem, into, bytes, (uintptr_t)at) != (ssize_t)bytes) exit(2);
    long kb = lazily_free(at);
    madvise(at, bytes, MADV_PAGEOUT);
    int left = 0;
    for (int i = 0; i < 256; i++) left += at[i * 4096] == 7;
    if (kb) printf("%s: LazyFree stays, %d pages left\n", what, left);
    else printf("%s: LazyFree 0 kB, %d pages left\n", what, left);
}
int main(void) {
    try("read only", 0);
    try("same bytes written", 1);
    return 0;
}
C
cc -O1 -w -o lazy lazy.c && ./lazy > seen || { echo "cannot be tried here"; exit 2; }
cat seen
diff - seen <<'T' || { echo "changed"; exit 1; }
read only: LazyFree stays, 0 pages left
same bytes written: LazyFree 0 kB, 256 pages left
T
