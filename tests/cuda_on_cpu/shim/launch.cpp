// What both ways of running a block share: the checks of a launch, shared memory, the runtime API.
#include <stdlib.h>

#include <mutex>
#include <vector>

#include "cuda_runtime.h"
#include "launch_state.h"

namespace cuda_on_cpu {

dim3 grid, block;
bool reversed = false;

namespace {

// Bytes after a variable in shared memory that nobody may write.
constexpr size_t kBeyond = 64;
// An undefined float is NaN.
constexpr unsigned char kUndefined = 0xFF;
constexpr size_t kStaticLimit = 48 << 10, kSharedLimit = 227 << 10;

struct Variable {
  unsigned char* at;
  size_t bytes, alignment;
};

std::mutex guard;
std::vector<Variable> variables;  // reserved: addresses stay
Variable dynamic = {nullptr, 0, 0};
size_t dynamic_limit = kStaticLimit;
cudaError_t pending = cudaSuccess, device_error = cudaSuccess;
int fault = 0;
const char* kernel_name = "no kernel";

Variable allocate(size_t bytes, size_t alignment) {
  const size_t step = alignment < 16 ? 16 : alignment;
  const size_t room = (bytes + kBeyond + step - 1) / step * step;
  auto* at = static_cast<unsigned char*>(aligned_alloc(step, room));
  memset(at, kUndefined, room);
  return {at, bytes, alignment};
}

bool valid(const Config& c) {
  const uint64_t threads = uint64_t{c.block.x} * c.block.y * c.block.z;
  return c.grid.x && c.grid.y && c.grid.z && threads && c.grid.x <= 0x7FFFFFFFu &&
         c.grid.y <= 65535 && c.grid.z <= 65535 && threads <= kMaxThreads && c.block.z <= 64 &&
         c.shared <= dynamic_limit;
}

std::string text(const uint3& v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

}  // namespace

std::string hexadecimal(uint64_t value) {
  char buffer[24];
  snprintf(buffer, sizeof buffer, "0x%llx", static_cast<unsigned long long>(value));
  return buffer;
}

std::string where(const std::string& sentence, const Thread* thread) {
  std::string all = std::string(kernel_name) + ": " + sentence;
  if (thread != nullptr) {
    all += " (thread " + text(thread->thread) + " of block " + text(thread->block) + ")";
  }
  return all;
}

bool planted(int number) { return number == fault; }

int declare_shared(size_t bytes, size_t alignment) {
  const std::lock_guard<std::mutex> lock(guard);
  if (variables.capacity() == 0) {
    variables.reserve(4096);
  }
  variables.push_back(allocate(bytes, alignment));
  return static_cast<int>(variables.size()) - 1;
}

void* shared_memory(int id) { return variables[static_cast<size_t>(id)].at; }

void* dynamic_shared_memory(size_t alignment) {
  if (dynamic.at == nullptr) {
    fail("dynamic shared memory is used, and the launch asks for none");
  }
  check_aligned(dynamic.at, alignment);
  return dynamic.at;
}

void start_block() {
  for (const Variable& v : variables) {
    memset(v.at, kUndefined, v.bytes);
  }
  if (dynamic.at != nullptr) {
    memset(dynamic.at, kUndefined, dynamic.bytes);
  }
}

const char* end_block() {
  const auto written = [](const Variable& v) {
    for (size_t i = 0; v.at != nullptr && i < kBeyond; ++i) {
      if (v.at[v.bytes + i] != kUndefined) {
        memset(v.at + v.bytes, kUndefined, kBeyond);
        return true;
      }
    }
    return false;
  };
  for (const Variable& v : variables) {
    if (written(v)) {
      return "a variable in shared memory was written beyond its end";
    }
  }
  return written(dynamic) ? "dynamic shared memory was written beyond its end" : nullptr;
}

void check_bounds(unsigned threads) {
  if (block.x * block.y * block.z > threads) {
    fail("more threads in a block than __launch_bounds__(" + std::to_string(threads) + ")");
  }
}

void run(const char* kernel, const Config& config, const std::function<void()>& body) {
  if (device_error != cudaSuccess || !valid(config)) {
    pending = device_error != cudaSuccess ? device_error : cudaErrorInvalidConfiguration;
    return;
  }
  kernel_name = kernel;
  grid = config.grid;
  block = config.block;
  if (config.shared != 0) {
    dynamic = allocate(config.shared, 16);
  }
  const std::string failure = run_blocks(body);
  free(dynamic.at);
  dynamic = {nullptr, 0, 0};
  kernel_name = "no kernel";
  if (!failure.empty()) {
    throw std::runtime_error(failure);
  }
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

extern "C" {

cudaError_t cudaGetLastError() {
  const cudaError_t error = pending;
  pending = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
  }
  return "unknown error";
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return device_error;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 4;
  return device_error;
}

cudaError_t cuda_on_cpu_function(cudaFuncAttributes* attributes) {
  *attributes = {90, 90, 32, static_cast<int>(kMaxThreads), 0, 0};
  pending = device_error;
  return device_error;
}

cudaError_t cuda_on_cpu_shared_limit(int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > kSharedLimit) {
    return pending = cudaErrorInvalidValue;
  }
  dynamic_limit =
      static_cast<size_t>(bytes) > kStaticLimit ? static_cast<size_t>(bytes) : kStaticLimit;
  return cudaSuccess;
}

// For the tests: the order of threads, the planted fault, and a device on which nothing runs.
#pragma GCC visibility push(default)
void cuda_on_cpu_reverse(int on) { reversed = on != 0; }
void cuda_on_cpu_plant(int number) { fault = number; }
void cuda_on_cpu_device_error(int error) { device_error = static_cast<cudaError_t>(error); }
#pragma GCC visibility pop
}
