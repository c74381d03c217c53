/* A program that maps memory of one kind, prints where, and waits. Lines on standard input:
 * "faults" prints how many page faults it has served, "u" removes its guard pages and writes
 * there, any other line ends it. It prints "ready ADDRESS LENGTH" first, and then the counts. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/fuse.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MIB (1ul << 20)
static const char *what;
static char page[4096];
static int userfault = -1, served;

/* Reports what the machine lacks. The test prints it and passes over. */
static void lacks(const char *text) { printf("lacks %s\n", text); fflush(stdout); exit(0); }

static void *serve(void *unused) {
    struct uffd_msg message;
    while (read(userfault, &message, sizeof message) == sizeof message) {
        unsigned long at = message.arg.pagefault.address & ~4095ul;
        served++;
        struct uffdio_continue go = { .range = { at, 4096 } };
        struct uffdio_copy copy = { .dst = at, .src = (unsigned long)page, .len = 4096 };
        if (message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR) ioctl(userfault, UFFDIO_CONTINUE, &go);
        else ioctl(userfault, UFFDIO_COPY, &copy);
    }
    return unused;
}

static void fill_by_userfault(char *at, size_t length, int mode, int flags, uint64_t features) {
    struct uffdio_api api = { .api = UFFD_API, .features = features };
    userfault = syscall(SYS_userfaultfd, O_CLOEXEC | flags);
    if (userfault < 0 || ioctl(userfault, UFFDIO_API, &api)) lacks("a kernel that permits userfaultfd here");
    struct uffdio_register range = { .range = { (unsigned long)at, length }, .mode = mode };
    if (ioctl(userfault, UFFDIO_REGISTER, &range)) lacks("a kernel with this mode of userfaultfd");
    pthread_t thread;
    memset(page, 0x5a, sizeof page);
    pthread_create(&thread, 0, serve, 0);
}

static char *map(size_t length, int protection, int flags, int fd) {
    char *at = mmap(0, length, protection, flags, fd, 0);
    if (at == MAP_FAILED) lacks("memory of this kind");
    return at;
}

/* ---- A file system that stops replying ------------------------------------------------------- */

static void answer(int fuse, uint64_t unique, int error, const void *bytes, size_t length) {
    static char out[1 << 20];
    struct fuse_out_header head = { .len = sizeof head + length, .error = error, .unique = unique };
    memcpy(out, &head, sizeof head);
    if (length) memcpy(out + sizeof head, bytes, length);
    if (write(fuse, out, head.len) < 0) _exit(0);
}

static struct fuse_attr attributes(uint64_t node) {
    return (struct fuse_attr){ .ino = node, .size = node == 1 ? 0 : 64 * 4096, .blocks = 8, .nlink = 1, .blksize = 4096,
                               .mode = node == 1 ? S_IFDIR | 0755 : S_IFREG | 0644 };
}

/* One file "f", whose first pages can be read. After `silent` exists, no request gets a reply. */
static void file_system(int fuse, const char *silent) {
    static char in[1 << 20], data[64 * 4096];
    memset(data, 0x42, sizeof data);
    for (;;) {
        if (read(fuse, in, sizeof in) < (long)sizeof(struct fuse_in_header)) _exit(0);
        struct fuse_in_header *head = (void *)in;
        void *body = head + 1;
        if (access(silent, F_OK) == 0) continue;
        switch (head->opcode) {
        case FUSE_INIT: {
            struct fuse_init_in *asked = body;
            struct fuse_init_out out = { .major = 7, .minor = asked->minor < 31 ? asked->minor : 31, .max_write = 65536,
                                         .max_readahead = 0 };
            answer(fuse, head->unique, 0, &out, sizeof out);
            break;
        }
        case FUSE_LOOKUP: {
            struct fuse_entry_out out = { .nodeid = 2, .attr = attributes(2) };
            answer(fuse, head->unique, 0, &out, sizeof out);
            break;
        }
        case FUSE_GETATTR: {
            struct fuse_attr_out out = { .attr = attributes(head->nodeid) };
            answer(fuse, head->unique, 0, &out, sizeof out);
            break;
        }
        case FUSE_OPEN: {
            struct fuse_open_out out = { .fh = 1 };
            answer(fuse, head->unique, 0, &out, sizeof out);
            break;
        }
        case FUSE_READ: {
            struct fuse_read_in *asked = body;
            size_t from = asked->offset < sizeof data ? asked->offset : sizeof data, length = sizeof data - from;
            answer(fuse, head->unique, 0, data + from, asked->size < length ? asked->size : length);
            break;
        }
        case FUSE_FORGET: case FUSE_BATCH_FORGET: case FUSE_INTERRUPT: break;
        default: answer(fuse, head->unique, -38, 0, 0);
        }
    }
}

