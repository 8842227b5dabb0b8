// adamw_: one Adam or AdamW step of all parameters in one parallel region. It reads the guard's
// verdict and coefficient itself: gradients are never rewritten, and on a skip nothing is.
// Reference: adamw_ref_ in fastguard/ops.py.
//
// It is bound by memory: 28 bytes per fp32 parameter, four arrays read and three written. Where the
// parameters are small it is bound by the lists: of 2 ms for 2000 parameters of 64 elements, half
// goes into the dispatcher's conversion of the five lists.

#include "adamw_kernel.h"
#include "capability.h"
#include "decide.h"
#include "gradients.h"
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

// The tensors of one parameter, in the order of the op's arguments.
enum Role { param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, roles };
constexpr const char* names[] = {
    "params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"};

struct Lists {
  explicit Lists(StableIValue* stack)
      : tensors{
            TensorList(stack[0]),
            TensorList(stack[1]),
            TensorList(stack[2]),
            TensorList(stack[3]),
            TensorList(stack[4])},
        state_steps(stack[5]) {}

  const TensorList& operator[](int role) const { return tensors[role]; }

  std::array<TensorList, roles> tensors;
  TensorList state_steps;
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

void check_lengths(const Lists& lists, bool amsgrad) {
  const size_t n = lists[param].size();
  for (int role = grad; role <= roles; ++role) {
    const size_t size = role == roles ? lists.state_steps.size() : lists[role].size();
    const size_t wanted = role == max_exp_avg_sq && !amsgrad ? 0 : n;
    STD_TORCH_CHECK(
        size == wanted,
        "adamw_: ",
        names[role],
        " has ",
        size,
        " tensors; with ",
        n,
        " params and amsgrad=",
        amsgrad ? "True" : "False",
        " it must have ",
        wanted);
  }
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

void check_role(
    const TensorView& tensor,
    const TensorView& of,
    Role role,
    size_t index,
    bool dtype_fits,
    const char* dtype_wanted) {
  STD_TORCH_CHECK(
      same_shape(tensor, of),
      "adamw_: ",
      names[role],
      "[",
      index,
      "] has shape ",
      shape_of(tensor),
      ", its parameter ",
      shape_of(of),
      "; make it with torch.zeros_like");
  STD_TORCH_CHECK(
      dtype_fits,
      "adamw_: ",
      names[role],
      "[",
      index,
      "] has dtype ",
      dtype_of(tensor),
      ", its parameter ",
      dtype_of(of),
      "; it must be ",
      dtype_wanted);
  STD_TORCH_CHECK(
      role == grad || tensor.is_contiguous() || !may_overlap(tensor),
      "adamw_: ",
      names[role],
      "[",
      index,
      "] is expanded or overlaps itself: several of its elements share a single memory location; "
      "clone it");
}

void check_tensors(const Lists& lists, size_t index, bool amsgrad) {
  const TensorView& p = lists[param][index];
  const ScalarType dtype = p.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
          dtype == ScalarType::Half,
      "adamw_: params[",
      index,
      "] has dtype ",
      dtype_of(p),
      "; float32, float64, bfloat16 and float16 are supported");
  check_role(p, p, param, index, true, "");
  const int32_t float32 = aoti_torch_dtype_float32();
  const bool wide = dtype == ScalarType::Double;
  const TensorView& g = lists[grad][index];
  check_role(
      g,
      p,
      grad,
      index,
      g.dtype() == p.dtype() || (g.dtype() == float32 && !wide),
      wide ? "float64" : "the parameter's or float32");
  const int32_t moment = wide ? aoti_torch_dtype_float64() : float32;
  for (const Role role : {exp_avg, exp_avg_sq, max_exp_avg_sq}) {
    if (role != max_exp_avg_sq || amsgrad) {
      const TensorView& m = lists[role][index];
      check_role(m, p, role, index, m.dtype() == moment, wide ? "float64" : "float32");
    }
  }
  const TensorView& step = lists.state_steps[index];
  STD_TORCH_CHECK(
      step.dim() == 0 && step.dtype() == float32,
      "adamw_: state_steps[",
      index,
      "] must be a float32 tensor of shape (); got ",
      dtype_of(step),
      " of shape ",
      shape_of(step));
}

// Stretches of memory with the tensors of each parameter, all in the same order. Where a tensor
// lies otherwise than its parameter, or the parameter has gaps, a copy stands in for it.
class Stretches {
 public:
  struct Stretch {
    char* data[roles];  // the last is null without amsgrad
    int8_t param_bytes;  // of one element
    int8_t grad_bytes;
    int8_t moment_bytes;
    AdamwFunction* function;
    AdamwStep step;

    void run(int64_t begin, int64_t n, const AdamwRule& rule) const {
      char* largest = data[max_exp_avg_sq];
      function(
          data[param] + begin * param_bytes,
          data[grad] + begin * grad_bytes,
          data[exp_avg] + begin * moment_bytes,
          data[exp_avg_sq] + begin * moment_bytes,
          largest == nullptr ? nullptr : largest + begin * moment_bytes,
          n,
          step,
          rule);
    }
  };

