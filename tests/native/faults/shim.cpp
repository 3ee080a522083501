// Preloaded into Python: makes chosen allocations and thread starts of the compiled core fail, and
// nobody else's. Built with g++ -shared -fPIC by test_faults.py.
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <new>

namespace {

std::atomic<long> allocations_left{-1};
std::atomic<bool> persistent{false};
std::atomic<bool> threads_refused{false};
std::atomic<long> met{0};

bool is_core(void* caller) {
  Dl_info info;
  return dladdr(caller, &info) != 0 && info.dli_fname != nullptr &&
         strstr(info.dli_fname, "_native") != nullptr;
}

bool fails(void* caller) {
  if (allocations_left.load() < 0 || !is_core(caller)) {
    return false;
  }
  const long left = allocations_left.load();
  if (left > 0) {
    --allocations_left;
    return false;
  }
  if (!persistent.load()) {
    allocations_left = -1;
  }
  ++met;
  return true;
}

void* allocate(size_t size, void* caller) {
  return fails(caller) ? nullptr : malloc(size == 0 ? 1 : size);
}

void* allocate_or_throw(size_t size, void* caller) {
  void* const p = allocate(size, caller);
  if (p == nullptr) {
    throw std::bad_alloc();
  }
  return p;
}

template <class Function>
Function next(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

}  // namespace

#define CALLER __builtin_return_address(0)

void* operator new(size_t size) { return allocate_or_throw(size, CALLER); }
void* operator new[](size_t size) { return allocate_or_throw(size, CALLER); }
void* operator new(size_t size, const std::nothrow_t&) noexcept { return allocate(size, CALLER); }
void* operator new[](size_t size, const std::nothrow_t&) noexcept { return allocate(size, CALLER); }
void operator delete(void* p) noexcept { free(p); }
void operator delete[](void* p) noexcept { free(p); }
void operator delete(void* p, size_t) noexcept { free(p); }
void operator delete[](void* p, size_t) noexcept { free(p); }

extern "C" {

// The n-th allocation from now fails, and all after it where `all`; n < 0: none.
void shim_fail(long n, int all) {
  met = 0;
  persistent = all != 0;
  allocations_left = n;
}

// How many have failed since.
long shim_met() { return met; }

void shim_refuse_threads(int refused) { threads_refused = refused != 0; }

void* aligned_alloc(size_t alignment, size_t size) {
  static const auto real = next<void* (*)(size_t, size_t)>("aligned_alloc");
  if (fails(CALLER)) {
    errno = ENOMEM;
    return nullptr;
  }
  return real(alignment, size);
}

int posix_memalign(void** out, size_t alignment, size_t size) {
  static const auto real = next<int (*)(void**, size_t, size_t)>("posix_memalign");
  return fails(CALLER) ? ENOMEM : real(out, alignment, size);
}

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*entry)(void*),
                   void* argument) {
  using Create = int (*)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static const auto real = next<Create>("pthread_create");
  const bool refused = threads_refused.load() && is_core(CALLER);
  return refused ? EAGAIN : real(thread, attributes, entry, argument);
}
}
