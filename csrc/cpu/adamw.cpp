// adamw_: one Adam or AdamW step of all parameters in one parallel region. It reads the guard's
// verdict and coefficient itself: gradients are never rewritten, and on a skip nothing is.
// Reference: adamw_ref_ in fastguard/ops.py.
//
// It is bound by memory: 28 bytes per fp32 parameter, four arrays read and three written. Where the
// parameters are small it is bound by the dispatcher's conversion of lists, 0.2 us a tensor: so the
// state comes packed, one tensor for all parameters.

#include "adamw_kernel.h"
#include "capability.h"
#include "decide.h"
#include "gradients.h"
#include "packed.h"
#include "tensor_list.h"

#include <array>
#include <cmath>
#include <sstream>
#include <string>

namespace fastguard {
namespace {

using torch::stable::Tensor;

struct Options {
  double lr;
  double beta1;
  double beta2;
  double weight_decay;
  double eps;
  bool decoupled_weight_decay;
  bool amsgrad;
  bool maximize;
};

// The packed state, in the order of the op's arguments.
enum Role { exp_avg, exp_avg_sq, max_exp_avg_sq, roles };
constexpr const char* names[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};

struct Arguments {
  explicit Arguments(StableIValue* stack)
      : params(stack[0]),
        grads(stack[1]),
        moments{owned(stack[2]), owned(stack[3]), owned(stack[4])},
        state_steps(owned(stack[5])),
        grad_coef(owned(stack[6])),
        verdict(owned(stack[7])) {}

  static Tensor owned(StableIValue value) { return torch::stable::detail::to<Tensor>(value); }

  TensorList params;
  TensorList grads;
  std::array<Tensor, roles> moments;
  Tensor state_steps;
  Tensor grad_coef;
  Tensor verdict;
};

std::string shape_of(const TensorView& tensor) {
  std::ostringstream out;
  out << "(";
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    out << (dim > 0 ? ", " : "") << tensor.size(dim);
  }
  out << (tensor.dim() == 1 ? ",)" : ")");
  return out.str();
}

const char* dtype_of(const TensorView& tensor) {
  return torch::headeronly::toString(tensor.scalar_type());
}

bool same_shape(const TensorView& a, const TensorView& b) {
  if (a.dim() != b.dim()) {
    return false;
  }
  for (int64_t dim = 0; dim < a.dim(); ++dim) {
    if (a.size(dim) != b.size(dim)) {
      return false;
    }
  }
  return true;
}

// Whether the two, of one shape, have their elements in the same order and with the same gaps.
bool same_layout(const TensorView& tensor, const Tensor& like) {
  const int64_t* strides = tensor.strides();
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) > 1 && strides[dim] != like.stride(dim)) {
      return false;
    }
  }
  return true;
}

// By rising stride, each dimension must step over all that the smaller ones reach.
bool may_overlap(const TensorView& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  const int64_t* strides = tensor.strides();
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) == 0) {
      return false;
    }
    if (tensor.size(dim) > 1) {
      dims.emplace_back(strides[dim], tensor.size(dim));
    }
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) {
      return true;
    }
    reach += stride * (size - 1);
  }
  return false;
}

void check_scalars(const TensorView& grad_coef, const TensorView& verdict, size_t n) {
  STD_TORCH_CHECK(
      grad_coef.scalar_type() == ScalarType::Double &&
          (grad_coef.dim() == 0 ||
           (grad_coef.dim() == 1 && grad_coef.size(0) == static_cast<int64_t>(n))),
      "adamw_: grad_coef must be a float64 tensor of shape () or (",
      n,
      ",), one factor for all gradients or one for each; got ",
      dtype_of(grad_coef),
      " of shape ",
      shape_of(grad_coef));
  STD_TORCH_CHECK(
      verdict.dim() == 0 && verdict.scalar_type() == ScalarType::Long,
      "adamw_: verdict must be an int64 tensor of shape (), as decide returns it; got ",
      dtype_of(verdict),
      " of shape ",
      shape_of(verdict));
}

void check_packed(
    const Tensor& tensor, const char* name, ScalarType dtype, int64_t size, const char* why) {
  const TensorView view(tensor.get());
  STD_TORCH_CHECK(
      view.dim() == 1 && view.size(0) == size && view.scalar_type() == dtype &&
          view.is_contiguous(),
      "adamw_: ",
      name,
      " must be a contiguous ",
      torch::headeronly::toString(dtype),
      " tensor of shape (",
      size,
      ",), ",
      why,
      "; got ",
      dtype_of(view),
      " of shape ",
      shape_of(view),
      view.is_contiguous() ? "" : ", not contiguous");
}

