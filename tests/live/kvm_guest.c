/* A virtual machine monitor with a guest of one processor. The guest's memory is a file, mapped
 * shared. Each command is a line on standard input, each reply a line on standard output.
 *
 * The guest draws numbers, adds each to a word of a table, and counts its steps in its memory
 * and in a register. At each step it reports whether both counts agree, so that it detects
 * memory and registers of different moments. */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { RAM = 2 << 20, CODE = 0x1000, DRAWN = 0x2000, STEPS = 0x2004, TABLE = 0x4000, WORDS = 0x2000, PORT = 0x10 };

/* In real mode, in which a processor starts, and which needs no page tables. */
asm(".code16\n"
    "guest:\n"
    "  movl 0x2000, %eax\n"
    "  imull $1103515245, %eax, %eax\n"
    "  addl $12345, %eax\n"
    "  movl %eax, 0x2000\n"
    "  movl %eax, %ebx\n"
    "  shrl $16, %ebx\n"
    "  andw $0x7ffc, %bx\n"
    "  addl %eax, 0x4000(%bx)\n"
    "  incl 0x2004\n"
    "  incl %ecx\n"
    "  cmpl %ecx, 0x2004\n"
    "  sete %al\n"
    "  outb %al, $0x10\n"
    "  jmp guest\n"
    "guest_end:\n"
    ".code64\n");
extern const char guest[], guest_end[];

static void fail(const char *what) { printf("none: %s: %s\n", what, strerror(errno)); exit(0); }

int main(int count, char **arguments) {
    setvbuf(stdout, 0, _IOLBF, 0);
    int file = open(arguments[1], O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, RAM)) fail(arguments[1]);
    uint8_t *ram = mmap(0, RAM, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    memcpy(ram + CODE, guest, guest_end - guest);
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0) fail("/dev/kvm");
    int machine = ioctl(kvm, KVM_CREATE_VM, 0);
    if (machine < 0) fail("KVM_CREATE_VM");
    struct kvm_userspace_memory_region region = {.memory_size = RAM, .userspace_addr = (uintptr_t)ram};
    if (ioctl(machine, KVM_SET_USER_MEMORY_REGION, &region)) fail("KVM_SET_USER_MEMORY_REGION");
    int processor = ioctl(machine, KVM_CREATE_VCPU, 0);
    if (processor < 0) fail("KVM_CREATE_VCPU");
    int bytes = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    struct kvm_run *run = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, processor, 0);
    if (run == MAP_FAILED) fail("kvm_run");
    struct kvm_sregs segments;
    ioctl(processor, KVM_GET_SREGS, &segments);
    segments.cs.base = segments.cs.selector = 0;
    ioctl(processor, KVM_SET_SREGS, &segments);
    struct kvm_regs registers = {.rip = CODE, .rflags = 2}, saved = registers;
    if (ioctl(processor, KVM_SET_REGS, &registers)) fail("KVM_SET_REGS");
    puts("ready");

    char line[100], command[20];
    while (fgets(line, sizeof line, stdin)) {
        long steps = 0;
        sscanf(line, "%19s %ld", command, &steps);
        if (!strcmp(command, "save")) {
            ioctl(processor, KVM_GET_REGS, &saved);
        } else if (!strcmp(command, "load")) {
            ioctl(processor, KVM_SET_REGS, &saved);
        } else if (!strcmp(command, "run")) {
            for (long step = 0; step < steps; step++) {
                if (ioctl(processor, KVM_RUN, 0)) fail("KVM_RUN");
                if (run->exit_reason != KVM_EXIT_IO || run->io.port != PORT) {
                    printf("WRONG: exit %u\n", run->exit_reason);
                    return 1;
                }
                if (!*((uint8_t *)run + run->io.data_offset)) { puts("WRONG: its memory and its registers"); return 1; }
            }
            /* Entry completes the last instruction; with immediate_exit no further one runs. */
            run->immediate_exit = 1;
            ioctl(processor, KVM_RUN, 0);
            run->immediate_exit = 0;
        }
        uint32_t sum = 0;
        for (int word = 0; word < WORDS; word++) sum = sum * 31 + ((uint32_t *)(ram + TABLE))[word];
        printf("%u %u %u\n", *(uint32_t *)(ram + STEPS), *(uint32_t *)(ram + DRAWN), sum);
    }
}
