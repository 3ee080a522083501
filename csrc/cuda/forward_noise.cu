// x_t = alpha x0 + sigma noise, and the other elementwise kernels.
#include "launch.h"
#include "pack.cuh"

namespace afd::cuda {
namespace {

template <class X, bool kBackward>
__global__ void __launch_bounds__(kThreads) _forward_noise_kernel(NoiseProblem p, int64_t first) {
  const Place at = place(p.rows, blockIdx.x, first + blockIdx.y);
  __shared__ float coefficients[2];
  if (threadIdx.x == 0) {
    const ScheduleAt s = schedule_of_frame(p.rows, p.schedule, p.t, at.sample, at.frame);
    coefficients[0] = static_cast<float>(s.alpha);
    coefficients[1] = static_cast<float>(s.sigma);
  }
  __syncthreads();
  const PhiloxKey key = philox_key(p.seed == nullptr ? 0 : p.seed[at.sample]);
  for_each_pack(at, [&](int64_t position, int count) {
    const int64_t offset = element_offset(p.rows, at.sample, position);
    // Read for each pack: in registers they would be two too many.
    const float alpha = coefficients[0], sigma = coefficients[1];
    float x[kPack], noise[kPack];
    load_pack(static_cast<const X*>(p.x0) + offset, count, x);
    if constexpr (kBackward) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        x[i] = alpha * x[i];
      }
    } else {
      if (p.noise == nullptr) {
        generate_pack(key, position, noise);
      } else {
        load_pack(p.noise_type, p.noise, offset, count, noise);
      }
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        x[i] = noised(x[i], noise[i], alpha, sigma);
      }
    }
    store_pack(static_cast<X*>(p.x_t) + offset, count, x);
  });
}

template <class X>
__global__ void __launch_bounds__(kThreads)
    _scale_kernel(const X* in, X* out, int64_t count, const float* factor) {
  const float scale = *factor;
  if (scale == 1.0f && in == out) {
    return;
  }
  const int64_t position = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kPack;
  const int64_t left = count - position;
  if (left <= 0) {
    return;
  }
  const int here = left < kPack ? static_cast<int>(left) : kPack;
  float x[kPack];
  load_pack<Source::kInPlace>(in + position, here, x);
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    x[i] = x[i] * scale;
  }
  store_pack(out + position, here, x);
}

template <class X, bool kBackward>
void launch(const NoiseProblem& p, cudaStream_t stream) {
  for_each_grid(p.rows, [&](dim3 grid, int64_t first) {
    _forward_noise_kernel<X, kBackward><<<grid, kThreads, 0, stream>>>(p, first);
  });
  check_launch();
}

template <bool kBackward>
void launch(const NoiseProblem& p, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (p.x0_type == DType::kFloat32) {
    launch<float, kBackward>(p, s);
  } else if (p.x0_type == DType::kBFloat16) {
    launch<bf16, kBackward>(p, s);
  } else {
    launch<f16, kBackward>(p, s);
  }
}

template <class X>
void scale(const void* in, void* out, int64_t count, const float* factor, cudaStream_t stream) {
  const int64_t per_block = int64_t{kThreads} * kPack;
  const unsigned blocks = static_cast<unsigned>((count + per_block - 1) / per_block);
  _scale_kernel<X><<<blocks, kThreads, 0, stream>>>(static_cast<const X*>(in), static_cast<X*>(out),
                                                    count, factor);
  check_launch();
}

}  // namespace

const char* unusable() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, _scale_kernel<float>);
  cudaGetLastError();  // or the next launch would find it
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

void launch_forward_noise(const NoiseProblem& p, void* stream) { launch<false>(p, stream); }

void launch_forward_noise_bwd(const NoiseProblem& p, void* stream) { launch<true>(p, stream); }

void launch_scale(DType type, const void* in, void* out, int64_t count, const float* factor,
                  void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (type == DType::kFloat32) {
    scale<float>(in, out, count, factor, s);
  } else if (type == DType::kBFloat16) {
    scale<bf16>(in, out, count, factor, s);
  } else {
    scale<f16>(in, out, count, factor, s);
  }
}

}  // namespace afd::cuda