void check_tensors(const TensorView& p, const TensorView& g, size_t index, bool wide) {
  const ScalarType dtype = p.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
          dtype == ScalarType::Half,
      "adamw_: params[",
      index,
      "] has dtype ",
      dtype_of(p),
      "; float32, float64, bfloat16 and float16 are supported");
  STD_TORCH_CHECK(
      (dtype == ScalarType::Double) == wide,
      "adamw_: params[",
      index,
      "] has dtype ",
      dtype_of(p),
      ", params[0] ",
      wide ? "Double" : "another",
      "; float64 parameters need a call of their own, for one call has one dtype of moments");
  STD_TORCH_CHECK(
      p.is_contiguous() || !may_overlap(p),
      "adamw_: params[",
      index,
      "] is expanded or overlaps itself: several of its elements share a single memory location; "
      "clone it");
  STD_TORCH_CHECK(
      same_shape(g, p),
      "adamw_: grads[",
      index,
      "] has shape ",
      shape_of(g),
      ", its parameter ",
      shape_of(p),
      "; make it with torch.zeros_like");
  STD_TORCH_CHECK(
      g.dtype() == p.dtype() || (g.dtype() == aoti_torch_dtype_float32() && !wide),
      "adamw_: grads[",
      index,
      "] has dtype ",
      dtype_of(g),
      ", its parameter ",
      dtype_of(p),
      "; it must be ",
      wide ? "float64" : "the parameter's or float32");
}

// One parameter's stretch of memory and the gradient's, in the same order: the parameter's own, or
// row-major where it has gaps, as its moments lie.
struct Stretch {
  char* param;
  const char* grad;
  int64_t moments;  // where its moments start, in elements
  int8_t param_bytes;  // of one element
  int8_t grad_bytes;
  AdamwFunction* function;
  AdamwStep step;
};

// Copies that stand in for a parameter with gaps, or a gradient that lies otherwise.
class StandIns {
 public:
  void place(const TensorView& p, const TensorView& g, Stretch& stretch) {
    if (p.is_contiguous() && g.is_contiguous()) {
      stretch.param = static_cast<char*>(p.mutable_data());
      stretch.grad = static_cast<const char*>(g.data());
      return;
    }
    const Tensor given = p.tensor();
    const Dense dense = densify(given);
    if (dense.copied) {
      written_.emplace_back(given, dense.tensor);
    }
    stretch.param = static_cast<char*>(dense.tensor.mutable_data_ptr());
    if (same_layout(g, dense.tensor)) {
      stretch.grad = static_cast<const char*>(g.data());
      return;
    }
    const Tensor copy = like(dense.tensor, g.scalar_type());
    torch::stable::copy_(kept_.emplace_back(copy), g.tensor());
    stretch.grad = static_cast<const char*>(copy.const_data_ptr());
  }

  // What was written into a stand-in is written into the parameter that it stands in for.
  void copy_back() {
    for (auto& [tensor, copy] : written_) {
      torch::stable::copy_(tensor, copy);
    }
  }

 private:
  static Tensor like(const Tensor& tensor, ScalarType dtype) {
    const Tensor empty = torch::stable::empty_like(tensor);
    return tensor.scalar_type() == dtype ? empty : torch::stable::to(empty, dtype);
  }

  std::vector<Tensor> kept_;
  std::vector<std::pair<Tensor, Tensor>> written_;
};

int8_t bytes_of(const TensorView& tensor) {
  return static_cast<int8_t>(aoti_torch_dtype_element_size(tensor.dtype()));
}

AdamwFunction* pick_function(const AdamwKernels& kernels, const TensorView& p, const TensorView& g) {
  return pick(p.dtype() == g.dtype() ? kernels.same_dtype : kernels.float32_grad, p.scalar_type());
}

const AdamwKernels& adamw_kernels() {
  switch (cpu_capability()) {
#ifdef FASTGUARD_HAS_AVX512
    case Capability::avx512:
      return adamw_kernels_avx512;
#endif
#ifdef FASTGUARD_HAS_AVX2
    case Capability::avx2:
      return adamw_kernels_avx2;
#endif
    default:
      return adamw_kernels_default;
  }
}

// The bias corrections of step t, kept while t stays the same, as it does for most parameters.
class BiasCorrection {
 public:
  explicit BiasCorrection(const Options& options) : options_(options) {}

  void at(double t, AdamwStep& step) {
    if (t != t_) {
      t_ = t;
      step_size_ = options_.lr / (1.0 - std::pow(options_.beta1, t));
      root_factor_ = 1.0 / std::sqrt(1.0 - std::pow(options_.beta2, t));
    }
    step.step_size = step_size_;
    step.root_factor = root_factor_;
  }

 private:
  Options options_;
  double t_ = -1.0;
  double step_size_ = 0.0;
  double root_factor_ = 0.0;
};

