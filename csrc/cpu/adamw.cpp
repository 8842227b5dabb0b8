// adamw_: one Adam or AdamW step of all parameters in one parallel region. It reads the guard's
// verdict and coefficient itself. It never writes gradients, and on a skip it writes nothing.
// Reference: adamw_ref_ in fastguard/ops/adamw.py.
//
// It is bound by memory: it reads four arrays and writes three, 28 bytes per fp32 parameter. With
// small parameters it is bound by the dispatcher's conversion of lists, 0.2 us per tensor. The
// state is therefore packed, one tensor for all parameters.

#include "adamw.h"
#include "adamw_kernel.h"
#include "capability.h"
#include "decide.h"
#include "gradients.h"

#include <array>
#include <cmath>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

namespace fastguard {
namespace {

using namespace adamw;

// How far ahead the loop prefetches, as measured: an Intel Xeon needs the distance, because its own
// prefetch stops at 4 KiB boundaries, and an AMD EPYC with Zen 5 gains a tenth by it. With Zen 4 it
// costs a fifth of one core's speed.
int64_t prefetch_bytes() {
  constexpr int64_t near = 512, far = 2048;
#if defined(__x86_64__) && defined(__GNUC__)
  unsigned version = 0, unused = 0;
  const bool known = __get_cpuid(1, &version, &unused, &unused, &unused) != 0;
  const unsigned family = known ? (version >> 8 & 15) + (version >> 20 & 255) : 0;
  constexpr unsigned zen5 = 26;
  return __builtin_cpu_is("intel") || family >= zen5 ? far : near;
#else
  return near;
#endif
}

// The arguments of the kernel for one parameter.
struct ParamStep {
  Places places;
  int64_t moments;  // where its moments start, in elements
  int8_t param_bytes;  // of one element
  int8_t grad_bytes;
  AdamwFunction* function;
  double grad_coef;
  BiasCorrection bias;
};

int8_t bytes_of(const TensorView& tensor) {
  return static_cast<int8_t>(aoti_torch_dtype_element_size(tensor.dtype()));
}

AdamwFunction* pick_function(
    const AdamwKernels& kernels, const TensorView& p, const TensorView& g) {
  return pick(p.dtype() == g.dtype() ? kernels.same_dtype : kernels.float32_grad, p.scalar_type());
}

// The bias correction of step t. It is computed anew only if t changes; most parameters have the
// same t.
class BiasCorrections {
 public:
  explicit BiasCorrections(const AdamwOptions& options) : options_(options) {}

  const BiasCorrection& at(double t) {
    if (t != t_) {
      t_ = t;
      of_t_ =
          bias_correction_of(options_, std::pow(options_.beta1, t), std::pow(options_.beta2, t));
    }
    return of_t_;
  }

 private:
  AdamwOptions options_;
  double t_ = -1.0;
  BiasCorrection of_t_ = {};
};

void step(const Arguments& given) {
  const AdamwOptions& options = given.options;
  const TensorList& params = given.params;
  const size_t n = params.size();
  const std::vector<int64_t> offsets = check(given);
  const NoGrad no_grad;
  const int64_t decided = *given.verdict.const_data_ptr<int64_t>();
  if (decided != static_cast<int64_t>(Verdict::apply) &&
      decided != static_cast<int64_t>(Verdict::clip)) {
    return;
  }
  const double* coefs = given.grad_coef.const_data_ptr<double>();
  const int64_t next_coef = given.grad_coef.dim() == 0 ? 0 : given.grad_coef.stride(0);
  const AdamwKernels& kernels = FASTGUARD_BEST_OF(adamw_kernels);
  BiasCorrections bias_corrections(options);
  std::array<char*, roles> moments{};  // the last stays null without amsgrad
  for (int role = exp_avg; role < (given.amsgrad ? roles : max_exp_avg_sq); ++role) {
    moments[role] = static_cast<char*>(given.moments[role].mutable_data_ptr());
  }
  auto* const masters =
      given.master_param ? static_cast<float*>(given.master_param->mutable_data_ptr()) : nullptr;
  const int64_t moment_bytes = is_wide(given) ? sizeof(double) : sizeof(float);
  float* const steps = static_cast<float*>(given.state_steps.mutable_data_ptr());
  StandIns stand_ins;
  std::vector<ParamStep> param_steps(n);
  std::vector<Span> spans(n);
  for (size_t i = 0; i < n; ++i) {
    const TensorView& p = params[i];
    const TensorView& g = given.grads[i];
    ParamStep& param_step = param_steps[i];
    param_step.places = stand_ins.place(p, g);
    param_step.moments = offsets[i];
    param_step.param_bytes = bytes_of(p);
    param_step.grad_bytes = bytes_of(g);
    param_step.function = pick_function(kernels, p, g);
    param_step.grad_coef = coefs[static_cast<int64_t>(i) * next_coef];
    param_step.bias = bias_corrections.at(static_cast<double>(steps[i]) + 1.0);
    spans[i] = {param_step.places.param, p.numel(), p.scalar_type()};
  }
  const std::vector<Slice> slices = cut(spans);
  // Nothing was written so far, and nothing throws from here on.
  for (size_t i = 0; i < n; ++i) {
    steps[i] += 1.0f;
  }
  const int64_t ahead = prefetch_bytes();
  for_each_slice(slices, [&](int64_t s) {
    const Slice& slice = slices[s];
    const ParamStep& param_step = param_steps[slice.span];
    const int64_t place = param_step.moments + slice.begin;
    const int64_t first = place * moment_bytes;
    char* const largest = moments[max_exp_avg_sq];
    const AdamwRange range = {
        param_step.places.param + slice.begin * param_step.param_bytes,
        param_step.places.grad + slice.begin * param_step.grad_bytes,
        moments[exp_avg] + first,
        moments[exp_avg_sq] + first,
        largest == nullptr ? nullptr : largest + first,
        masters == nullptr ? nullptr : masters + place,
        slice.size};
    param_step.function(range, param_step.grad_coef, param_step.bias, options, ahead);
  });
  stand_ins.copy_back();
}

void adamw_boxed(StableIValue* stack, uint64_t, uint64_t) { step(Arguments(stack)); }

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) { m.impl("adamw_", &fastguard::adamw_boxed); }
