// Every thread of a block is a thread of the CPU, for ThreadSanitizer: barriers and collectives
// order exactly those threads that they order on a GPU, so that a race there is one here.
#include <pthread.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "launch_state.h"

namespace cuda_on_cpu {
namespace {

thread_local Thread me;
thread_local bool inside = false;

struct LockedWarp {
  std::mutex mutex;
  std::condition_variable arrived;
  Warp lanes;
};

pthread_barrier_t everybody;
LockedWarp warps[kMaxThreads / kWarp];

}  // namespace

const Thread& self() { return me; }

// The fibers find what is wrong and can go on afterwards; here a wrong kernel ends the process.
void fail(const std::string& sentence) {
  fprintf(stderr, "%s\n", where(sentence, inside ? &me : nullptr).c_str());
  abort();
}

void sync_block(Site) { pthread_barrier_wait(&everybody); }

void sync_lanes(Collective& c) {
  LockedWarp& warp = warps[me.index / kWarp];
  const unsigned left = threads_of_block() - me.index / kWarp * kWarp;
  std::string wrong;
  std::unique_lock<std::mutex> lock(warp.mutex);
  if (warp.lanes.arrive(lane(), std::min(left, kWarp), c, wrong)) {
    warp.arrived.notify_all();
    return;
  }
  if (!wrong.empty()) {
    fail(wrong);
  }
  warp.arrived.wait(lock, [&] { return c.done; });
}

void read_only(const void*, size_t) {}

std::string run_blocks(const std::function<void()>& body) {
  const unsigned threads = threads_of_block();
  pthread_barrier_init(&everybody, nullptr, threads);
  std::vector<std::thread> running;
  for (unsigned i = 0; i < threads; ++i) {
    running.emplace_back([i, &body] {
      inside = true;
      for_each_block([&](uint3 index) {
        me = thread_of(i, index);
        if (i == 0) {
          start_block();
        }
        pthread_barrier_wait(&everybody);
        body();
        pthread_barrier_wait(&everybody);
        return true;
      });
    });
  }
  for (std::thread& thread : running) {
    thread.join();
  }
  pthread_barrier_destroy(&everybody);
  const char* overrun = end_block();
  return overrun == nullptr ? std::string() : where(overrun, nullptr);
}

}  // namespace cuda_on_cpu
