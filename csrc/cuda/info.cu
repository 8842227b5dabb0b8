// The build of the CUDA library.
#include "cuda/runtime.h"

#include <torch/csrc/stable/library.h>

#include <string>

namespace {

std::string cuda_info() {
  return std::string("archs=") + FASTGUARD_CUDA_ARCHS +
      "\ntoolkit=" + std::to_string(__CUDACC_VER_MAJOR__) + "." +
      std::to_string(__CUDACC_VER_MINOR__) + "." + std::to_string(__CUDACC_VER_BUILD__);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastguard, CompositeExplicitAutograd, m) {
  m.impl("cuda_info", TORCH_BOX(&cuda_info));
}
