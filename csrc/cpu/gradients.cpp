#include "gradients.h"

#include "capability.h"

namespace fastguard {

const GradientKernels& gradient_kernels() {
  switch (cpu_capability()) {
#ifdef FASTGUARD_HAS_AVX512
    case Capability::amx:
    case Capability::avx512_bf16:
    case Capability::avx512:
      return gradient_kernels_avx512;
#endif
#ifdef FASTGUARD_HAS_AVX2
    case Capability::avx2:
      return gradient_kernels_avx2;
#endif
    default:
      return gradient_kernels_default;
  }
}

}  // namespace fastguard
