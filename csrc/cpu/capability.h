// The instruction set of the kernels, chosen once per process, and the kernels for it.
#pragma once

#include <string>

namespace fastguard {

enum class Capability { basic, avx2, avx512, avx512_bf16, amx };

// The best instruction set that was compiled in and that this machine has.
// FASTGUARD_CPU_CAPABILITY=default|avx2|avx512|avx512_bf16|amx caps it (the words of torch's
// ATEN_CPU_CAPABILITY); tests use that to run every variant.
Capability cpu_capability();

const char* name(Capability capability);

// The names of the compiled instruction sets, with blanks between them.
std::string compiled_capabilities();

// A table of kernels for each instruction set; null if there is none.
template <class Kernels>
struct Variants {
  const Kernels* basic;
  const Kernels* avx2;
  const Kernels* avx512;
  const Kernels* avx512_bf16;
  const Kernels* amx;

  // The best table for this machine, or null.
  const Kernels* best() const {
    const Kernels* const by_capability[] = {basic, avx2, avx512, avx512_bf16, amx};
    int capability = static_cast<int>(cpu_capability());
    while (capability > 0 && by_capability[capability] == nullptr) {
      --capability;
    }
    return by_capability[capability];
  }
};

}  // namespace fastguard

// The address of a kernel for one instruction set, or null if setup.py did not compile for it.
#ifdef FASTGUARD_HAS_AVX2
#define FASTGUARD_IF_AVX2(kernels) &kernels
#else
#define FASTGUARD_IF_AVX2(kernels) nullptr
#endif
#ifdef FASTGUARD_HAS_AVX512
#define FASTGUARD_IF_AVX512(kernels) &kernels
#else
#define FASTGUARD_IF_AVX512(kernels) nullptr
#endif
#ifdef FASTGUARD_HAS_AVX512_BF16
#define FASTGUARD_IF_AVX512_BF16(kernels) &kernels
#else
#define FASTGUARD_IF_AVX512_BF16(kernels) nullptr
#endif
#ifdef FASTGUARD_HAS_AMX
#define FASTGUARD_IF_AMX(kernels) &kernels
#else
#define FASTGUARD_IF_AMX(kernels) nullptr
#endif

// The best of kernels_default, kernels_avx2 and kernels_avx512 for this machine, by reference.
#define FASTGUARD_BEST_OF(kernels)                    \
  (*fastguard::Variants<decltype(kernels##_default)>{ \
      &kernels##_default,                             \
      FASTGUARD_IF_AVX2(kernels##_avx2),              \
      FASTGUARD_IF_AVX512(kernels##_avx512),          \
      nullptr,                                        \
      nullptr}                                        \
        .best())