static char *map_of_a_server(const char *directory) {
    char point[4096], silent[4096], options[256], name[4200];
    snprintf(point, sizeof point, "%s/mnt", directory);
    snprintf(silent, sizeof silent, "%s/silent", directory);
    int fuse = open("/dev/fuse", O_RDWR);
    if (fuse < 0 || unshare(CLONE_NEWNS) || mount("none", "/", 0, MS_REC | MS_PRIVATE, 0)) lacks("root and /dev/fuse");
    mkdir(point, 0755);
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0", fuse);
    if (mount("test", point, "fuse", 0, options)) lacks("a kernel with FUSE");
    if (fork() == 0) { prctl(PR_SET_PDEATHSIG, 9); file_system(fuse, silent); }
    close(fuse);
    snprintf(name, sizeof name, "%s/f", point);
    int fd = open(name, O_RDONLY);
    if (fd < 0) lacks("a FUSE file system that works");
    char *at = map(64 * 4096, PROT_READ, MAP_PRIVATE, fd);
    madvise(at, 64 * 4096, MADV_RANDOM);
    if (at[0] != 0x42) lacks("a FUSE file system that works");
    close(fd);
    close(open(silent, O_CREAT | O_WRONLY, 0600));
    return at;
}

/* ---- The kinds of memory --------------------------------------------------------------------- */

static int is(const char *name) { return strcmp(what, name) == 0; }

