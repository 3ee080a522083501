// Every native op under injected failures, without Python, so that sanitizers see the whole of it.
//
// Linked with --wrap=aligned_alloc,--wrap=pthread_create and one instruction set. For each op, the
// n-th allocation fails for n = 0, 1, 2, ... until the op gets by: each failure has to arrive as
// std::bad_alloc, and the op has to run right afterwards, with the same bits, many times.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../../../csrc/cpu/isa.h"
#include "../../../csrc/cpu/launch.h"
#include "../../../csrc/cpu/parallel.h"

namespace {

std::atomic<long> allocations_left{-1};
std::atomic<int> threads_refused{0};

bool fails() { return allocations_left.load() >= 0 && allocations_left-- == 0; }

void* allocate(size_t size) { return fails() ? nullptr : malloc(size == 0 ? 1 : size); }

void* allocate_or_throw(size_t size) {
  void* const p = allocate(size);
  if (p == nullptr) {
    throw std::bad_alloc();
  }
  return p;
}

void require(bool ok, const char* what) {
  if (!ok) {
    fprintf(stderr, "failed: %s\n", what);
    abort();
  }
}

}  // namespace

void* operator new(size_t size) { return allocate_or_throw(size); }
void* operator new[](size_t size) { return allocate_or_throw(size); }
void* operator new(size_t size, const std::nothrow_t&) noexcept { return allocate(size); }
void* operator new[](size_t size, const std::nothrow_t&) noexcept { return allocate(size); }
void operator delete(void* p) noexcept { free(p); }
void operator delete[](void* p) noexcept { free(p); }
void operator delete(void* p, size_t) noexcept { free(p); }
void operator delete[](void* p, size_t) noexcept { free(p); }

extern "C" {
void* __real_aligned_alloc(size_t alignment, size_t size);
int __real_pthread_create(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);

void* __wrap_aligned_alloc(size_t alignment, size_t size) {
  return fails() ? nullptr : __real_aligned_alloc(alignment, size);
}

int __wrap_pthread_create(pthread_t* thread, const pthread_attr_t* attributes,
                          void* (*entry)(void*), void* argument) {
  if (threads_refused.load() > 0) {
    --threads_refused;
    return EAGAIN;
  }
  return __real_pthread_create(thread, attributes, entry, argument);
}
}

namespace afd {
const CpuKernels& cpu_kernels() {
  static const CpuKernels only = baseline::kernels();
  return only;
}
}  // namespace afd

namespace {

constexpr int kThreads = 4;
constexpr int64_t kBatch = 2, kFrames = 3, kTokens = 96, kHeads = 4, kHeadDim = 17 * 2;
constexpr int64_t kChannels = kHeads * kHeadDim, kSlots = 2 * kTokens;

std::vector<float> numbers(int64_t count) {
  std::vector<float> x(static_cast<size_t>(count));
  uint32_t state = 1;
  for (float& value : x) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(state >> 8) * 0x1p-23f - 1.0f;
  }
  return x;
}

// Inputs that several ops read, and one op's results.
struct Data {
  std::vector<float> in = numbers(kBatch * kTokens * kChannels);
  std::vector<float> weight = numbers(kBatch * kTokens * kChannels);
  std::vector<float> rope = numbers(kTokens * kHeadDim);
  std::vector<float> out[5];
  std::vector<double> metrics = std::vector<double>(64);
  std::vector<int64_t> seed = {1, 2}, position = {0, 3};
  std::vector<float> t = {0.25f, 0.75f};
  float loss = 0.0f;

  Data() {
    for (auto& x : out) {
      x.assign(static_cast<size_t>(kBatch * kSlots * kChannels), 0.0f);
    }
  }
};

using Op = std::function<void(Data&)>;

afd::Rows sample_rows() { return {kBatch, kTokens, kFrames, kChannels / 4, 1}; }

void noise(Data& d, bool backward) {
  afd::NoiseProblem p{};
  p.rows = sample_rows();
  p.x0 = d.in.data();
  p.t = d.t.data();
  p.seed = d.seed.data();
  p.x_t = d.out[0].data();
  (backward ? afd::cpu::launch_forward_noise_bwd : afd::cpu::launch_forward_noise)(p, kThreads);
}

void nft(Data& d, bool velocity) {
  afd::NftProblem p{};
  p.rows = sample_rows();
  p.r_chunks = p.groups = 1;
  p.nft_beta = p.scale = p.slope = 1.0;
  p.adaptive = !velocity;
  p.v_theta = d.in.data();
  p.v_old = p.x0 = d.weight.data();
  p.t = p.r = d.t.data();
  p.seed = d.seed.data();
  p.loss = &d.loss;
  p.metrics = d.metrics.data();
  p.grad = d.out[0].data();
  afd::cpu::launch_nft_loss(p, kThreads);
}

afd::TokenRows token_rows(const std::vector<float>& x) {
  return {x.data(), kTokens * kChannels, kChannels};
}

enum class Mode { kForward, kAppend, kBackward };

