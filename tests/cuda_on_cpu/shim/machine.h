// The device: what a thread of a kernel may ask of it. machine_fibers.cpp runs the threads of a
// block one after the other and checks what they do; machine_threads.cpp runs them at the same
// time, for ThreadSanitizer. Both share launch.cpp.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <string>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kFullMask = 0xFFFFFFFFu;

struct Thread {
  uint3 thread, block;
  unsigned index;  // in its block
};

// A line of a kernel's source.
struct Site {
  const char* file;
  int line;
  bool operator==(const Site& other) const {
    return line == other.line && strcmp(file, other.file) == 0;
  }
};

// What the lanes of `mask` do together. Every one of them gives a value and gets all of them.
struct Collective {
  const char* name;
  Site site;
  unsigned mask;
  uint64_t given;
  uint64_t values[kWarp] = {};
  bool done = false;
};

extern dim3 grid, block;
const Thread& self();

// Ends the launch: it throws std::runtime_error with the kernel, the thread and this sentence.
[[noreturn]] void fail(const std::string& sentence);
std::string hexadecimal(uint64_t value);

void sync_block(Site site);
void sync_lanes(Collective& collective);

// One variable in shared memory, its content undefined when a block starts.
int declare_shared(size_t bytes, size_t alignment);
void* shared_memory(int id);
void* dynamic_shared_memory(size_t alignment);

// A kernel may read through the read-only cache only what nobody writes while it runs.
void read_only(const void* p, size_t bytes);

// Whether the numbered fault is switched on: see tests/cuda_on_cpu/faults.py.
bool planted(int fault);

struct Config {
  dim3 grid, block;
  size_t shared = 0;
  void* stream = nullptr;
  Config(dim3 g, dim3 b, size_t bytes = 0, void* s = nullptr)
      : grid(g), block(b), shared(bytes), stream(s) {}
};

void run(const char* kernel, const Config& config, const std::function<void()>& body);
// The kernel's __launch_bounds__.
void check_bounds(unsigned threads);

inline unsigned lane() { return self().index % kWarp; }

inline void check_aligned(const void* p, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) {
    fail("misaligned address " + hexadecimal(reinterpret_cast<uintptr_t>(p)) + " of " +
         std::to_string(alignment) + " bytes");
  }
}

template <class T, class Tag>
T& shared(Tag) {
  static const int id = declare_shared(sizeof(T), alignof(T));
  return *static_cast<T*>(shared_memory(id));
}

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(dynamic_shared_memory(alignof(T)));
}

}  // namespace cuda_on_cpu
