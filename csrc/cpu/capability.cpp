#include "capability.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace fastguard {
namespace {

Capability best_of_machine() {
#ifdef FASTGUARD_HAS_AVX2
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c");
#endif
#ifdef FASTGUARD_HAS_AVX512
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
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
  for (const Capability c : {Capability::basic, Capability::avx2, Capability::avx512}) {
    if (std::string(wanted) == name(c)) {
      return c < best ? c : best;
    }
  }
  STD_TORCH_CHECK(
      false, "FASTGUARD_CPU_CAPABILITY=", wanted, " is not one of default, avx2, avx512");
}

}  // namespace

Capability cpu_capability() {
  static const Capability chosen = choose();
  return chosen;
}

const char* name(Capability capability) {
  switch (capability) {
    case Capability::avx512:
      return "avx512";
    case Capability::avx2:
      return "avx2";
    default:
      return "default";
  }
}

}  // namespace fastguard
