// Runs commands on files, one a line, and prints the results. A single 's' takes a snapshot.
#include "wasix.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <wasi/api.h>

static uint64_t sum_of(const char *path, long *length) {
    uint64_t sum = 7;
    *length = 0;
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    for (int byte; (byte = fgetc(file)) != EOF; ++*length) sum = sum * 31 + (uint64_t)byte;
    fclose(file);
    return sum;
}

static void list(const char *path) {
    DIR *dir = opendir(path);
    if (!dir) {
        printf(" [%s: %d]", path, errno);
        return;
    }
    char names[64][32];
    int count = 0;
    for (struct dirent *entry; (entry = readdir(dir)) && count < 64;)
        if (entry->d_name[0] != '.') snprintf(names[count++], 32, "%s", entry->d_name);
    closedir(dir);
    qsort(names, (size_t)count, sizeof names[0], (int (*)(const void *, const void *))strcmp);
    for (int at = 0; at < count; at++) {
        char full[128];
        snprintf(full, sizeof full, "%s/%s", path, names[at]);
        struct stat stat_of;
        if (stat(full, &stat_of)) {
            printf(" %s:?", full);
        } else if (S_ISDIR(stat_of.st_mode)) {
            printf(" %s/", full);
            list(full);
        } else {
            long length;
            uint64_t sum = sum_of(full, &length);
            printf(" %s:%ld:%llx", full, length, (unsigned long long)sum);
        }
    }
}

int main(void) {
    static char line[4096], one[1024], other[1024];
    int number, to;
    while (fgets(line, sizeof line, stdin)) {
        int result = 0;
        errno = 0;
        int take = !strcmp(line, "s\n");
        if (take) {
            proc_snapshot();
        } else if (sscanf(line, "open %1023s %1023s", one, other) == 2) {
            int flags = strchr(other, 'w') ? O_RDWR : O_RDONLY;
            if (strchr(other, 'c')) flags |= O_CREAT;
            if (strchr(other, 't')) flags |= O_TRUNC;
            if (strchr(other, 'a')) flags |= O_APPEND;
            result = open(one, flags, 0600);
        } else if (sscanf(line, "close %d", &number) == 1) {
            result = close(number);
        } else if (sscanf(line, "write %d %1023s", &number, one) == 2) {
            result = (int)write(number, one, strlen(one));
        } else if (sscanf(line, "read %d %d", &number, &to) == 2) {
            result = (int)read(number, other, (size_t)(to < 1023 ? to : 1023));
            if (result > 0) printf("%.*s ", result, other);
        } else if (sscanf(line, "seek %d %d", &number, &to) == 2) {
            result = (int)lseek(number, to, SEEK_SET);
        } else if (sscanf(line, "cut %d %d", &number, &to) == 2) {
            result = ftruncate(number, to);
        } else if (sscanf(line, "renumber %d %d", &number, &to) == 2) {
            result = (int)__wasi_fd_renumber(number, to);
        } else if (sscanf(line, "mkdir %1023s", one) == 1) {
            result = mkdir(one, 0700);
        } else if (sscanf(line, "rmdir %1023s", one) == 1) {
            result = rmdir(one);
        } else if (sscanf(line, "unlink %1023s", one) == 1) {
            result = unlink(one);
        } else if (sscanf(line, "rename %1023s %1023s", one, other) == 2) {
            result = rename(one, other);
        } else if (sscanf(line, "list %1023s", one) == 1) {
            printf("at");
            for (int fd = 3; fd < 24; fd++) {
                off_t at = lseek(fd, 0, SEEK_CUR);
                if (at >= 0) printf(" %d:%lld", fd, (long long)at);
            }
            printf(" in");
            list(one);
            printf(" ");
        }
        printf("%s%d %d\n", take ? "taken " : "", result, result < 0 ? errno : 0);
        fflush(stdout);
    }
    return 0;
}
