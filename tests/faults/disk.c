/* Stands between a process and the C library for every call that changes what lies below one folder: counts
 * it, fails it, slows it down, writes it down. Loaded by LD_PRELOAD; tests/faults/disk.py builds and steers it.
 *
 *   FAULTS_BELOW    the folder; calls elsewhere pass untouched
 *   FAULTS_CONTROL  a file with `struct control`, shared by all processes that have it and by whoever watches
 *   FAULTS_CALLS    the calls that count, by name; all without it
 *   FAULTS_LOG      where each call becomes a line, when it has returned: number, call, path, other path,
 *                   error, bytes; by tabs. The other path of an open is the same where the file was there
 *                   before. Optional.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct control {
    int64_t calls;   /* so far */
    int64_t fail_at; /* the number of the call that fails; 0: none */
    int64_t error;   /* with this errno */
    int64_t stays;   /* and so do all after it */
    int64_t failing; /* 1: every call fails, from now on until it is 0 again */
    int64_t sleep;   /* microseconds before each call */
};

enum needs { ROOM, NONE }; /* a call that needs no room works on a full disk */

static struct control *control;
static const char *below, *only;
static size_t below_length;
static int log_file = -1;

__attribute__((constructor)) static void begin(void) {
    const char *name = getenv("FAULTS_CONTROL"), *log = getenv("FAULTS_LOG");
    int (*real_open)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    below = getenv("FAULTS_BELOW");
    only = getenv("FAULTS_CALLS");
    if (!below || !name) return;
    below_length = strlen(below);
    int file = real_open(name, O_RDWR | O_CLOEXEC);
    if (file < 0) return;
    void *shared = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (shared != MAP_FAILED) control = shared;
    if (log) log_file = real_open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static int is_below(const char *path) {
    return control && !strncmp(path, below, below_length) && (path[below_length] == '/' || !path[below_length]);
}

static void path_of(int descriptor, char *path) { /* PATH_MAX bytes; "" where it has none */
    char link[64];
    snprintf(link, sizeof link, descriptor == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
}

static void path_at(int folder, const char *name, char *path) {
    path[0] = 0;
    if (name[0] != '/') {
        path_of(folder, path);
        strncat(path, "/", PATH_MAX - 1 - strlen(path));
    }
    strncat(path, name, PATH_MAX - 1 - strlen(path));
}

/* Count a call; gives its number, with `*error` set where it is to fail. */
static int64_t enter(const char *call, enum needs needs, int *error) {
    *error = 0;
    if (only && !strstr(only, call)) return 0;
    int64_t number = __atomic_add_fetch(&control->calls, 1, __ATOMIC_SEQ_CST);
    int is_full = control->error == ENOSPC || control->error == EDQUOT;
    if (control->sleep) {
        struct timespec time = {control->sleep / 1000000, control->sleep % 1000000 * 1000};
        nanosleep(&time, NULL);
    }
    *error = control->failing && !(is_full && needs == NONE) ? (int)control->error : 0;
    if (number == control->fail_at) {
        *error = (int)control->error;
        if (control->stays) control->failing = 1;
    }
    return number;
}

static void leave(int64_t number, const char *call, const char *path, const char *other, int error, int64_t bytes) {
    char line[2 * PATH_MAX + 128];
    ssize_t (*real_write)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    if (log_file < 0) return;
    int length = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\t%d\t%ld\n", (long)number, call, path, other, error,
                          (long)bytes);
    (void)!real_write(log_file, line, (size_t)length);
}

/* Make the real call between `enter` and `leave`; FAIL is what it gives when it fails, errno apart. */
#define MAKE(TYPE, NEEDS, CALL, PATH, OTHER, FAIL, IS_ERROR, REAL)                                                   \
    do {                                                                                                             \
        int error;                                                                                                   \
        int64_t number = enter(CALL, NEEDS, &error);                                                                     \
        TYPE found = FAIL;                                                                                           \
        if (!error) {                                                                                                \
            found = REAL;                                                                                            \
            error = IS_ERROR;                                                                                        \
        }                                                                                                            \
        leave(number, CALL, PATH, OTHER, error, (int64_t)found);                                                     \
        errno = error ? error : errno;                                                                               \
        return found;                                                                                                \
    } while (0)

#define REAL(NAME) ((__typeof__(&NAME))dlsym(RTLD_NEXT, #NAME))

/* Calls on a descriptor. */
#define ON_FILE(TYPE, NEEDS, NAME, DESCRIPTOR, PARAMETERS, ...)                                                      \
    TYPE NAME PARAMETERS {                                                                                           \
        char path[PATH_MAX];                                                                                         \
        if (control) path_of(DESCRIPTOR, path);                                                                      \
        if (!control || !is_below(path)) return REAL(NAME)(__VA_ARGS__);                                             \
        MAKE(TYPE, NEEDS, #NAME, path, "", -1, found < 0 ? errno : 0, REAL(NAME)(__VA_ARGS__));                      \
    }
ON_FILE(ssize_t, ROOM, write, file, (int file, const void *from, size_t count), file, from, count)
ON_FILE(ssize_t, ROOM, pwrite, file, (int file, const void *from, size_t count, off_t at), file, from, count, at)
ON_FILE(ssize_t, ROOM, pwrite64, file, (int file, const void *from, size_t count, off64_t at), file, from, count, at)
ON_FILE(ssize_t, ROOM, writev, file, (int file, const struct iovec *from, int count), file, from, count)
ON_FILE(ssize_t, ROOM, pwritev, file, (int file, const struct iovec *from, int n, off_t at), file, from, n, at)
ON_FILE(ssize_t, ROOM, pwritev64, file, (int file, const struct iovec *from, int n, off64_t at), file, from, n, at)
ON_FILE(ssize_t, ROOM, sendfile, to, (int to, int from, off_t *at, size_t count), to, from, at, count)
ON_FILE(ssize_t, ROOM, sendfile64, to, (int to, int from, off64_t *at, size_t count), to, from, at, count)
ON_FILE(ssize_t, ROOM, copy_file_range, to, (int from, off64_t *at, int to, off64_t *there, size_t count, unsigned how),
        from, at, to, there, count, how)
ON_FILE(int, ROOM, fallocate, file, (int file, int how, off_t at, off_t count), file, how, at, count)
ON_FILE(int, ROOM, fallocate64, file, (int file, int how, off64_t at, off64_t count), file, how, at, count)
ON_FILE(int, NONE, ftruncate, file, (int file, off_t size), file, size)
ON_FILE(int, NONE, ftruncate64, file, (int file, off64_t size), file, size)
ON_FILE(int, NONE, fsync, file, (int file), file)
ON_FILE(int, NONE, fdatasync, file, (int file), file)
ON_FILE(int, NONE, fchmod, file, (int file, mode_t mode), file, mode)

/* These give the error itself. */
#define RESERVE(NAME, OFFSET)                                                                                        \
    int NAME(int file, OFFSET at, OFFSET count) {                                                                    \
        char path[PATH_MAX];                                                                                         \
        if (control) path_of(file, path);                                                                            \
        if (!control || !is_below(path)) return REAL(NAME)(file, at, count);                                         \
        MAKE(int, ROOM, #NAME, path, "", error, found, REAL(NAME)(file, at, count));                                 \
    }
RESERVE(posix_fallocate, off_t)
RESERVE(posix_fallocate64, off64_t)

/* Calls on a name. */
#define ON_NAME(NEEDS, NAME, FOLDER, PARAMETERS, ...)                                                                \
    int NAME PARAMETERS {                                                                                            \
        char path[PATH_MAX];                                                                                         \
        if (control) path_at(FOLDER, name, path);                                                                    \
        if (!control || !is_below(path)) return REAL(NAME)(__VA_ARGS__);                                             \
        MAKE(int, NEEDS, #NAME, path, "", -1, found < 0 ? errno : 0, REAL(NAME)(__VA_ARGS__));                       \
    }
ON_NAME(ROOM, mkdir, AT_FDCWD, (const char *name, mode_t mode), name, mode)
ON_NAME(ROOM, mkdirat, folder, (int folder, const char *name, mode_t mode), folder, name, mode)
ON_NAME(NONE, rmdir, AT_FDCWD, (const char *name), name)
ON_NAME(NONE, unlink, AT_FDCWD, (const char *name), name)
ON_NAME(NONE, unlinkat, folder, (int folder, const char *name, int how), folder, name, how)
ON_NAME(NONE, chmod, AT_FDCWD, (const char *name, mode_t mode), name, mode)
ON_NAME(NONE, fchmodat, folder, (int folder, const char *name, mode_t mode, int how), folder, name, mode, how)
ON_NAME(NONE, truncate, AT_FDCWD, (const char *name, off_t size), name, size)
ON_NAME(NONE, truncate64, AT_FDCWD, (const char *name, off64_t size), name, size)
ON_NAME(ROOM, symlink, AT_FDCWD, (const char *to, const char *name), to, name)
ON_NAME(ROOM, symlinkat, folder, (const char *to, int folder, const char *name), to, folder, name)

/* Calls on two names: the second is the one that appears. */
#define ON_NAMES(NAME, OLD_FOLDER, FOLDER, PARAMETERS, ...)                                                          \
    int NAME PARAMETERS {                                                                                            \
        char path[PATH_MAX], other[PATH_MAX];                                                                        \
        if (control) path_at(OLD_FOLDER, old, path), path_at(FOLDER, name, other);                                   \
        if (!control || (!is_below(path) && !is_below(other))) return REAL(NAME)(__VA_ARGS__);                       \
        MAKE(int, ROOM, #NAME, path, other, -1, found < 0 ? errno : 0, REAL(NAME)(__VA_ARGS__));                     \
    }
ON_NAMES(rename, AT_FDCWD, AT_FDCWD, (const char *old, const char *name), old, name)
ON_NAMES(renameat, from, to, (int from, const char *old, int to, const char *name), from, old, to, name)
ON_NAMES(renameat2, from, to, (int from, const char *old, int to, const char *name, unsigned how), from, old, to, name,
         how)
ON_NAMES(link, AT_FDCWD, AT_FDCWD, (const char *old, const char *name), old, name)
ON_NAMES(linkat, from, to, (int from, const char *old, int to, const char *name, int how), from, old, to, name, how)

/* Opening changes the disk where it may make a file or cut one off. */
#define OPENING(NAME, FOLDER, PARAMETERS, ...)                                                                       \
    int NAME PARAMETERS {                                                                                            \
        char path[PATH_MAX];                                                                                         \
        mode_t mode = 0;                                                                                             \
        if (how & O_CREAT || (how & O_TMPFILE) == O_TMPFILE) {\
            va_list rest;                                                                                            \
            va_start(rest, how);                                                                                     \
            mode = va_arg(rest, mode_t);                                                                             \
            va_end(rest);                                                                                            \
        }                                                                                                            \
        if (control) path_at(FOLDER, name, path);                                                                    \
        if (!control || !(how & (O_CREAT | O_TRUNC)) || !is_below(path)) return REAL(NAME)(__VA_ARGS__, how, mode);  \
        const char *before = access(path, F_OK) ? "" : path;                                                         \
        MAKE(int, ROOM, #NAME, path, before, -1, found < 0 ? errno : 0, REAL(NAME)(__VA_ARGS__, how, mode));         \
    }
OPENING(open, AT_FDCWD, (const char *name, int how, ...), name)
OPENING(open64, AT_FDCWD, (const char *name, int how, ...), name)
OPENING(openat, folder, (int folder, const char *name, int how, ...), folder, name)
OPENING(openat64, folder, (int folder, const char *name, int how, ...), folder, name)
