// One thread reads lines, and three other threads count: 's' takes a snapshot, any other line
// prints the counts. There is no C library, because threads would need one that was built for them.
//
// Each thread allows a snapshot where it calls proc_snapshot. The runtime could take one in
// thread_sleep too, but the thread would not survive it.
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define WASI(name) __attribute__((import_module("wasi_snapshot_preview1"), import_name(#name)))
#define WASIX(name) __attribute__((import_module("wasix_32v1"), import_name(#name)))

struct buffer { void *bytes; uint32_t length; };
WASI(fd_read) int fd_read(int fd, const struct buffer *buffers, uint32_t count, uint32_t *read);
WASI(fd_write) int fd_write(int fd, const struct buffer *buffers, uint32_t count, uint32_t *written);
WASIX(proc_snapshot) int proc_snapshot(void);

struct thread_start {
    uint32_t stack_upper, tls_base, function, argument, reserved[10], stack_size, guard_size;
};
WASIX(thread_spawn_v2) int thread_spawn(struct thread_start *start, uint32_t *tid);

enum { THREADS = 3, STACK = 16384 };

static _Alignas(16) char stacks[THREADS][STACK];
static struct thread_start starts[THREADS];
static _Atomic uint32_t counts[THREADS];
static _Atomic uint32_t wanted;
static int32_t never;

static void doze(void) {
    __builtin_wasm_memory_atomic_wait32(&never, 0, 1000000);
}

__asm__(
    ".globaltype __stack_pointer, i32\n"
    ".globl wasi_thread_start\n"
    ".hidden wasi_thread_start\n"
    ".export_name wasi_thread_start, wasi_thread_start\n"
    ".type wasi_thread_start,@function\n"
    "wasi_thread_start:\n"
    ".functype wasi_thread_start (i32, i32) -> ()\n"
    "local.get 1\n"
    "i32.load 0\n"
    "global.set __stack_pointer\n"
    "local.get 1\n"
    "call count_for_ever\n"
    "end_function\n");

// Takes each requested step. The count is on the thread's stack.
__attribute__((used, noinline)) void count_for_ever(struct thread_start *start) {
    volatile uint32_t mine = 0;
    for (;;) {
        if (mine < atomic_load(&wanted)) {
            mine = mine + 1;
            atomic_store(&counts[start->argument], mine);
        }
        doze();
        proc_snapshot();
    }
}

static uint32_t write_number(char *to, uint32_t number) {
    char digits[10];
    uint32_t length = 0;
    do digits[length++] = (char)('0' + number % 10); while (number /= 10);
    for (uint32_t at = 0; at < length; at++) to[at] = digits[length - 1 - at];
    return length;
}

// Waits until all threads have taken every requested step, and prints the counts.
static void __attribute__((noinline)) tell(void) {
    for (uint32_t at = 0; at < THREADS; at++)
        while (atomic_load(&counts[at]) != atomic_load(&wanted)) {
            doze();
            proc_snapshot();
        }
    char line[64];
    uint32_t length = 0;
    for (uint32_t at = 0; at < THREADS; at++) {
        length += write_number(line + length, atomic_load(&counts[at]));
        line[length++] = at + 1 < THREADS ? ' ' : '\n';
    }
    struct buffer out = {line, length};
    uint32_t written;
    fd_write(1, &out, 1, &written);
}

__attribute__((export_name("_start"))) void _start(void) {
    for (uint32_t at = 0; at < THREADS; at++) {
        starts[at] = (struct thread_start){(uint32_t)(uintptr_t)(stacks[at] + STACK), 0, 0, at, {0}, STACK, 0};
        uint32_t tid;
        if (thread_spawn(&starts[at], &tid)) __builtin_trap();
    }
    for (;;) {
        char byte;
        struct buffer in = {&byte, 1};
        uint32_t read = 0;
        int take = 0;
        do {
            if (fd_read(0, &in, 1, &read) || read == 0) return;
            take |= byte == 's';
        } while (byte != '\n');
        atomic_fetch_add(&wanted, 1);
        if (take) proc_snapshot();
        tell();
    }
}
