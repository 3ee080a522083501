#include "parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <thread>
#include <vector>

namespace afd {
namespace {

struct Work {
  const std::function<void(int64_t)>& piece;
  int64_t count;
  std::atomic<int64_t> next{0};
};

void drain(void* data) {
  Work& work = *static_cast<Work*>(data);
  for (int64_t i = work.next++; i < work.count; i = work.next++) {
    work.piece(i);
  }
}

// The entry point of the OpenMP runtime (GCC's, and LLVM's under the same name) that is already in
// the process: with PyTorch loaded this is PyTorch's own pool, whose idle threads spin for a while
// and would fight with a second pool. Looked up rather than linked: no runtime, no dependency.
using RunOnPool = void (*)(void (*)(void*), void*, unsigned, unsigned);

RunOnPool openmp_pool() {
  static const RunOnPool run = reinterpret_cast<RunOnPool>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return run;
}

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& piece) {
  Work work{piece, count};
  const int64_t wanted = threads < count ? threads : count;
  if (wanted <= 1) {
    drain(&work);
    return;
  }
  if (const RunOnPool run = openmp_pool()) {
    run(drain, &work, static_cast<unsigned>(wanted), 0);
    return;
  }
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < wanted; ++i) {
    helpers.emplace_back(drain, &work);
  }
  drain(&work);
  for (std::thread& helper : helpers) {
    helper.join();
  }
}

}  // namespace afd
