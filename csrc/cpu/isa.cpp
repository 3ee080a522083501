#include "isa.h"

#include <string.h>

#include <atomic>

namespace afd {
namespace {

struct Choices {
  CpuKernels kernels[3];
  int count = 0;

  Choices() {
    kernels[count++] = baseline::kernels();
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          __builtin_cpu_supports("f16c");
    if (has_avx2) {
      kernels[count++] = avx2::kernels();
    }
    if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      kernels[count++] = avx512::kernels();
    }
#endif
  }
};

const Choices& choices() {
  static const Choices all;
  return all;
}

// Index into the choices, or -1 for the widest. Read by every op, written by tests only.
std::atomic<int> forced{-1};

}  // namespace

const CpuKernels& cpu_kernels() {
  const int index = forced.load(std::memory_order_relaxed);
  return choices().kernels[index < 0 ? choices().count - 1 : index];
}

int supported_isas(const char* names[3]) {
  for (int i = 0; i < choices().count; ++i) {
    names[i] = choices().kernels[i].name;
  }
  return choices().count;
}

bool use_isa(const char* name) {
  if (name[0] == '\0') {
    forced = -1;
    return true;
  }
  for (int i = 0; i < choices().count; ++i) {
    if (strcmp(choices().kernels[i].name, name) == 0) {
      forced = i;
      return true;
    }
  }
  return false;
}

}  // namespace afd