void check(
    const Arguments& given, const std::vector<int64_t>& offsets, bool wide, bool amsgrad) {
  const size_t n = given.params.size();
  STD_TORCH_CHECK(
      given.grads.size() == n,
      "adamw_: grads has ",
      given.grads.size(),
      " tensors; with ",
      n,
      " params it must have as many");
  check_scalars(TensorView(given.grad_coef.get()), TensorView(given.verdict.get()), n);
  for (size_t i = 0; i < n; ++i) {
    check_tensors(given.params[i], given.grads[i], i, wide);
  }
  const ScalarType moment = wide ? ScalarType::Double : ScalarType::Float;
  for (int role = exp_avg; role < roles; ++role) {
    const bool unused = role == max_exp_avg_sq && !amsgrad;
    check_packed(
        given.moments[role],
        names[role],
        moment,
        unused ? 0 : offsets.back(),
        unused ? "as amsgrad is off" : "the last of packed_offsets");
  }
  check_packed(
      given.state_steps,
      "state_steps",
      ScalarType::Float,
      static_cast<int64_t>(n),
      "one step for each parameter");
}

void adamw(const Arguments& given, const Options& options) {
  const TensorList& params = given.params;
  const size_t n = params.size();
  const bool wide = n > 0 && params[0].scalar_type() == ScalarType::Double;
  const std::vector<int64_t> offsets = packed_offsets(params);
  check(given, offsets, wide, options.amsgrad);
  const int64_t decided = *given.verdict.const_data_ptr<int64_t>();
  if (decided != static_cast<int64_t>(Verdict::apply) &&
      decided != static_cast<int64_t>(Verdict::clip)) {
    return;
  }
  const double* coefs = given.grad_coef.const_data_ptr<double>();
  const int64_t next_coef = given.grad_coef.dim() == 0 ? 0 : given.grad_coef.stride(0);
  const AdamwKernels& kernels = adamw_kernels();
  BiasCorrection bias_correction(options);
  const AdamwRule rule{
      options.beta1,
      options.beta2,
      options.eps,
      options.weight_decay * (options.decoupled_weight_decay ? options.lr : 1.0),
      !options.decoupled_weight_decay && options.weight_decay != 0.0};
  std::array<char*, roles> moments{};  // the last stays null without amsgrad
  for (int role = exp_avg; role < (options.amsgrad ? roles : max_exp_avg_sq); ++role) {
    moments[role] = static_cast<char*>(given.moments[role].mutable_data_ptr());
  }
  const int64_t moment_bytes = wide ? sizeof(double) : sizeof(float);
  float* const steps = static_cast<float*>(given.state_steps.mutable_data_ptr());
  StandIns stand_ins;
  std::vector<Stretch> stretches(n);
  std::vector<Span> spans(n);
  for (size_t i = 0; i < n; ++i) {
    const TensorView& p = params[i];
    const TensorView& g = given.grads[i];
    Stretch& stretch = stretches[i];
    stand_ins.place(p, g, stretch);
    stretch.moments = offsets[i];
    stretch.param_bytes = bytes_of(p);
    stretch.grad_bytes = bytes_of(g);
    stretch.function = pick_function(kernels, p, g);
    const double factor = coefs[static_cast<int64_t>(i) * next_coef];
    stretch.step.grad_coef = options.maximize ? -factor : factor;
    bias_correction.at(static_cast<double>(steps[i]) + 1.0, stretch.step);
    spans[i] = {stretch.param, p.numel(), p.scalar_type()};
  }
  const std::vector<Chunk> chunks = cut(spans);
  // Nothing was written so far, and nothing throws from here on.
  for (size_t i = 0; i < n; ++i) {
    steps[i] += 1.0f;
  }
  for_each_chunk(chunks, [&](int64_t c) {
    const Chunk& chunk = chunks[c];
    const Stretch& stretch = stretches[chunk.span];
    const int64_t first = (stretch.moments + chunk.begin) * moment_bytes;
    char* largest = moments[max_exp_avg_sq];
    stretch.function(
        stretch.param + chunk.begin * stretch.param_bytes,
        stretch.grad + chunk.begin * stretch.grad_bytes,
        moments[exp_avg] + first,
        moments[exp_avg_sq] + first,
        largest == nullptr ? nullptr : largest + first,
        chunk.size,
        stretch.step,
        rule);
  });
  stand_ins.copy_back();
}

// What TORCH_BOX would write, but for the lists.
void adamw_boxed(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  const Arguments given(stack);
  adamw(
      given,
      {to<double>(stack[8]),
       to<double>(stack[9]),
       to<double>(stack[10]),
       to<double>(stack[11]),
       to<double>(stack[12]),
       to<bool>(stack[13]),
       to<bool>(stack[14]),
       to<bool>(stack[15])});
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) {
  m.impl("adamw_", &fastguard::adamw_boxed);
}
