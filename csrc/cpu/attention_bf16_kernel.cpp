// bf16 in the machine's own instructions: AVX512_BF16's, or AMX's tiles of 16 x 32.

#include "attention_kernel_of.h"

namespace fastguard {

extern constinit const AttentionKernel FASTGUARD_CONCAT(
    attention_bf16_kernel_, FASTGUARD_CAPABILITY) = attention_kernel_of<BFloat16, InBFloat16>();

}  // namespace fastguard
