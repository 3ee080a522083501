// Kernels that use what ours may use, each right and, by `wrong`, in the ways it can be wrong.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>

namespace {

constexpr int kThreads = 96;
constexpr unsigned kAll = 0xFFFFFFFFu;

// One launch of 96 threads in blocks of `block`; what it is given and gives are fp32 [n].
struct Call {
  const float* in;
  float* out;
  int n, wrong;
};

__global__ void _reduce(Call c) {
  __shared__ float sums[kThreads / 32];
  float sum = threadIdx.x < static_cast<unsigned>(c.n) ? c.in[threadIdx.x] : 0.0f;
  const int first = c.wrong == 1 ? 8 : 16;
  const unsigned mask = c.wrong == 2 ? 0x0000FFFFu : kAll;
  for (int step = first; step > 0; step /= 2) {
    sum += __shfl_down_sync(mask, sum, step);
  }
  if (threadIdx.x % 32 == (c.wrong == 3 ? 1 : 0)) {
    sums[threadIdx.x / 32 + (c.wrong == 4 ? 1 : 0)] = sum;
  }
  if (c.wrong != 5) {
    __syncthreads();
  }
  if (threadIdx.x == (c.wrong == 5 ? 1 : 0)) {
    c.out[0] = sums[0] + sums[1] + sums[2];
  }
}

__global__ void _divergent(Call c) {
  const bool early = threadIdx.x >= 64;
  if (c.wrong == 1 && early) {
    return;
  }
  if (c.wrong == 2 && early) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (c.wrong == 3 && threadIdx.x % 2 == 0) {
    __syncwarp(kAll);
  }
  if (c.wrong == 4 && threadIdx.x % 32 == 5) {
    return;
  }
  const float x = __shfl_xor_sync(kAll, c.in[threadIdx.x], 1);
  c.out[threadIdx.x] = x;
}

__global__ void _halves_of_a_warp(Call c) {
  const unsigned lane = threadIdx.x % 32;
  float x = c.in[threadIdx.x];
  if (lane < 16) {
    x = __shfl_up_sync(0x0000FFFFu, x, 1, 16);
  } else {
    // The other half's own mask; wrongly, one that names lanes that are elsewhere.
    x = __shfl_sync(c.wrong == 1 ? kAll : 0xFFFF0000u, x, c.wrong == 2 ? 0 : 3,
                    c.wrong == 2 ? 32 : 16);
  }
  const unsigned votes = __ballot_sync(kAll, x > 0.0f);
  c.out[threadIdx.x] = x + static_cast<float>(__popc(votes)) +
                       static_cast<float>(__reduce_max_sync(kAll, static_cast<int>(lane)));
}

__global__ void _dynamic(Call c) {
  extern __shared__ float row[];
  row[threadIdx.x + (c.wrong == 1 ? 1 : 0)] = c.in[threadIdx.x];
  __syncthreads();
  c.out[threadIdx.x] = row[kThreads - 1 - threadIdx.x];
}

__global__ void _vectors(Call c) {
  const int i = static_cast<int>(threadIdx.x) * 4;
  if (i + 3 < c.n || c.wrong == 1) {
    const float* at = c.in + i + (c.wrong == 2 ? 1 : 0);
    float4 v;
    if (c.wrong == 3) {
      v = *reinterpret_cast<const float4*>(at + 1);
    } else {
      v = __ldg(reinterpret_cast<const float4*>(at));
    }
    v.x = rsqrtf(v.x);
    v.y = __fmaf_rn(v.y, v.y, 1.0f);
    __stcs(reinterpret_cast<float4*>(c.out + i), v);
  }
}

__global__ void _in_place(Call c) {
  float* at = c.out + threadIdx.x;
  *at = (c.wrong == 1 ? __ldg(at) : *at) + 1.0f;
}

__global__ void _atomics(Call c) {
  atomicAdd(c.out, c.in[threadIdx.x]);
  atomicMax(reinterpret_cast<int*>(c.out) + 1, static_cast<int>(threadIdx.x));
}

__global__ void _pairs(Call c) {
  const float2 f = {c.in[threadIdx.x], 1.5f};
  const __nv_bfloat162 b = __float22bfloat162_rn(f);
  const __half2 h = __hfma2(__float22half2_rn(f), __float2half2_rn(2.0f), __float2half2_rn(1.0f));
  c.out[threadIdx.x] = __low2float(b) + __bfloat1622float2(b).y + __low2float(h) + __high2float(h);
}

__global__ void __launch_bounds__(64) _bounded(Call c) { c.out[threadIdx.x] = c.in[threadIdx.x]; }

__global__ void _undefined(Call c) {
  __shared__ float x;
  if (c.wrong == 0) {
    x = 1.0f;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    c.out[0] = x;
  }
}

using Kernel = void (*)(Call);

Kernel kernel_of(const char* name) {
  const struct {
    const char* name;
    Kernel kernel;
  } kernels[] = {
      {"reduce", _reduce},       {"divergent", _divergent}, {"halves_of_a_warp", _halves_of_a_warp},
      {"dynamic", _dynamic},     {"vectors", _vectors},     {"in_place", _in_place},
      {"atomics", _atomics},     {"pairs", _pairs},         {"bounded", _bounded},
      {"undefined", _undefined},
  };
  for (const auto& known : kernels) {
    if (strcmp(known.name, name) == 0) {
      return known.kernel;
    }
  }
  throw std::runtime_error("no such kernel");
}

char words[512];

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Runs a kernel by its name; what went wrong, or an empty string.
const char* launch(const char* name, const float* in, float* out, int n, int wrong, unsigned block,
                   unsigned blocks, unsigned bytes) {
  words[0] = '\0';
  try {
    const Kernel kernel = kernel_of(name);
    kernel<<<blocks, block, bytes, nullptr>>>(Call{in, out, n, wrong});
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) {
      throw std::runtime_error(cudaGetErrorString(error));
    }
  } catch (const std::exception& error) {
    snprintf(words, sizeof words, "%s", error.what());
  }
  return words;
}

unsigned round_to_half(float x, int bf16) {
  return bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x)) : __half_as_ushort(__float2half_rn(x));
}

float read_half(unsigned bits, int bf16) {
  const auto word = static_cast<uint16_t>(bits);
  return bf16 ? __bfloat162float(__ushort_as_bfloat16(word)) : __half2float(__ushort_as_half(word));
}
}
#pragma GCC visibility pop
