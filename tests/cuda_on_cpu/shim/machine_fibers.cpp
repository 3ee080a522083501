// Every thread of a block is a fiber; they run one after the other, each up to where it has to wait
// for others. Whatever a thread does wrong ends the launch with a sentence.
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <memory>
#include <vector>

#include "launch_state.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {
namespace {

enum class State { kReady, kAtBarrier, kInWarp, kReturned };

constexpr size_t kStack = 256 << 10;

struct Fiber {
  ucontext_t context;
  Thread thread;
  State state;
  Site barrier;
  Collective* collective;
  char* stack;
};

// What the read-only cache gave.
struct Read {
  const unsigned char* at;
  unsigned char bytes[16];
  unsigned char size;
};

ucontext_t home;
std::vector<std::unique_ptr<Fiber>> fibers;
Warp warps[kMaxThreads / kWarp];
Fiber* current = nullptr;
const std::function<void()>* kernel = nullptr;
std::string failure;
std::vector<Read> reads;

#if defined(__SANITIZE_ADDRESS__)
const void* home_stack = nullptr;
size_t home_size = 0;
void* home_fake = nullptr;
#endif

void enter(Fiber& fiber) {
  current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&home_fake, fiber.stack, kStack);
#endif
  swapcontext(&home, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(home_fake, nullptr, nullptr);
#endif
  current = nullptr;
}

void leave(State state) {
  Fiber& fiber = *current;
  fiber.state = state;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, home_stack, home_size);
#endif
  swapcontext(&fiber.context, &home);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &home_stack, &home_size);
#endif
}

// A fiber never ends: it runs the kernel's threads of its index, block after block.
void live() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &home_stack, &home_size);
#endif
  for (;;) {
    (*kernel)();
    leave(State::kReturned);
  }
}

std::unique_ptr<Fiber> new_fiber() {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  auto* memory = static_cast<char*>(mmap(nullptr, page + kStack, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    throw std::runtime_error("no memory for the stack of a thread");
  }
  auto fiber = std::make_unique<Fiber>();
  fiber->stack = memory + page;
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack;
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, live, 0);
  return fiber;
}

void drop_fibers() {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (const auto& fiber : fibers) {
    munmap(fiber->stack - page, page + kStack);
  }
  fibers.clear();
  for (Warp& warp : warps) {
    warp = {};
  }
}

void on_bad_address(int, siginfo_t* info, void*) {
  if (current == nullptr) {
    signal(SIGSEGV, SIG_DFL);
    return;
  }
  fail("illegal memory access at " + hexadecimal(reinterpret_cast<uintptr_t>(info->si_addr)));
}

// Turns an access outside of every tensor into a failure while a kernel runs.
class Watch {
 public:
  Watch() {
    struct sigaction action = {};
    action.sa_sigaction = on_bad_address;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, &segv_);
    sigaction(SIGBUS, &action, &bus_);
  }
  ~Watch() {
    sigaction(SIGSEGV, &segv_, nullptr);
    sigaction(SIGBUS, &bus_, nullptr);
  }

 private:
  struct sigaction segv_ = {}, bus_ = {};
};

void run_warp(unsigned first, unsigned threads) {
  const unsigned end = first + kWarp < threads ? first + kWarp : threads;
  for (bool moved = true; moved && failure.empty();) {
    moved = false;
    for (unsigned i = first; i < end && failure.empty(); ++i) {
      Fiber& fiber = *fibers[reversed ? end - 1 - (i - first) : i];
      if (fiber.state == State::kInWarp && fiber.collective->done) {
        fiber.state = State::kReady;
      }
      if (fiber.state == State::kReady) {
        enter(fiber);
        moved = true;
      }
    }
  }
}

// Nobody can go on: either all wait at one barrier, or somebody waits in vain.
void pass_barrier(unsigned threads) {
  const Fiber *at_barrier = nullptr, *returned = nullptr;
  for (unsigned i = 0; i < threads; ++i) {
    const Fiber& fiber = *fibers[i];
    if (fiber.state == State::kInWarp) {
      const Collective& c = *fiber.collective;
      failure = where(std::string(c.name) + " at " + text(c.site) + " with mask " +
                          hexadecimal(c.mask) + " waits for lanes that do not come there",
                      &fiber.thread);
      return;
    }
    if (fiber.state == State::kReturned) {
      returned = &fiber;
    } else if (at_barrier != nullptr && !(at_barrier->barrier == fiber.barrier)) {
      failure = where("__syncthreads in divergent code: threads wait at " +
                          text(at_barrier->barrier) + " and at " + text(fiber.barrier),
                      &fiber.thread);
      return;
    } else {
      at_barrier = &fiber;
    }
  }
  if (at_barrier != nullptr && returned != nullptr) {
    failure = where("__syncthreads at " + text(at_barrier->barrier) +
                        " in divergent code: a thread has returned before it",
                    &returned->thread);
    return;
  }
  for (unsigned i = 0; at_barrier != nullptr && i < threads; ++i) {
    fibers[i]->state = State::kReady;
  }
}

