/* Faults in the file calls of a process: LD_PRELOAD this library, then arm it from the process (harness.py does).
 *
 * It stands between the program and libc, because safetensors, tokenizers and torch write from Rust and C++, where
 * Python sees nothing. An event is a call that changes what is on disk below the watched folder. The calls of glibc
 * itself do not come by here, so fopen() is an event and fwrite() is none; the three libraries above use write().
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { BYTES = 1, ROOM = 2, NAME = 4 };         /* kinds of events: bytes written, new files, changed names */
enum { COUNT, KILL, HALF_KILL, FAIL, FULL, STOP };      /* what happens at the chosen event; harness.py has the same */
enum { PASS, REFUSE, HALF };                    /* what a call does then */

static char watched[PATH_MAX];
static int action, kinds, error, log_fd = -1;
static atomic_long seen;
static long chosen;

/* Counts the events of `wanted` kinds below `folder` from now on. At event number `at`, from 1: `what`, with errno
 * `number`. log: a file descriptor that gets a line for each event, or -1. An empty folder disarms. */
void faults_arm(const char *folder, int what, int wanted, long at, int number, int log) {
    snprintf(watched, sizeof watched, "%s", folder);
    action = what, kinds = wanted, chosen = at, error = number, log_fd = log;
    atomic_store(&seen, 0);
}

long faults_seen(void) { return atomic_load(&seen); }

static int is_watched(int dir, const char *name, char *path) {
    char link[64];
    ssize_t length = 0;
    if (!*watched) return 0;
    if (!name || *name != '/') {                /* relative to a folder, or the file of a descriptor */
        snprintf(link, sizeof link, dir == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dir);
        length = readlink(link, path, PATH_MAX - 1);
        if (length < 0) return 0;
    }
    path[length] = 0;
    if (name) snprintf(path + length, PATH_MAX - length, "%s%s", length ? "/" : "", name);
    length = strlen(watched);
    return !strncmp(path, watched, length) && (!path[length] || path[length] == '/');
}

static int event(int kind, const char *call, int dir, const char *name) {
    char path[PATH_MAX], line[PATH_MAX + 64];
    int before = errno;
    if (!(kind & kinds) || !is_watched(dir, name, path)) { errno = before; return PASS; }
    long number = atomic_fetch_add(&seen, 1) + 1;
    if (log_fd >= 0) {
        int length = snprintf(line, sizeof line, "%s %s\n", call, path);
        syscall(SYS_write, log_fd, line, length);
    }
    errno = before;
    if (number < chosen || (number > chosen && action != FULL)) return PASS;
    switch (action) {
        case KILL: raise(SIGKILL);
        case HALF_KILL: return HALF;
        case FULL: if (number == chosen && kind == BYTES) return HALF;       /* a full disk takes what still fits */
        /* fall through */
        case FAIL: errno = error; return REFUSE;
        case STOP: raise(SIGSTOP);
    }
    return PASS;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* A call that returns 0, or -1 with errno. */
#define SIMPLE(kind, name, parameters, arguments, dir, path) \
    int name parameters { REAL(name); return event(kind, #name, dir, path) ? -1 : real arguments; }
SIMPLE(NAME, rename, (const char *a, const char *b), (a, b), AT_FDCWD, b)
SIMPLE(NAME, renameat, (int d, const char *a, int e, const char *b), (d, a, e, b), e, b)
SIMPLE(NAME, renameat2, (int d, const char *a, int e, const char *b, unsigned f), (d, a, e, b, f), e, b)
SIMPLE(NAME, unlink, (const char *a), (a), AT_FDCWD, a)
SIMPLE(NAME, unlinkat, (int d, const char *a, int f), (d, a, f), d, a)
SIMPLE(NAME, remove, (const char *a), (a), AT_FDCWD, a)
SIMPLE(NAME, rmdir, (const char *a), (a), AT_FDCWD, a)
SIMPLE(ROOM, mkdir, (const char *a, mode_t m), (a, m), AT_FDCWD, a)
SIMPLE(ROOM, mkdirat, (int d, const char *a, mode_t m), (d, a, m), d, a)
SIMPLE(ROOM, symlink, (const char *a, const char *b), (a, b), AT_FDCWD, b)
SIMPLE(ROOM, link, (const char *a, const char *b), (a, b), AT_FDCWD, b)
SIMPLE(ROOM, truncate, (const char *a, off_t n), (a, n), AT_FDCWD, a)
SIMPLE(ROOM, truncate64, (const char *a, off64_t n), (a, n), AT_FDCWD, a)
SIMPLE(ROOM, ftruncate, (int f, off_t n), (f, n), f, NULL)
SIMPLE(ROOM, ftruncate64, (int f, off64_t n), (f, n), f, NULL)

/* A call that writes `size` bytes. Where half of them are to be written, they are, and then the process may die. */
#define WRITER(name, parameters, size, arguments, half, fd) \
    ssize_t name parameters { \
        REAL(name); \
        int decision = event(BYTES, #name, fd, NULL); \
        if (decision == REFUSE || (decision == HALF && (size) < 2)) { \
            if (action == HALF_KILL) raise(SIGKILL); \
            errno = error; return -1; } \
        if (decision == PASS) return real arguments; \
        ssize_t written = half; \
        if (action == HALF_KILL) raise(SIGKILL); \
        return written; }
WRITER(write, (int f, const void *b, size_t n), n, (f, b, n), real(f, b, n / 2), f)
WRITER(pwrite, (int f, const void *b, size_t n, off_t o), n, (f, b, n, o), real(f, b, n / 2, o), f)
WRITER(pwrite64, (int f, const void *b, size_t n, off64_t o), n, (f, b, n, o), real(f, b, n / 2, o), f)
WRITER(writev, (int f, const struct iovec *v, int n), v[0].iov_len, (f, v, n),
       syscall(SYS_write, f, v[0].iov_base, v[0].iov_len / 2), f)
WRITER(sendfile, (int f, int g, off_t *o, size_t n), n, (f, g, o, n), real(f, g, o, n / 2), f)
WRITER(sendfile64, (int f, int g, off64_t *o, size_t n), n, (f, g, o, n), real(f, g, o, n / 2), f)
WRITER(copy_file_range, (int f, off64_t *o, int g, off64_t *p, size_t n, unsigned l), n, (f, o, g, p, n, l),
       real(f, o, g, p, n / 2, l), g)

/* Opening for writing. */
#define OPENER(name, parameters, last, arguments, dir) \
    int name parameters { \
        REAL(name); \
        va_list more; va_start(more, last); int mode = va_arg(more, int); va_end(more); \
        int writes = flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC); \
        return writes && event(ROOM, #name, dir, path) ? -1 : real arguments; }
OPENER(open, (const char *path, int flags, ...), flags, (path, flags, mode), AT_FDCWD)
OPENER(open64, (const char *path, int flags, ...), flags, (path, flags, mode), AT_FDCWD)
OPENER(openat, (int dir, const char *path, int flags, ...), flags, (dir, path, flags, mode), dir)
OPENER(openat64, (int dir, const char *path, int flags, ...), flags, (dir, path, flags, mode), dir)

#define STREAM(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(name); \
        return strpbrk(mode, "wa+") && event(ROOM, #name, AT_FDCWD, path) ? NULL : real(path, mode); }
STREAM(fopen)
STREAM(fopen64)
