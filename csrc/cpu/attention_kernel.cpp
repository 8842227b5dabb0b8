// One source, compiled once per instruction set with FASTGUARD_CAPABILITY as its name. 16-bit
// floats are computed as float; attention_bf16_kernel.cpp has the instructions for bf16.

#include "attention_kernel_of.h"

namespace fastguard {

extern constinit const AttentionKernels FASTGUARD_CONCAT(attention_kernels_, FASTGUARD_CAPABILITY) =
    {attention_kernel_of<Float32, InFloat>(),
     attention_kernel_of<Float64, InDouble>(),
     attention_kernel_of<BFloat16, InFloat>(),
     attention_kernel_of<Float16, InFloat>()};

}  // namespace fastguard
