#include "capability.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#ifdef FASTGUARD_HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef _MSC_VER
#include <immintrin.h>
#include <intrin.h>
#endif

namespace fastguard {
namespace {

#ifdef FASTGUARD_HAS_AMX
// Linux saves the AMX tiles only for processes that asked for it
// (Documentation/arch/x86/xstate.rst).
bool may_use_tiles() {
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}
#endif

#ifdef FASTGUARD_HAS_AVX2
// With FMA and F16C, and a system that saves the registers.
bool has_avx2() {
#ifdef _MSC_VER
  constexpr int fma = 1 << 12, xsave = 1 << 27, f16c = 1 << 29, avx2 = 1 << 5;
  int of_leaf[4];
  __cpuid(of_leaf, 0);
  if (of_leaf[0] < 7) {
    return false;
  }
  __cpuid(of_leaf, 1);
  constexpr int needed = fma | xsave | f16c;
  if ((of_leaf[2] & needed) != needed || (_xgetbv(0) & 6) != 6) {
    return false;
  }
  __cpuidex(of_leaf, 7, 0);
  return (of_leaf[1] & avx2) != 0;
#else
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c");
#endif
}
#endif

Capability best_of_machine() {
#ifdef FASTGUARD_HAS_AVX2
  const bool avx2 = has_avx2();
#endif
#ifdef FASTGUARD_HAS_AVX512
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl");
#endif
#ifdef FASTGUARD_HAS_AVX512_BF16
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#ifdef FASTGUARD_HAS_AMX
  if (avx512_bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
      may_use_tiles()) {
    return Capability::amx;
  }
#endif
#ifdef FASTGUARD_HAS_AVX512_BF16
  if (avx512_bf16) {
    return Capability::avx512_bf16;
  }
#endif
#ifdef FASTGUARD_HAS_AVX512
  if (avx512) {
    return Capability::avx512;
  }
#endif
#ifdef FASTGUARD_HAS_AVX2
  if (avx2) {
    return Capability::avx2;
  }
#endif
  return Capability::basic;
}

Capability choose() {
  const Capability best = best_of_machine();
  const char* wanted = std::getenv("FASTGUARD_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') {
    return best;
  }
  for (const Capability c :
       {Capability::basic,
        Capability::avx2,
        Capability::avx512,
        Capability::avx512_bf16,
        Capability::amx}) {
    if (std::string(wanted) == name(c)) {
      return c < best ? c : best;
    }
  }
  STD_TORCH_CHECK(
      false,
      "FASTGUARD_CPU_CAPABILITY=",
      wanted,
      " is not one of default, avx2, avx512, avx512_bf16, amx");
}

}  // namespace

Capability cpu_capability() {
  static const Capability chosen = choose();
  return chosen;
}

std::string compiled_capabilities() {
  std::string names = "default";
#ifdef FASTGUARD_HAS_AVX2
  names += " avx2";
#endif
#ifdef FASTGUARD_HAS_AVX512
  names += " avx512";
#endif
#ifdef FASTGUARD_HAS_AVX512_BF16
  names += " avx512_bf16";
#endif
#ifdef FASTGUARD_HAS_AMX
  names += " amx";
#endif
  return names;
}

const char* name(Capability capability) {
  switch (capability) {
    case Capability::amx:
      return "amx";
    case Capability::avx512_bf16:
      return "avx512_bf16";
    case Capability::avx512:
      return "avx512";
    case Capability::avx2:
      return "avx2";
    default:
      return "default";
  }
}

}  // namespace fastguard