void qk(Data& d, Mode mode) {
  afd::QkNormRopeProblem p{};
  p.batch = kBatch, p.tokens = kTokens, p.heads = kHeads, p.head_dim = kHeadDim;
  p.eps = 1e-6;
  p.q = token_rows(d.in);
  p.k = p.v = p.grad_q = p.grad_k = token_rows(d.weight);
  p.weight_q = p.weight_k = d.weight.data();
  p.rope = d.rope.data();
  p.position = d.position.data();
  p.positions = 2, p.slots = kSlots, p.tokens_per_frame = kTokens / 4, p.sink_frames = 1;
  p.q_out = p.dq = d.out[0].data();
  if (mode == Mode::kBackward) {
    p.dk = d.out[1].data();
    p.dweight_q = d.out[2].data();
    p.dweight_k = d.out[3].data();
    afd::cpu::launch_qk_norm_rope_bwd(p, kThreads);
    return;
  }
  p.k_out = mode == Mode::kForward ? d.out[1].data() : nullptr;
  p.k_cache = d.out[2].data();
  p.v_cache = d.out[3].data();
  afd::cpu::launch_qk_norm_rope(p, kThreads);
}

void adaln(Data& d, bool backward) {
  afd::AdalnProblem p{};
  p.batch = kBatch, p.tokens = kTokens, p.channels = kChannels;
  p.eps = 1e-6;
  p.x = p.branch = p.grad_h = token_rows(d.in);
  p.gate = p.scale = p.shift = {
      d.weight.data(), afd::DType::kFloat32, kFrames * kChannels, kChannels, 1, kFrames};
  p.x_out = p.dx = d.out[0].data();
  p.h = p.dbranch = d.out[1].data();
  p.dgate = d.out[2].data();
  p.dscale = d.out[3].data();
  p.dshift = d.out[4].data();
  (backward ? afd::cpu::launch_adaln_bwd : afd::cpu::launch_adaln)(p, kThreads);
}

bool equal(const Data& a, const Data& b) {
  bool same = a.loss == b.loss && a.metrics == b.metrics;
  for (int i = 0; i < 5; ++i) {
    const size_t bytes = a.out[i].size() * sizeof(float);
    same = same && memcmp(a.out[i].data(), b.out[i].data(), bytes) == 0;
  }
  return same;
}

void check(const char* name, const Op& op) {
  Data wanted;
  op(wanted);
  long failing = 0;
  for (bool failed = true; failed; ++failing) {
    Data got;
    allocations_left = failing;
    try {
      op(got);
      failed = false;
    } catch (const std::bad_alloc&) {
    }
    allocations_left = -1;
    if (failed) {
      require(equal(got, Data()), "an op without memory writes nothing");
    }
    for (int i = 0; i < 5; ++i) {
      Data again;
      op(again);
      require(equal(again, wanted), name);
    }
  }
  printf("%s: %ld failing allocations\n", name, failing - 1);
}

void check_all() {
  check("forward_noise", [](Data& d) { noise(d, false); });
  check("forward_noise_bwd", [](Data& d) { noise(d, true); });
  check("nft_loss", [](Data& d) { nft(d, false); });
  check("nft_loss, velocity", [](Data& d) { nft(d, true); });
  check("scale", [](Data& d) {
    const int64_t count = static_cast<int64_t>(d.in.size());
    afd::cpu::launch_scale(afd::DType::kFloat32, d.in.data(), d.out[0].data(), count, 2.0f,
                           kThreads);
  });
  check("qk_norm_rope", [](Data& d) { qk(d, Mode::kForward); });
  check("qk_norm_rope_append_", [](Data& d) { qk(d, Mode::kAppend); });
  check("qk_norm_rope_bwd", [](Data& d) { qk(d, Mode::kBackward); });
  check("adaln", [](Data& d) { adaln(d, false); });
  check("adaln_bwd", [](Data& d) { adaln(d, true); });
}

// An exception in any piece, on whichever thread it runs, reaches the caller after all have left.
void check_throwing() {
  for (int64_t bad = 0; bad < 64; ++bad) {
    for (const bool everywhere : {false, true}) {
      std::atomic<int> inside{0};
      bool caught = false;
      try {
        afd::parallel_for(64, kThreads, [&](int64_t i, int) {
          ++inside;
          std::this_thread::yield();
          --inside;
          if (i == bad || everywhere) {
            throw std::runtime_error("piece");
          }
        });
      } catch (const std::runtime_error&) {
        caught = true;
      }
      require(caught && inside == 0, "the caller gets the exception when every piece has ended");
    }
    std::atomic<int64_t> sum{0};
    std::atomic<bool> busy[kThreads] = {};
    afd::parallel_for(64, kThreads, [&](int64_t i, int worker) {
      require(worker >= 0 && worker < kThreads && !busy[worker].exchange(true), "worker numbers");
      sum += i;
      busy[worker] = false;
    });
    require(sum == 64 * 63 / 2, "the pool works after an exception");
  }
}

}  // namespace

int main() {
  // Before there is a pool at all: no memory for one, then no threads, then fewer than wanted.
  allocations_left = 0;
  std::atomic<int> ran{0};
  afd::parallel_for(8, kThreads, [&](int64_t, int) { ++ran; });
  allocations_left = -1;
  threads_refused = 4;
  for (int i = 0; i < 8; ++i) {
    afd::parallel_for(8, kThreads, [&](int64_t, int) { ++ran; });
  }
  require(ran == 9 * 8, "without threads the caller does all the work");
  check_throwing();
  check_all();
#if !defined(__SANITIZE_THREAD__)
  // A child process: no thread of the parent's, and none of its own at first.
  const pid_t child = fork();
  if (child == 0) {
    threads_refused = 2;
    check_throwing();
    check_all();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  require(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child has a pool of its own");
#endif
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back(check_throwing);
  }
  for (std::thread& caller : callers) {
    caller.join();
  }
  puts("done");
  return 0;
}
