#!/usr/bin/env bash
# Linux 6.18, userfaultfd in missing mode, mlockall(MCL_FUTURE).
#
# One would expect: a fresh anonymous mapping that is registered with a userfaultfd before anybody touches it delivers a
# fault for each page. Mapping it without access first, to register it in peace, makes no difference.
# What happens: under mlockall(MCL_FUTURE) mmap populates the mapping at once. Registering succeeds all the same, no fault
# ever comes, and UFFDIO_COPY answers EEXIST, which a server easily takes for "somebody was faster". A mapping without
# access is not populated by mmap, but mprotect populates it, unless the userfaultfd is registered in between, or
# mlock2(MLOCK_ONFAULT) was called on it.
#
# Output seen (pages in memory, of 256):
#     mapped with access: 256, copy into the registered page: EEXIST
#     mapped without access: 0, after mprotect: 256
#     mapped without access, registered: 0, after mprotect: 0
#     mapped without access, mlock2(MLOCK_ONFAULT): 0, after mprotect: 0
# For whoever fills memory on demand: map without access, register, give access, and look at pagemap before relying on it.
set -euo pipefail
command -v cc >/dev/null || { echo "needs cc"; exit 2; }
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
cat > locked.c <<'C'
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
static const size_t bytes = 1 << 20;
static int pagemap, faults;
static int present(char *at) {
    uint64_t entries[256];
    int count = 0;
    if (pread(pagemap, entries, sizeof entries, (uintptr_t)at / 4096 * 8) != sizeof entries) exit(2);
    for (int i = 0; i < 256; i++) count += entries[i] >> 63;
    return count;
}
static char *map(int access) {
    char *at = mmap(0, bytes, access, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) exit(2);
    return at;
}
static void served(char *at) {
    struct uffdio_register reg = { .range = { (uintptr_t)at, bytes }, .mode = UFFDIO_REGISTER_MODE_MISSING };
    if (ioctl(faults, UFFDIO_REGISTER, &reg)) exit(2);
}
int main(void) {
    int all = PROT_READ | PROT_WRITE;
    static char page[4096] __attribute__((aligned(4096)));
    pagemap = open("/proc/self/pagemap", O_RDONLY);
    faults = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1);
    struct uffdio_api api = { .api = UFFD_API };
    if (ioctl(faults, UFFDIO_API, &api) || mlockall(MCL_FUTURE)) return 2;
    char *a = map(all);
    printf("mapped with access: %d, ", present(a));
    served(a);
    struct uffdio_copy copy = { .dst = (uintptr_t)a, .src = (uintptr_t)page, .len = 4096 };
    printf("copy into the registered page: %s\n", ioctl(faults, UFFDIO_COPY, &copy) && errno == EEXIST ? "EEXIST" : "done");
    char *b = map(PROT_NONE);
    printf("mapped without access: %d, ", present(b));
    mprotect(b, bytes, all);
    printf("after mprotect: %d\n", present(b));
    char *c = map(PROT_NONE);
    served(c);
    printf("mapped without access, registered: %d, ", present(c));
    mprotect(c, bytes, all);
    printf("after mprotect: %d\n", present(c));
    char *d = map(PROT_NONE);
    if (mlock2(d, bytes, MLOCK_ONFAULT)) return 2;
    printf("mapped without access, mlock2(MLOCK_ONFAULT): %d, ", present(d));
    mprotect(d, bytes, all);
    printf("after mprotect: %d\n", present(d));
    return 0;
}
C
cc -O1 -w -o locked locked.c && ./locked > seen || { echo "cannot be tried here (RLIMIT_MEMLOCK, userfaultfd?)"; exit 2; }
cat seen
diff - seen <<'T' || { echo "changed"; exit 1; }
mapped with access: 256, copy into the registered page: EEXIST
mapped without access: 0, after mprotect: 256
mapped without access, registered: 0, after mprotect: 0
mapped without access, mlock2(MLOCK_ONFAULT): 0, after mprotect: 0
T
