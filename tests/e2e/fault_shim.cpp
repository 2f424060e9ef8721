// Lets the k-th call fail that touches a file below some folders: open, write, fsync, rename, link, mkdir, unlink.
// Preloaded (LD_PRELOAD) under a Python process by fault_table.py, which arms it in a forked child before a build.
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>

namespace {

std::atomic<long> calls{0};
long at = 0;         // which call fails; 0: none
int how = 0;         // an errno; -1: SIGKILL before the call, -2: SIGKILL after it
char roots[4][256];  // where calls count
int armed = 0;

template <class F>
F real(const char* name) {
  return reinterpret_cast<F>(dlsym(RTLD_NEXT, name));
}

bool below(const char* path) {
  for (const auto& root : roots)
    if (root[0] && !strncmp(path, root, strlen(root))) return true;
  return false;
}

bool below(int descriptor) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size <= 0) return false;
  path[size] = 0;
  return below(path);
}

// Counts a call; true if it is to fail now.
bool hit(bool counts) { return armed && counts && ++calls == at; }

template <class R, class Call>
R run(bool counts, Call call) {
  if (!hit(counts)) return call();
  if (how == -1) raise(SIGKILL);
  if (how == -2) {
    call();
    raise(SIGKILL);
  }
  errno = how;
  return R(-1);
}

}  // namespace

extern "C" {

void ingot_fault_arm(long k, int fault, const char* first, const char* second) {
  snprintf(roots[0], sizeof roots[0], "%s", first);
  snprintf(roots[1], sizeof roots[1], "%s", second);
  calls = 0, at = k, how = fault, armed = 1;
}

long ingot_fault_calls() { return calls; }

#define OPEN(NAME)                                                                          \
  int NAME(const char* path, int flags, ...) {                                              \
    va_list list;                                                                           \
    va_start(list, flags);                                                                  \
    mode_t mode = va_arg(list, mode_t);                                                     \
    va_end(list);                                                                           \
    auto next = real<int (*)(const char*, int, ...)>(#NAME);                                \
    return run<int>(armed && below(path), [&] { return next(path, flags, mode); });         \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(NAME)                                                                        \
  int NAME(int folder, const char* path, int flags, ...) {                                  \
    va_list list;                                                                           \
    va_start(list, flags);                                                                  \
    mode_t mode = va_arg(list, mode_t);                                                     \
    va_end(list);                                                                           \
    auto next = real<int (*)(int, const char*, int, ...)>(#NAME);                           \
    return run<int>(armed && below(path), [&] { return next(folder, path, flags, mode); }); \
  }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int descriptor, const void* data, size_t size) {
  auto next = real<ssize_t (*)(int, const void*, size_t)>("write");
  return run<ssize_t>(armed && below(descriptor), [&] { return next(descriptor, data, size); });
}

int fsync(int descriptor) {
  auto next = real<int (*)(int)>("fsync");
  return run<int>(armed && below(descriptor), [&] { return next(descriptor); });
}

#define ONE(NAME)                                                          \
  int NAME(const char* path) {                                             \
    auto next = real<int (*)(const char*)>(#NAME);                         \
    return run<int>(armed && below(path), [&] { return next(path); });     \
  }
ONE(unlink)
ONE(rmdir)

#define TWO(NAME)                                                                         \
  int NAME(const char* from, const char* to) {                                            \
    auto next = real<int (*)(const char*, const char*)>(#NAME);                           \
    return run<int>(armed && (below(from) || below(to)), [&] { return next(from, to); }); \
  }
TWO(rename)
TWO(link)

int linkat(int first, const char* from, int second, const char* to, int flags) {
  auto next = real<int (*)(int, const char*, int, const char*, int)>("linkat");
  return run<int>(armed && (below(from) || below(to)), [&] { return next(first, from, second, to, flags); });
}

int renameat2(int first, const char* from, int second, const char* to, unsigned flags) {
  auto next = real<int (*)(int, const char*, int, const char*, unsigned)>("renameat2");
  return run<int>(armed && (below(from) || below(to)), [&] { return next(first, from, second, to, flags); });
}

int mkdir(const char* path, mode_t mode) {
  auto next = real<int (*)(const char*, mode_t)>("mkdir");
  return run<int>(armed && below(path), [&] { return next(path, mode); });
}
}
