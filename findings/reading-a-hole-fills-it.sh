#!/usr/bin/env bash
# Linux 6.18, memfd_create (tmpfs); the same for MAP_SHARED|MAP_ANONYMOUS and /dev/shm.
#
# One would expect: reading memory does not allocate memory. A hole of a file on disk reads as zeros and stays a hole.
# What happens: a read through any mapping of a memfd allocates the page of the hole, for good, charged to the memory
# cgroup. That holds for process_vm_readv, /proc/PID/mem, MADV_POPULATE_READ, write(2) from the mapping, and also where
# the mapping is private and read-only. pread, splice and sendfile on the file itself allocate nothing.
#
# Output seen (pages of the memfd, of 256, after each):
#     pread of the memfd: 0
#     sendfile from the memfd: 0
#     process_vm_readv, shared mapping: 256
#     process_vm_readv, private read-only mapping: 256
#     /proc/self/mem: 256
#     write(2) from the mapping: 256
#     MADV_POPULATE_READ: 256
# For a tool that dumps other processes: read the file, not the mapping, or only the pages that pagemap says are there.
# Otherwise a dump of a sparse gigabyte makes its target a gigabyte larger.
set -euo pipefail
command -v cc >/dev/null || { echo "needs cc"; exit 2; }
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
cat > hole.c <<'C'
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
static int memfd;
static const size_t bytes = 1 << 20;
static void told(const char *what) {
    struct stat s;
    fstat(memfd, &s);
    printf("%s: %ld\n", what, (long)s.st_blocks / 8);
    fallocate(memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, bytes);
}
static void read_by_vm(char *at, char *into) {
    struct iovec here = { into, bytes }, there = { at, bytes };
    if (process_vm_readv(getpid(), &here, 1, &there, 1, 0) != (ssize_t)bytes) exit(2);
}
int main(void) {
    char *into = malloc(bytes);
    memfd = memfd_create("sparse", 0);
    if (ftruncate(memfd, bytes)) return 2;
    int out = open("out", O_RDWR | O_CREAT, 0600), mem = open("/proc/self/mem", O_RDONLY);
    char *shared = mmap(0, bytes, PROT_READ, MAP_SHARED, memfd, 0);
    char *private = mmap(0, bytes, PROT_READ, MAP_PRIVATE, memfd, 0);
    off_t from = 0;
    if (pread(memfd, into, bytes, 0) != (ssize_t)bytes) return 2;
    told("pread of the memfd");
    if (sendfile(out, memfd, &from, bytes) <= 0) return 2;
    told("sendfile from the memfd");
    read_by_vm(shared, into);
    told("process_vm_readv, shared mapping");
    read_by_vm(private, into);
    told("process_vm_readv, private read-only mapping");
    if (pread(mem, into, bytes, (uintptr_t)shared) != (ssize_t)bytes) return 2;
    told("/proc/self/mem");
    if (write(out, shared, bytes) != (ssize_t)bytes) return 2;
    told("write(2) from the mapping");
    if (madvise(shared, bytes, 22)) return 2;
    told("MADV_POPULATE_READ");
    return 0;
}
C
cc -O1 -w -o hole hole.c && ./hole > seen || { echo "cannot be tried here"; exit 2; }
cat seen
diff - seen <<'T' || { echo "changed"; exit 1; }
pread of the memfd: 0
sendfile from the memfd: 0
process_vm_readv, shared mapping: 256
process_vm_readv, private read-only mapping: 256
/proc/self/mem: 256
write(2) from the mapping: 256
MADV_POPULATE_READ: 256
T
