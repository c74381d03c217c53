/* A guest of Firecracker without an operating system. It runs in ring 3, because some nested
 * virtual machines emulate ring 0. It does what the guest of kvm_guest.c does, in 4 MiB: for
 * each byte on the serial line it makes 1000 steps, then prints a line. */
typedef unsigned char u8;
typedef unsigned int u32;

enum { WORDS = 0x4000, STRIDE = 64, TRANSMIT = 0x3f8, STATUS = 0x3fd };

/* Firecracker maps the first GiB to the same physical addresses, with page tables at 0x9000.
 * This code makes them accessible in ring 3. */
asm(".globl _start\n"
    "_start:\n"
    "  cli\n"
    "  mov $0x3f00000, %rsp\n"
    "  orq $4, 0x9000\n"
    "  orq $4, 0xa000\n"
    "  mov $0xb000, %rdi\n"
    "  mov $512, %ecx\n"
    "each: orq $4, (%rdi)\n"
    "  add $8, %rdi\n"
    "  dec %ecx\n"
    "  jnz each\n"
    "  mov %cr3, %rax\n"
    "  mov %rax, %cr3\n"
    "  lgdt table\n"
    "  push $0x23\n"         /* stack segment of ring 3 */
    "  push $0x3f00000\n"
    "  push $0x3002\n"       /* ring 3 may use ports */
    "  push $0x2b\n"         /* code segment of ring 3 */
    "  push $run\n"
    "  iretq\n"
    ".balign 16\n"
    "segments: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0, 0x00cff3000000ffff, 0x00affb000000ffff\n"
    "table: .word 47\n"
    "  .quad segments\n");

register unsigned long counted asm("r15");
static volatile u32 steps, drawn;

static void out(u8 byte) { asm volatile("outb %0, %1" : : "a"(byte), "Nd"((unsigned short)TRANSMIT)); }

static u8 in(unsigned short port) {
    u8 byte;
    asm volatile("inb %1, %0" : "=a"(byte) : "Nd"(port));
    return byte;
}

static void say(const char *text) { while (*text) out(*text++); }

static void say_number(u32 number) {
    char digits[12];
    int at = 0;
    do digits[at++] = '0' + number % 10; while (number /= 10);
    while (at) out(digits[--at]);
}

void run(void) {
    u32 *table = (u32 *)0x4000000;
    counted = 0;
    say("ready\n");
    for (;;) {
        while (!(in(STATUS) & 1)) for (volatile int wait = 0; wait < 200000; wait++);
        in(TRANSMIT);
        for (int step = 0; step < 1000; step++) {
            drawn = drawn * 1103515245 + 12345;
            table[(drawn >> 18) * STRIDE] += drawn;
            steps++;
            counted++;
        }
        if (counted != steps) say("WRONG: its memory and its registers: ");
        u32 sum = 0;
        for (int word = 0; word < WORDS; word++) sum = sum * 31 + table[word * STRIDE];
        say_number(steps);
        say(" ");
        say_number(drawn);
        say(" ");
        say_number(sum);
        say("\n");
    }
}
