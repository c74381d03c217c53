/*
 * A file system in user space that passes every call on to a directory, and lacks the feature that
 * its first argument names:
 *
 *     lesser_fs LACKS BELOW MOUNTED
 *
 *     link       no hard links: EPERM, as exFAT returns
 *     rename     no flags of rename (RENAME_NOREPLACE, RENAME_EXCHANGE): EINVAL, as NFS returns
 *     fsyncdir   directories cannot be synced: EINVAL, as CIFS returns
 *     nosyncdir  the same: EOPNOTSUPP
 *     flock      no file locks: EOPNOTSUPP
 *     nolock     the same: ENOSYS. (If a file system has no such operation, the kernel keeps the locks.)
 *     fallocate  no space can be reserved and no hole punched: EOPNOTSUPP
 *     shared     no shared mappings: ENODEV, as the kernel returns for files opened with direct_io
 *     mode       chmod is refused (EPERM), and everything has mode 0777, as on vfat
 *     remove     a file that is removed while open stays as .fuse_hiddenXXXX, libfuse's default
 *     late       a closed file and its lock are released 50 ms later: the kernel does not wait for that
 *     inode      inode numbers are libfuse's, and change when the kernel forgets a name
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 31
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

static int below;
static const char *lacked;

static int lacks(const char *ability) { return strstr(lacked, ability) != NULL; }
static const char *at(const char *path) { return path[1] ? path + 1 : "."; }
static int answer(long result) { return result < 0 ? -errno : (int)result; }

static void *lfs_init(struct fuse_conn_info *connection, struct fuse_config *config) {
    (void)connection;
    config->use_ino = !lacks("inode");
    config->hard_remove = !lacks("remove");
    config->nullpath_ok = 1;
    config->direct_io = lacks("shared");
    return NULL;
}

static int lfs_getattr(const char *path, struct stat *found, struct fuse_file_info *file) {
    int result = file ? fstat(file->fh, found) : fstatat(below, at(path), found, AT_SYMLINK_NOFOLLOW);
    if (result == 0 && lacks("mode"))
        found->st_mode |= 0777;
    return answer(result);
}

static int lfs_readlink(const char *path, char *to, size_t size) {
    ssize_t length = readlinkat(below, at(path), to, size - 1);
    if (length >= 0)
        to[length] = 0;
    return length < 0 ? -errno : 0;
}

static int lfs_mkdir(const char *path, mode_t mode) { return answer(mkdirat(below, at(path), mode)); }
static int lfs_unlink(const char *path) { return answer(unlinkat(below, at(path), 0)); }
static int lfs_rmdir(const char *path) { return answer(unlinkat(below, at(path), AT_REMOVEDIR)); }
static int lfs_symlink(const char *to, const char *path) { return answer(symlinkat(to, below, at(path))); }

static int lfs_mknod(const char *path, mode_t mode, dev_t device) {
    return answer(mknodat(below, at(path), mode, device));
}

static int lfs_rename(const char *from, const char *to, unsigned int flags) {
    if (flags && lacks("rename"))
        return -EINVAL;
    return answer(renameat2(below, at(from), below, at(to), flags));
}

static int lfs_link(const char *from, const char *to) {
    return lacks("link") ? -EPERM : answer(linkat(below, at(from), below, at(to), 0));
}

static int lfs_chmod(const char *path, mode_t mode, struct fuse_file_info *file) {
    if (lacks("mode"))
        return -EPERM;
    return answer(file ? fchmod(file->fh, mode) : fchmodat(below, at(path), mode, 0));
}

static int lfs_chown(const char *path, uid_t user, gid_t group, struct fuse_file_info *file) {
    return answer(file ? fchown(file->fh, user, group)
                       : fchownat(below, at(path), user, group, AT_SYMLINK_NOFOLLOW));
}

static int lfs_utimens(const char *path, const struct timespec times[2], struct fuse_file_info *file) {
    return answer(file ? futimens(file->fh, times) : utimensat(below, at(path), times, AT_SYMLINK_NOFOLLOW));
}

static int lfs_truncate(const char *path, off_t length, struct fuse_file_info *file) {
    if (file)
        return answer(ftruncate(file->fh, length));
    int opened = openat(below, at(path), O_WRONLY | O_NOFOLLOW | O_CLOEXEC);
    int result = opened < 0 ? -errno : answer(ftruncate(opened, length));
    close(opened);
    return result;
}

static int opened(int result, struct fuse_file_info *file) {
    file->fh = (uint64_t)result;
    return result < 0 ? -errno : 0;
}

static int lfs_create(const char *path, mode_t mode, struct fuse_file_info *file) {
    return opened(openat(below, at(path), file->flags | O_CREAT | O_CLOEXEC, mode), file);
}

static int lfs_open(const char *path, struct fuse_file_info *file) {
    return opened(openat(below, at(path), (file->flags & ~O_APPEND) | O_CLOEXEC), file);
}

static int lfs_opendir(const char *path, struct fuse_file_info *file) {
    return opened(openat(below, at(path), O_RDONLY | O_DIRECTORY | O_CLOEXEC), file);
}

static int lfs_read(const char *path, char *to, size_t size, off_t offset, struct fuse_file_info *file) {
    (void)path;
    return answer(pread(file->fh, to, size, offset));
}

static int lfs_write(const char *path, const char *from, size_t size, off_t offset, struct fuse_file_info *file) {
    (void)path;
    return answer(pwrite(file->fh, from, size, offset));
}

static int lfs_release(const char *path, struct fuse_file_info *file) {
    (void)path;
    if (lacks("late"))
        usleep(50000);
    return answer(close(file->fh));
}

static int lfs_fsync(const char *path, int only_data, struct fuse_file_info *file) {
    (void)path;
    return answer(only_data ? fdatasync(file->fh) : fsync(file->fh));
}

static int lfs_fsyncdir(const char *path, int only_data, struct fuse_file_info *file) {
    if (lacks("fsyncdir"))
        return -EINVAL;
    return lacks("nosyncdir") ? -EOPNOTSUPP : lfs_fsync(path, only_data, file);
}

static int lfs_flock(const char *path, struct fuse_file_info *file, int operation) {
    (void)path;
    if (lacks("nolock"))
        return -ENOSYS;
    return lacks("flock") ? -EOPNOTSUPP : answer(flock(file->fh, operation));
}

static int lfs_fallocate(const char *path, int mode, off_t offset, off_t length, struct fuse_file_info *file) {
    (void)path;
    return lacks("fallocate") ? -EOPNOTSUPP : answer(fallocate(file->fh, mode, offset, length));
}

static int lfs_readdir(const char *path, void *to, fuse_fill_dir_t fill, off_t offset, struct fuse_file_info *file,
                       enum fuse_readdir_flags flags) {
    (void)path, (void)offset, (void)flags;
    int again = openat(file->fh, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = again < 0 ? NULL : fdopendir(again);
    if (!dir)
        return -errno;
    for (struct dirent *entry; (entry = readdir(dir));) {
        struct stat found = {.st_ino = entry->d_ino, .st_mode = (mode_t)DTTOIF(entry->d_type)};
        fill(to, entry->d_name, &found, 0, 0);
    }
    closedir(dir);
    return 0;
}

static int lfs_statfs(const char *path, struct statvfs *found) {
    (void)path;
    return answer(fstatvfs(below, found));
}

static const struct fuse_operations operations = {
    .init = lfs_init, .getattr = lfs_getattr, .readlink = lfs_readlink, .mkdir = lfs_mkdir, .unlink = lfs_unlink,
    .rmdir = lfs_rmdir, .symlink = lfs_symlink, .mknod = lfs_mknod, .rename = lfs_rename, .link = lfs_link,
    .chmod = lfs_chmod, .chown = lfs_chown, .utimens = lfs_utimens, .truncate = lfs_truncate, .create = lfs_create,
    .open = lfs_open, .opendir = lfs_opendir, .read = lfs_read, .write = lfs_write, .release = lfs_release,
    .releasedir = lfs_release, .fsync = lfs_fsync, .fsyncdir = lfs_fsyncdir, .flock = lfs_flock,
    .fallocate = lfs_fallocate, .readdir = lfs_readdir, .statfs = lfs_statfs,
};

int main(int count, char **arguments) {
    if (count != 4)
        return 2;
    lacked = arguments[1];
    below = open(arguments[2], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    umask(0);
    char *of_fuse[] = {arguments[0], arguments[3], NULL};
    return below < 0 ? 1 : fuse_main(2, of_fuse, &operations, NULL);
}