bool all_returned(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) {
    if (fibers[i]->state != State::kReturned) {
      return false;
    }
  }
  return true;
}

bool run_block(uint3 index, unsigned threads) {
  start_block();
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i]->thread = thread_of(i, index);
    fibers[i]->state = State::kReady;
  }
  const unsigned last = (threads - 1) / kWarp * kWarp;
  while (failure.empty()) {
    for (unsigned w = 0; w <= last && failure.empty(); w += kWarp) {
      run_warp(reversed ? last - w : w, threads);
    }
    if (failure.empty()) {
      if (all_returned(threads)) {
        break;
      }
      pass_barrier(threads);
    }
  }
  const char* overrun = end_block();
  if (failure.empty() && overrun != nullptr) {
    failure = where(overrun, &fibers[0]->thread);
  }
  return failure.empty();
}

void check_reads() {
  for (const Read& read : reads) {
    if (memcmp(read.at, read.bytes, read.size) != 0) {
      failure = where("memory at " + hexadecimal(reinterpret_cast<uintptr_t>(read.at)) +
                          " was read through __ldg and written by the same kernel",
                      nullptr);
      return;
    }
  }
}

}  // namespace

const Thread& self() { return current->thread; }

void fail(const std::string& sentence) {
  if (current == nullptr) {
    throw std::runtime_error(sentence);
  }
  failure = where(sentence, &current->thread);
  leave(State::kReturned);
  __builtin_unreachable();
}

void sync_block(Site site) {
  current->barrier = site;
  leave(State::kAtBarrier);
}

void sync_lanes(Collective& c) {
  const unsigned first = current->thread.index / kWarp * kWarp;
  const unsigned left = threads_of_block() - first;
  std::string wrong;
  current->collective = &c;
  if (!warps[first / kWarp].arrive(lane(), left < kWarp ? left : kWarp, c, wrong)) {
    if (!wrong.empty()) {
      fail(wrong);
    }
    leave(State::kInWarp);
  }
}

void read_only(const void* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += sizeof(Read::bytes)) {
    Read read = {static_cast<const unsigned char*>(p) + i, {}, 0};
    read.size =
        static_cast<unsigned char>(bytes - i < sizeof read.bytes ? bytes - i : sizeof read.bytes);
    memcpy(read.bytes, read.at, read.size);
    reads.push_back(read);
  }
}

std::string run_blocks(const std::function<void()>& body) {
  const unsigned threads = threads_of_block();
  while (fibers.size() < threads) {
    fibers.push_back(new_fiber());
  }
  kernel = &body;
  failure.clear();
  reads.clear();
  {
    const Watch watch;
    for_each_block([&](uint3 index) { return run_block(index, threads); });
  }
  if (failure.empty()) {
    check_reads();
  } else {
    drop_fibers();  // they hang in the middle of the kernel
  }
  kernel = nullptr;
  return failure;
}

}  // namespace cuda_on_cpu

#if !defined(CUDA_ON_CPU_SANITIZED)
// The compiler checks the alignment of every access and asks for this where one is wrong.
extern "C" __attribute__((visibility("default"))) void __ubsan_handle_type_mismatch_v1_abort(
    void* data, void* pointer) {
  struct Report {
    const char* file;
    unsigned line, column;
    const void* type;
    unsigned char log_alignment, kind;
  };
  const auto& report = *static_cast<const Report*>(data);
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const size_t alignment = size_t{1} << report.log_alignment;
  const std::string at =
      cuda_on_cpu::text(cuda_on_cpu::Site{report.file, static_cast<int>(report.line)});
  cuda_on_cpu::fail((address % alignment
                         ? "misaligned access of " + std::to_string(alignment) + " bytes"
                         : std::string("illegal access")) +
                    " at address " + cuda_on_cpu::hexadecimal(address) + ", " + at);
}
#endif
