#include "gradients.h"

#include "capability.h"

namespace fastguard {

const GradientKernels& gradient_kernels() { return FASTGUARD_BEST_OF(gradient_kernels); }

}  // namespace fastguard
