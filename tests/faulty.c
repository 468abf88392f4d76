/* A file system like a mounted bucket: slow, and now and then an operation fails.

   Loaded before libc (LD_PRELOAD), it delays what changes something below FAULTY_DIR by
   FAULTY_DELAY_US, and lets every FAULTY_EVERY-th of these operations, over all threads,
   fail with EIO, once FAULTY_AFTER of them have been done; each failure is a line in
   FAULTY_LOG. With FAULTY_READS, it is what reads that is counted and fails, and nothing
   else. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static atomic_long done;

static long number(const char *name) {
  const char *value = getenv(name);
  return value ? atol(value) : 0;
}

static int below(const char *path) {
  const char *dir = getenv("FAULTY_DIR");
  return dir && path && strncmp(path, dir, strlen(dir)) == 0;
}

static void wait_a_while(void) {
  long micros = number("FAULTY_DELAY_US");
  struct timespec wait = {micros / 1000000, micros % 1000000 * 1000};
  if (micros > 0) nanosleep(&wait, NULL);
}

/* 1, with errno set, if this operation is one that fails. */
static int fails(const char *what, const char *path) {
  if (!below(path)) return 0;
  wait_a_while();
  if ((strcmp(what, "read") == 0) != (number("FAULTY_READS") != 0)) return 0;
  long every = number("FAULTY_EVERY"), count = atomic_fetch_add(&done, 1);
  if (every == 0 || count < number("FAULTY_AFTER") || count % every != every - 1)
    return 0;
  const char *log = getenv("FAULTY_LOG");
  FILE *file = log ? fopen(log, "a") : NULL;
  if (file) {
    fprintf(file, "%s %s\n", what, path);
    fclose(file);
  }
  errno = EIO;
  return 1;
}

static int fd_fails(const char *what, int fd) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return fails(what, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                        \
  int name(const char *path, int flags, ...) {                           \
    va_list rest;                                                        \
    va_start(rest, flags);                                               \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                        \
    if ((flags & O_CREAT) && fails("open", path)) return -1;             \
    if (!(flags & O_CREAT) && below(path)) wait_a_while();               \
    return REAL(name)(path, flags, mode);                                \
  }
OPEN(open)
OPEN(open64)

ssize_t read(int fd, void *bytes, size_t size) {
  return fd_fails("read", fd) ? -1 : REAL(read)(fd, bytes, size);
}
ssize_t pread(int fd, void *bytes, size_t size, off_t at) {
  return fd_fails("read", fd) ? -1 : REAL(pread)(fd, bytes, size, at);
}
ssize_t pread64(int fd, void *bytes, size_t size, off64_t at) {
  return fd_fails("read", fd) ? -1 : REAL(pread64)(fd, bytes, size, at);
}

ssize_t write(int fd, const void *bytes, size_t size) {
  return fd_fails("write", fd) ? -1 : REAL(write)(fd, bytes, size);
}
ssize_t pwrite(int fd, const void *bytes, size_t size, off_t at) {
  return fd_fails("write", fd) ? -1 : REAL(pwrite)(fd, bytes, size, at);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
  return fd_fails("write", fd) ? -1 : REAL(writev)(fd, parts, count);
}
int fsync(int fd) { return fd_fails("fsync", fd) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return fd_fails("fsync", fd) ? -1 : REAL(fdatasync)(fd); }
int rename(const char *from, const char *to) {
  return fails("rename", to) ? -1 : REAL(rename)(from, to);
}
int unlink(const char *path) {
  return fails("delete", path) ? -1 : REAL(unlink)(path);
}
int rmdir(const char *path) {
  return fails("delete", path) ? -1 : REAL(rmdir)(path);
}
int unlinkat(int dir, const char *name, int flags) {
  const char *path = name; /* below a folder that is open: that folder's */
  return (name[0] == '/' || dir == AT_FDCWD ? fails("delete", path)
                                            : fd_fails("delete", dir))
             ? -1
             : REAL(unlinkat)(dir, name, flags);
}
int mkdir(const char *path, mode_t mode) {
  return fails("mkdir", path) ? -1 : REAL(mkdir)(path, mode);
}
