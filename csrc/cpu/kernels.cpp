// The table of one instruction set's loops.
#include "kernels.h"

#include <type_traits>

#include "simd.h"

namespace afd::AFD_ISA {

template <class Pointer>
using Loop = std::remove_pointer_t<Pointer>;

// In forward_noise.cpp, nft_loss.cpp, qk_norm_rope.cpp and adaln.cpp.
Loop<decltype(CpuKernels::normals)> normals;
Loop<decltype(CpuKernels::forward_noise)> forward_noise;
Loop<decltype(CpuKernels::scale_by_frame)> scale_by_frame;
Loop<decltype(CpuKernels::scale)> scale;
Loop<decltype(CpuKernels::nft_sums)> nft_sums;
Loop<decltype(CpuKernels::nft_gradient)> nft_gradient;
Loop<decltype(CpuKernels::stream_5r1w)> stream_5r1w;
Loop<decltype(CpuKernels::qk_norm_rope)> qk_norm_rope;
Loop<decltype(CpuKernels::qk_norm_rope_bwd)> qk_norm_rope_bwd;
Loop<decltype(CpuKernels::adaln)> adaln;
Loop<decltype(CpuKernels::adaln_bwd)> adaln_bwd;

#define AFD_NAME_OF(x) #x
#define AFD_NAME(x) AFD_NAME_OF(x)
CpuKernels kernels() {
  return {AFD_NAME(AFD_ISA), normals,     forward_noise, scale_by_frame,   scale, nft_sums,
          nft_gradient,      stream_5r1w, qk_norm_rope,  qk_norm_rope_bwd, adaln, adaln_bwd};
}

}  // namespace afd::AFD_ISA