  Stretches(const Lists& lists, bool amsgrad) : used_(amsgrad ? roles : max_exp_avg_sq) {
    stretches_.resize(lists[param].size());
    for (size_t i = 0; i < stretches_.size(); ++i) {
      bool contiguous = true;
      for (int role = param; role < used_; ++role) {
        contiguous = contiguous && lists[role][i].is_contiguous();
      }
      if (contiguous) {
        for (int role = param; role < used_; ++role) {
          const TensorView& tensor = lists[role][i];
          stretches_[i].data[role] = static_cast<char*>(
              role == grad ? const_cast<void*>(tensor.data()) : tensor.mutable_data());
        }
      } else {
        stand_in(lists, i);
      }
    }
  }

  Stretch& operator[](size_t index) { return stretches_[index]; }

  // What was written into a stand-in is written into the tensor that it stands in for.
  void copy_back() {
    for (auto& [tensor, copy] : written_) {
      torch::stable::copy_(tensor, copy);
    }
  }

 private:
  void stand_in(const Lists& lists, size_t index) {
    const Tensor given = lists[param][index].tensor();
    const Dense dense = densify(given);
    if (dense.copied) {
      written_.emplace_back(given, dense.tensor);
    }
    stretches_[index].data[param] = static_cast<char*>(dense.tensor.mutable_data_ptr());
    for (int role = grad; role < used_; ++role) {
      Tensor tensor = lists[role][index].tensor();
      if (!same_layout(lists[role][index], dense.tensor)) {
        Tensor copy = like(dense.tensor, tensor.scalar_type());
        torch::stable::copy_(copy, tensor);
        if (role != grad) {
          written_.emplace_back(tensor, copy);
        }
        kept_.push_back(copy);
        tensor = copy;
      }
      stretches_[index].data[role] = static_cast<char*>(
          role == grad ? const_cast<void*>(tensor.const_data_ptr()) : tensor.mutable_data_ptr());
    }
  }

  static Tensor like(const Tensor& tensor, ScalarType dtype) {
    const Tensor empty = torch::stable::empty_like(tensor);
    return tensor.scalar_type() == dtype ? empty : torch::stable::to(empty, dtype);
  }

  int used_;
  std::vector<Stretch> stretches_;
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

void adamw(const Lists& lists, const Tensor& coef, const Tensor& verdict, const Options& options) {
  const size_t n = lists[param].size();
  check_lengths(lists, options.amsgrad);
  check_scalars(TensorView(coef.get()), TensorView(verdict.get()), n);
  for (size_t i = 0; i < n; ++i) {
    check_tensors(lists, i, options.amsgrad);
  }
  const int64_t decided = *verdict.const_data_ptr<int64_t>();
  if (decided != static_cast<int64_t>(Verdict::apply) &&
      decided != static_cast<int64_t>(Verdict::clip)) {
    return;
  }
  const double* coefs = coef.const_data_ptr<double>();
  const int64_t next_coef = coef.dim() == 0 ? 0 : coef.stride(0);
  const AdamwKernels& kernels = adamw_kernels();
  Stretches stretches(lists, options.amsgrad);
  BiasCorrection bias_correction(options);
  const AdamwRule rule{
      options.beta1,
      options.beta2,
      options.eps,
      options.weight_decay * (options.decoupled_weight_decay ? options.lr : 1.0),
      !options.decoupled_weight_decay && options.weight_decay != 0.0};
  std::vector<Span> spans(n);
  std::vector<float*> steps(n);
  for (size_t i = 0; i < n; ++i) {
    const TensorView& p = lists[param][i];
    Stretches::Stretch& stretch = stretches[i];
    spans[i] = {stretch.data[param], p.numel(), p.scalar_type()};
    stretch.param_bytes = bytes_of(p);
    stretch.grad_bytes = bytes_of(lists[grad][i]);
    stretch.moment_bytes = bytes_of(lists[exp_avg][i]);
    steps[i] = static_cast<float*>(lists.state_steps[i].mutable_data());
    stretch.function = pick_function(kernels, p, lists[grad][i]);
    const double factor = coefs[static_cast<int64_t>(i) * next_coef];
    stretch.step.grad_coef = options.maximize ? -factor : factor;
    bias_correction.at(static_cast<double>(*steps[i]) + 1.0, stretch.step);
  }
  const std::vector<Chunk> chunks = cut(spans);
  // Nothing was written so far, and nothing throws from here on.
  for (float* step : steps) {
    *step += 1.0f;
  }
  for_each_chunk(chunks, [&](int64_t c) {
    stretches[chunks[c].span].run(chunks[c].begin, chunks[c].size, rule);
  });
  stretches.copy_back();
}

// What TORCH_BOX would write, but for the lists.
void adamw_boxed(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::to;
  const Lists lists(stack);
  const auto coef = to<Tensor>(stack[6]);
  const auto verdict = to<Tensor>(stack[7]);
  adamw(
      lists,
      coef,
      verdict,
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