int main(int count, char **arguments) {
    what = arguments[1];
    const char *directory = arguments[2];
    size_t length = 64 * MIB;
    char *at = 0, name[4096];
    int fd = -1;
    prctl(PR_SET_PDEATHSIG, 9);
    if (is("missing")) {
        length = MIB;
        at = map(length, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1);
        fill_by_userfault(at, length, UFFDIO_REGISTER_MODE_MISSING, 1, 0);
        at[0] = 1;
        struct uffdio_zeropage zero = { .range = { (unsigned long)at + 8192, 4096 } };
        ioctl(userfault, UFFDIO_ZEROPAGE, &zero);
    } else if (is("missing-waits") || is("missing-shared")) {
        length = MIB;
        fd = memfd_create("guest", 0);
        if (ftruncate(fd, length)) return 1;
        int flags = is("missing-shared") ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
        at = map(length, 3, flags, is("missing-shared") ? fd : -1);
        fill_by_userfault(at, length, UFFDIO_REGISTER_MODE_MISSING, 0, is("missing-shared") ? UFFD_FEATURE_MISSING_SHMEM : 0);
        at[0] = 1;
    } else if (is("minor")) {
        length = MIB;
        fd = memfd_create("guest", 0);
        if (ftruncate(fd, length)) return 1;
        char *other = map(length, 3, MAP_SHARED, fd);
        memset(other, 7, length);
        at = map(length, 3, MAP_SHARED, fd);
        fill_by_userfault(at, length, UFFDIO_REGISTER_MODE_MINOR, 0, UFFD_FEATURE_MINOR_SHMEM);
        at[0] = 1;
        munmap(other, length);
    } else if (is("memfd") || is("memfd-private")) {
        fd = memfd_create("guest", 0);
        if (ftruncate(fd, length) || pwrite(fd, "file", 4, 5 * MIB) != 4) return 1;
        at = map(length, 3, is("memfd") ? MAP_SHARED : MAP_PRIVATE, fd);
        memset(at, 1, MIB);
    } else if (is("memfd-closed")) {
        fd = memfd_create("guest", 0);
        if (ftruncate(fd, length)) return 1;
        at = map(length, 3, MAP_SHARED, fd);
        close(fd);
        memset(at, 1, MIB);
    } else if (is("shared")) {
        at = map(length, 3, MAP_SHARED | MAP_ANONYMOUS, -1);
        memset(at, 1, MIB);
    } else if (is("shm") || is("disk") || is("disk-private")) {
        snprintf(name, sizeof name, "%s/f.%d", is("shm") ? "/dev/shm" : directory, getpid());
        fd = open(name, O_CREAT | O_RDWR | O_EXCL, 0600);
        if (ftruncate(fd, length)) return 1;
        at = map(length, 3, is("disk-private") ? MAP_PRIVATE : MAP_SHARED, fd);
        close(fd);
        memset(at, 1, MIB);
    } else if (is("zero")) {
        at = map(length, 3, MAP_PRIVATE, open("/dev/zero", O_RDWR));
        memset(at, 1, MIB);
    } else if (is("huge") || is("huge-shared")) {
        length = 12 * MIB;
        at = map(length, 3, (is("huge") ? MAP_PRIVATE : MAP_SHARED) | MAP_ANONYMOUS | MAP_HUGETLB | MAP_NORESERVE, -1);
        memset(at, 1, MIB);
    } else if (is("longer") || is("cut")) {
        snprintf(name, sizeof name, "%s/%s", directory, what);
        fd = open(name, O_CREAT | O_RDWR | O_TRUNC, 0600);
        for (int i = 0; i < 3 * 4096 + 100; i++) if (write(fd, "\1", 1) != 1) return 1;
        length = is("longer") ? 8ul << 30 : 4 * 4096;
        at = map(length, 3, MAP_SHARED, fd);
        if (is("longer")) at[4 * 4096 - 1] = 9;
    } else if (is("no-access")) {
        /* Terabyte reserves, a page with bytes within one of them, and one in a separate mapping. */
        for (int i = 0; i < 30; i++) map(1ul << 40, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
        length = 1ul << 30;
        at = map(length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
        mprotect(at + 512 * MIB, 4096, 3);
        memset(at + 512 * MIB, 6, 4096);
        mprotect(at + 512 * MIB, 4096, PROT_NONE);
    } else if (is("write-only") || is("no-access-shared") || is("no-access-copied")) {
        length = 4 * 4096;
        snprintf(name, sizeof name, "%s/f.%d", directory, getpid());
        fd = is("no-access-copied") ? open(name, O_CREAT | O_RDWR | O_EXCL, 0600) : memfd_create("guest", 0);
        if (ftruncate(fd, length)) return 1;
        int flags = is("write-only") ? MAP_PRIVATE | MAP_ANONYMOUS : is("no-access-shared") ? MAP_SHARED : MAP_PRIVATE;
        at = map(length, 3, flags, flags & MAP_ANONYMOUS ? -1 : fd);
        memset(at + 4096, 6, 4096);
        mprotect(at, length, is("write-only") ? PROT_WRITE : PROT_NONE);
    } else if (is("guard")) {
        length = MIB;
        at = map(length, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1);
        memset(at, 1, length);
        if (madvise(at + 65536, 65536, 102)) lacks("a kernel with guard pages (Linux 6.13)");
    } else if (is("secret")) {
        length = 16 * 4096;
        fd = syscall(447, 0);
        if (fd < 0 || ftruncate(fd, length)) lacks("a kernel with memfd_secret");
        at = map(length, 3, MAP_SHARED, fd);
        memset(at, 1, length);
    } else if (is("server")) {
        length = 64 * 4096;
        at = map_of_a_server(directory);
    } else return 2;
    printf("ready %lu %lu\n", (unsigned long)at, length);
    fflush(stdout);
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        if (line[0] == 'u') { madvise(at + 65536, 65536, 103); memset(at + 65536, 2, 65536); }
        printf("%d\n", served);
        fflush(stdout);
    }
    if (is("shm")) unlink(name);
    return 0;
}
