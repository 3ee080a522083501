// The module's CPU core is there because the binding names it; one instruction set is enough.
#include "cpu/kernels.h"

namespace afd {
#if defined(__x86_64__)
namespace avx2 {
CpuKernels kernels() { return baseline::kernels(); }
}  // namespace avx2
namespace avx512 {
CpuKernels kernels() { return baseline::kernels(); }
}  // namespace avx512
#endif
}  // namespace afd
