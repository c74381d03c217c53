#!/usr/bin/env bash
# Linux 6.18.44, x86-64; userfaultfd's asynchronous write protection, PAGEMAP_SCAN, io_uring.
#
# One would expect: after a scan has protected pages again, every change of their bytes makes the next scan report them.
# What happens: memory that is registered as a buffer of an io_uring stays pinned, and the kernel counts its pages as
# written when it pins them. A later read into that buffer goes to the pages and not through the page tables. So the
# scan after the read reports none of the pages, although all of their bytes have changed.
#
# Output seen:
#     first scan: 4 of 4 pages written
#     after a store to one page: 1
#     after a read into all pages through a registered buffer: 0, and the first byte is 0
# For a store that reads only what a scan reports: such memory has to be read in full, for as long as it is registered.
set -euo pipefail
command -v cc >/dev/null || { echo "needs cc"; exit 2; }
[ "$(uname -sm)" = "Linux x86_64" ] || { echo "needs Linux on x86-64"; exit 2; }
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
cat > fixed.c <<'C'
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/userfaultfd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
#define NEEDS(what, condition) if (!(condition)) { perror("needs " what); return 2; }
enum { PAGE = 4096, PAGES = 4, WP_UNPOPULATED = 1 << 13, WP_ASYNC = 1 << 15 };
struct scan { uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, reported; };
struct region { uint64_t start, end, categories; };
#define SCAN _IOWR('f', 16, struct scan)
#define WRITTEN (1 << 1)
/* Protects the pages again, and returns how many were written since the last time. */
static int written(int pagemap, char *memory) {
    struct region found[PAGES];
    struct scan scan = {sizeof scan, 3, (uint64_t)memory, (uint64_t)memory + PAGES * PAGE, 0, (uint64_t)found, PAGES, 0, 0, WRITTEN, 0, WRITTEN};
    int regions = ioctl(pagemap, SCAN, &scan), pages = 0;
    if (regions < 0) { perror("PAGEMAP_SCAN"); exit(2); }
    for (int i = 0; i < regions; i++) pages += (found[i].end - found[i].start) / PAGE;
    return pages;
}
int main(void) {
    char *memory = mmap(0, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(memory, PAGES * PAGE, MADV_NOHUGEPAGE);
    memset(memory, 1, PAGES * PAGE);
    int fault = syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY), pagemap = open("/proc/self/pagemap", O_RDONLY);
    NEEDS("userfaultfd", fault >= 0)
    struct uffdio_api api = {UFFD_API, WP_ASYNC | WP_UNPOPULATED, 0};
    NEEDS("asynchronous write protection (Linux 6.7)", !ioctl(fault, UFFDIO_API, &api))
    struct uffdio_register all = {{(uint64_t)memory, PAGES * PAGE}, UFFDIO_REGISTER_MODE_WP, 0};
    NEEDS("write protection", !ioctl(fault, UFFDIO_REGISTER, &all))
    struct io_uring_params params = {0};
    int ring = syscall(__NR_io_uring_setup, 4, &params);
    NEEDS("io_uring", ring >= 0)
    char *queue = mmap(0, params.sq_off.array + params.sq_entries * 4, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQ_RING);
    struct io_uring_sqe *entry = mmap(0, 4 * sizeof *entry, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQES);
    NEEDS("io_uring's queues", queue != MAP_FAILED && (void *)entry != MAP_FAILED)
    struct iovec buffer = {memory, PAGES * PAGE};
    NEEDS("registered buffers", !syscall(__NR_io_uring_register, ring, IORING_REGISTER_BUFFERS, &buffer, 1))
    printf("first scan: %d of %d pages written\n", written(pagemap, memory), PAGES);
    memory[0] = 2;
    printf("after a store to one page: %d\n", written(pagemap, memory));
    int zeros = open("/dev/zero", O_RDONLY);
    memset(entry, 0, sizeof *entry);
    entry->opcode = IORING_OP_READ_FIXED; entry->fd = zeros; entry->addr = (uint64_t)memory; entry->len = PAGES * PAGE; entry->buf_index = 0;
    *(unsigned *)(queue + params.sq_off.array) = 0;
    __atomic_store_n((unsigned *)(queue + params.sq_off.tail), 1, __ATOMIC_RELEASE);
    NEEDS("a read", syscall(__NR_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, 0, 0) == 1)
    printf("after a read into all pages through a registered buffer: %d, and the first byte is %d\n", written(pagemap, memory), memory[0]);
    return 0;
}
C
cc -O1 -o fixed fixed.c
./fixed > seen || exit 2
cat seen
diff - seen <<'T' || { echo "changed"; exit 1; }
first scan: 4 of 4 pages written
after a store to one page: 1
after a read into all pages through a registered buffer: 0, and the first byte is 0
T
