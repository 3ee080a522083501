#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace afd {
namespace {

struct Job {
  const std::function<void(int64_t)>& piece;
  const int64_t count;
  int64_t helpers_wanted;
  std::atomic<int64_t> next{0};
  std::atomic<int> helping{0};

  void drain() {
    for (int64_t i = next++; i < count; i = next++) {
      piece(i);
    }
  }
};

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

// A pool of its own rather than OpenMP's: there the caller waits for every thread of the team, even
// for one that was not scheduled in time to do anything, which costs whole time slices on a busy
// machine. Here it waits only for helpers that have begun, and does the work of the others itself.
class Pool {
 public:
  void run(Job& job) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int64_t>(threads_) < job.helpers_wanted) {
        std::thread(&Pool::help, this).detach();
        ++threads_;
      }
      open_.push_back(&job);
      ++posted_;
    }
    work_.notify_all();
    job.drain();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      open_.erase(std::find(open_.begin(), open_.end(), &job));
    }
    // The last pieces are short; a helper that lost its core in one is worth a yield.
    for (int i = 0; job.helping.load(std::memory_order_acquire) > 0; ++i) {
      i < kSpins ? pause() : std::this_thread::yield();
    }
  }

 private:
  static constexpr int kSpins = 2000;

  // The first open job that wants one more helper; the caller holds the mutex.
  Job* take() {
    for (Job* job : open_) {
      if (job->helpers_wanted > 0) {
        --job->helpers_wanted;
        ++job->helping;
        return job;
      }
    }
    return nullptr;
  }

  void help() {
    for (;;) {
      Job* job = nullptr;
      // An op posts several jobs in a row: look around for some microseconds before going to sleep.
      const uint64_t seen = posted_.load();
      {
        std::unique_lock<std::mutex> lock(mutex_);
        job = take();
      }
      for (int i = 0; job == nullptr && i < kSpins && posted_.load() == seen; ++i) {
        pause();
      }
      if (job == nullptr) {
        std::unique_lock<std::mutex> lock(mutex_);
        work_.wait(lock, [&] { return (job = take()) != nullptr; });
      }
      job->drain();
      job->helping.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex mutex_;
  std::condition_variable work_;
  std::vector<Job*> open_;
  std::atomic<uint64_t> posted_{0};
  size_t threads_ = 0;
};

// Never destroyed: its threads may outlive static destructors. A forked child has none of the
// threads and perhaps a locked mutex, so it starts with a new pool.
std::atomic<Pool*> pool{nullptr};

Pool& current_pool() {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr, std::memory_order_relaxed); });
  (void)registered;
  Pool* existing = pool.load();
  if (existing == nullptr) {
    Pool* fresh = new Pool;
    if (pool.compare_exchange_strong(existing, fresh)) {
      return *fresh;
    }
    delete fresh;
  }
  return *existing;
}

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& piece) {
  Job job{piece, count, std::min<int64_t>(threads, count) - 1};
  if (job.helpers_wanted <= 0) {
    job.drain();
    return;
  }
  current_pool().run(job);
}

}  // namespace afd
