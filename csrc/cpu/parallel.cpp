#include "parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>

namespace afd {
namespace {

struct Job {
  const void* const body;
  const Piece piece;
  const int64_t count;
  int64_t helpers_wanted;
  int helpers = 0;
  Job* following = nullptr;
  std::atomic<int64_t> next{0};
  std::atomic<int> helping{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};

  // Nothing may leave: above a helper there is nobody to catch it, and the caller has to wait for
  // the helpers before the job's memory goes.
  void drain(int worker) noexcept {
    try {
      for (int64_t i = next++; i < count; i = next++) {
        piece(body, i, worker);
      }
    } catch (...) {
      next = count;
      if (!failed.exchange(true)) {
        error = std::current_exception();
      }
    }
  }
};

void yield() { (void)sched_yield(); }

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  yield();
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
      while (threads_ < job.helpers_wanted && start_helper()) {
        ++threads_;
      }
      Job** end = &open_;
      while (*end != nullptr) {
        end = &(*end)->following;
      }
      *end = &job;
      ++posted_;
    }
    work_.notify_all();
    job.drain(0);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      Job** at = &open_;
      while (*at != &job) {
        at = &(*at)->following;
      }
      *at = job.following;
    }
    // The last pieces are short; a helper that lost its core in one is worth a yield.
    for (int i = 0; job.helping.load(std::memory_order_acquire) > 0; ++i) {
      i < kSpins ? pause() : yield();
    }
  }

 private:
  static constexpr int kSpins = 2000;

  // Whether a thread more could be started. pthread_create and not std::thread, which allocates and
  // throws.
  bool start_helper() {
    pthread_t thread;
    const auto entry = [](void* pool) -> void* {
      static_cast<Pool*>(pool)->help();
      return nullptr;
    };
    if (pthread_create(&thread, nullptr, entry, this) != 0) {
      return false;
    }
    pthread_detach(thread);
    return true;
  }

  // The first open job that wants one more helper, which becomes its `worker`; the caller holds the
  // mutex.
  Job* take(int& worker) {
    for (Job* job = open_; job != nullptr; job = job->following) {
      if (job->helpers_wanted > 0) {
        --job->helpers_wanted;
        worker = ++job->helpers;
        ++job->helping;
        return job;
      }
    }
    return nullptr;
  }

  void help() {
    for (;;) {
      Job* job = nullptr;
      int worker = 0;
      // An op posts several jobs in a row: look around for some microseconds before going to sleep.
      const uint64_t seen = posted_.load();
      {
        std::unique_lock<std::mutex> lock(mutex_);
        job = take(worker);
      }
      for (int i = 0; job == nullptr && i < kSpins && posted_.load() == seen; ++i) {
        pause();
      }
      if (job == nullptr) {
        std::unique_lock<std::mutex> lock(mutex_);
        work_.wait(lock, [&] { return (job = take(worker)) != nullptr; });
      }
      job->drain(worker);
      job->helping.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex mutex_;
  std::condition_variable work_;
  // Linked through the jobs themselves: a list that allocates could fail with a job half entered.
  Job* open_ = nullptr;
  std::atomic<uint64_t> posted_{0};
  int64_t threads_ = 0;
};

// Never destroyed: its threads may outlive static destructors. A forked child has none of the
// threads and perhaps a locked mutex, so it starts with a new pool.
std::atomic<Pool*> pool{nullptr};

// Null where there is no memory for one, or none to hear of forks.
Pool* current_pool() {
  Pool* existing = pool.load();
  if (existing != nullptr) {
    return existing;
  }
  // Registered twice by two threads at once it does no harm.
  static std::atomic<bool> hears_forks{false};
  if (!hears_forks.load()) {
    const auto forget = [] { pool.store(nullptr, std::memory_order_relaxed); };
    if (pthread_atfork(nullptr, nullptr, forget) != 0) {
      return nullptr;
    }
    hears_forks.store(true);
  }
  Pool* const fresh = new (std::nothrow) Pool;
  if (fresh == nullptr || pool.compare_exchange_strong(existing, fresh)) {
    return fresh;
  }
  delete fresh;
  return existing;
}

}  // namespace

void run_pieces(int64_t count, int threads, const void* body, Piece piece) {
  const int64_t helpers = std::min<int64_t>(threads, count) - 1;
  Pool* const helped_by = helpers > 0 ? current_pool() : nullptr;
  if (helped_by == nullptr) {
    for (int64_t i = 0; i < count; ++i) {
      piece(body, i, 0);
    }
    return;
  }
  Job job{body, piece, count, helpers};
  helped_by->run(job);
  if (job.error != nullptr) {
    std::rethrow_exception(job.error);
  }
}

}  // namespace afd
