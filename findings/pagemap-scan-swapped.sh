#!/usr/bin/env bash
# Linux 6.18, PAGEMAP_SCAN (since 6.7), MADV_GUARD_INSTALL (since 6.13), no swap configured.
#
# One would expect: pages that PAGEMAP_SCAN calls PAGE_IS_SWAPPED hold data, so "present or swapped" is what a dump reads.
# What happens: two kinds of pages without any data are SWAPPED. A lightweight guard is SWAPPED and GUARD (0x112 with FILE
# unset; a read of it is a SIGSEGV). Memory that was never touched and was write-protected through a userfaultfd with
# WP_ASYNC and WP_UNPOPULATED is SWAPPED, every page of it, and a read of it gives zeros. PAGE_IS_WRITTEN alone is no
# better: untouched memory that was never armed is WRITTEN or not depending on whether its page table exists.
#
# Output seen (category bits: 1 WPALLOWED, 2 WRITTEN, 8 PRESENT, 10 SWAPPED, 100 GUARD):
#     untouched, no page table: nothing present, swapped or written
#     untouched, beside a touched page: 255 pages 2 1 pages a
#     guards: 256 pages 112
#     armed and never touched: 256 pages 11
#     armed, written and scanned again: 256 pages 9
#     thrown away by MADV_DONTNEED: 256 pages 3
# For a snapshot tool: leave GUARD out, and look at the swap type in /proc/PID/pagemap before reading what is SWAPPED.
# Otherwise a gigabyte of guards or of armed, empty memory is "read" page by page.
set -euo pipefail
command -v cc >/dev/null || { echo "needs cc"; exit 2; }
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
cat > scan.c <<'C'
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
struct found { uint64_t start, end, categories; };
struct scan {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t inverted, mask, anyof, wanted;
};
enum { ALLOWED = 1, WRITTEN = 2, PRESENT = 8, SWAPPED = 16, GUARD = 256, WP_MATCHING = 1 };
static int pagemap;
static void scan(const char *what, char *at, size_t bytes, uint64_t flags) {
    struct found v[8];
    struct scan s = { .size = sizeof s, .flags = flags, .start = (uintptr_t)at, .end = (uintptr_t)at + bytes,
        .vec = (uintptr_t)v, .vec_len = 8, .anyof = PRESENT | SWAPPED | WRITTEN,
        .wanted = ALLOWED | WRITTEN | PRESENT | SWAPPED | GUARD };
    int n = ioctl(pagemap, _IOWR('f', 16, struct scan), &s);
    if (!what) return;
    printf("%s:", what);
    if (n == 0) printf(" nothing present, swapped or written");
    for (int i = 0; i < n; i++)
        printf(" %llu pages %llx", (unsigned long long)(v[i].end - v[i].start) / 4096, (unsigned long long)v[i].categories);
    puts(n < 0 ? " no PAGEMAP_SCAN" : "");
}
static char *memory(size_t bytes) { /* at the beginning of a page table of its own */
    uintptr_t at = (uintptr_t)mmap(0, 4 << 20, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    at = (at + (2 << 20) - 1) & ~((uintptr_t)(2 << 20) - 1);
    madvise((void *)at, bytes, MADV_NOHUGEPAGE);
    return (char *)at;
}
int main(void) {
    size_t n = 1 << 20;
    pagemap = open("/proc/self/pagemap", O_RDONLY);
    char *plain = memory(n), *guards = memory(n), *armed = memory(n);
    scan("untouched, no page table", plain, n, 0);
    plain[n - 1] = 7;
    scan("untouched, beside a touched page", plain, n, 0);
    if (madvise(guards, n, 102)) return 2;
    scan("guards", guards, n, 0);
    int u = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1);
    struct uffdio_api api = { .api = UFFD_API, .features = 1 << 15 | 1 << 13 };
    struct uffdio_register reg = { .range = { (uintptr_t)armed, n }, .mode = UFFDIO_REGISTER_MODE_WP };
    struct uffdio_writeprotect wp = { .range = { (uintptr_t)armed, n }, .mode = UFFDIO_WRITEPROTECT_MODE_WP };
    if (ioctl(u, UFFDIO_API, &api) || ioctl(u, UFFDIO_REGISTER, &reg) || ioctl(u, UFFDIO_WRITEPROTECT, &wp)) return 2;
    scan("armed and never touched", armed, n, 0);
    memset(armed, 7, n);
    scan(NULL, armed, n, WP_MATCHING);
    scan("armed, written and scanned again", armed, n, 0);
    madvise(armed, n, MADV_DONTNEED);
    scan("thrown away by MADV_DONTNEED", armed, n, 0);
    return 0;
}
C
cc -O1 -w -o scan scan.c
./scan > seen || { echo "this kernel lacks one of these"; exit 2; }
cat seen
diff - seen <<'T' || { echo "changed"; exit 1; }
untouched, no page table: nothing present, swapped or written
untouched, beside a touched page: 255 pages 2 1 pages a
guards: 256 pages 112
armed and never touched: 256 pages 11
armed, written and scanned again: 256 pages 9
thrown away by MADV_DONTNEED: 256 pages 3
T
