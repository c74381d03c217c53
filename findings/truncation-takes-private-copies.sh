#!/usr/bin/env bash
# Linux 6.18, memfd_create and ext4.
#
# One would expect: a page of a MAP_PRIVATE mapping that the process has written is its own, whatever happens to the file.
# What happens: shortening the file throws the private copies behind its new end away as well. When the file has its
# length again, the process reads the file's zeros where it had written. Punching a hole over the same bytes leaves the
# copies alone.
#
# Output seen (the process wrote 2 to each page of its private mapping of a file of 1):
#     memfd: hole punched 2, shortened and lengthened 0
#     file on disk: hole punched 2, shortened and lengthened 0
# For templates that many instances map privately: seal the memfd against shrinking (F_SEAL_SHRINK), or an instance loses
# what it wrote without a signal.
set -euo pipefail
command -v cc >/dev/null || { echo "needs cc"; exit 2; }
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
cat > cut.c <<'C'
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
static int try(const char *what, int fd) {
    size_t n = 1 << 20;
    if (fd < 0 || ftruncate(fd, n)) return 2;
    memset(mmap(0, n, 3, MAP_SHARED, fd, 0), 1, n);
    volatile char *own = mmap(0, n, 3, MAP_PRIVATE, fd, 0);
    memset((char *)own, 2, n);
    if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, n)) return 2;
    int punched = own[4096];
    if (ftruncate(fd, 0) || ftruncate(fd, n)) return 2;
    printf("%s: hole punched %d, shortened and lengthened %d\n", what, punched, own[4096]);
    return 0;
}
int main(void) { return try("memfd", memfd_create("image", 0)) | try("file on disk", open("image", O_RDWR | O_CREAT, 0600)); }
C
cc -O1 -w -o cut cut.c && ./cut > seen || { echo "cannot be tried here (a file system without holes?)"; exit 2; }
cat seen
diff - seen <<'T' || { echo "changed"; exit 1; }
memfd: hole punched 2, shortened and lengthened 0
file on disk: hole punched 2, shortened and lengthened 0
T
