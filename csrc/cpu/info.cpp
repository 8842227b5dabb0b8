#include "capability.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/version.h>

#include <string>

namespace {

#if defined(__clang__)
constexpr const char* compiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* compiler = "gcc " __VERSION__;
#else
constexpr const char* compiler = "msvc";
#endif

std::string cpu_info() {
  return std::string("torch=") + TORCH_VERSION + "\ncompiler=" + compiler +
      "\ncompiled=" + fastguard::compiled_capabilities() +
      "\nchosen=" + fastguard::name(fastguard::cpu_capability()) +
      "\nthreads=" + std::to_string(torch::stable::get_num_threads());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastguard, CompositeExplicitAutograd, m) {
  m.impl("cpu_info", TORCH_BOX(&cpu_info));
}
