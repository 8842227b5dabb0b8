// The arguments of adamw_ on every device, their checks, and copies of tensors that a kernel cannot
// read as one range of memory.
#pragma once

#include "adamw_options.h"
#include "checks.h"
#include "dense.h"
#include "packed.h"
#include "tensor_list.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace fastguard::adamw {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The packed state, in the order of the op's arguments.
enum Role { exp_avg, exp_avg_sq, max_exp_avg_sq, roles };
inline constexpr const char* names[] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};

struct Arguments {
  // The op's arguments, as TORCH_BOX would take them except for the lists.
  explicit Arguments(StableIValue* stack)
      : params(torch::stable::detail::to<StableListHandle>(stack[0])),
        grads(torch::stable::detail::to<StableListHandle>(stack[1])),
        moments{owned(stack[2]), owned(stack[3]), owned(stack[4])},
        state_steps(owned(stack[5])),
        grad_coef(owned(stack[6])),
        verdict(owned(stack[7])),
        options{
            number(stack[8]),
            number(stack[9]),
            number(stack[10]),
            number(stack[11]),
            number(stack[12]),
            flag(stack[13]),
            flag(stack[15])},
        amsgrad(flag(stack[14])),
        master_param(torch::stable::detail::to<std::optional<Tensor>>(stack[16])) {}

  static Tensor owned(StableIValue value) { return torch::stable::detail::to<Tensor>(value); }

  static double number(StableIValue value) { return torch::stable::detail::to<double>(value); }
  static bool flag(StableIValue value) { return torch::stable::detail::to<bool>(value); }

  TensorList params;
  TensorList grads;
  std::array<Tensor, roles> moments;
  Tensor state_steps;
  Tensor grad_coef;
  Tensor verdict;
  AdamwOptions options;
  bool amsgrad;
  std::optional<Tensor> master_param;
};

inline std::string shape_of(const TensorView& tensor) {
  std::ostringstream out;
  out << "(";
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    out << (dim > 0 ? ", " : "") << tensor.size(dim);
  }
  out << (tensor.dim() == 1 ? ",)" : ")");
  return out.str();
}

inline const char* dtype_of(const TensorView& tensor) {
  return torch::headeronly::toString(tensor.scalar_type());
}

// Whether two tensors of one shape have the same order of elements and the same gaps.
inline bool same_layout(const TensorView& tensor, const Tensor& like) {
  const int64_t* strides = tensor.strides();
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    if (tensor.size(dim) > 1 && strides[dim] != like.stride(dim)) {
      return false;
    }
  }
  return true;
}

// Whether two elements may share memory. In the order of the strides, each dimension must step over
// the memory that the dimensions before it cover.
inline bool may_overlap(const TensorView& tensor) {
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

inline void check_scalars(const TensorView& grad_coef, const TensorView& verdict, size_t n) {
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
  check_memory(grad_coef.handle(), "adamw_", [] { return "grad_coef"; });
  check_memory(verdict.handle(), "adamw_", [] { return "verdict"; });
}

inline void check_packed(
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
  check_memory(view.handle(), "adamw_", [&] { return name; });
}

inline void check_tensors(
    const TensorView& p, const TensorView& g, size_t index, bool wide, bool has_master) {
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
      !has_master || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      "adamw_: params[",
      index,
      "] has dtype ",
      dtype_of(p),
      "; with master_param all must be bfloat16 or float16. Parameters without masters need a call "
      "of their own");
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
  check_memory(p, "adamw_", "parameter", index);
  check_memory(g, "adamw_", "gradient", index);
}

// The memory of a parameter and of its gradient, each as one range without gaps and in the same
// order. It is the parameter's own order, or row-major order if the parameter has gaps. The moments
// have this order too.
struct Places {
  char* param;
  const char* grad;
};

// Copies of parameters with gaps, and of gradients with another memory layout than their parameter.
class StandIns {
 public:
  Places place(const TensorView& p, const TensorView& g) {
    if (p.is_contiguous() && g.is_contiguous()) {
      return {static_cast<char*>(p.mutable_data()), static_cast<const char*>(g.data())};
    }
    const Tensor given = p.tensor();
    const Dense dense = densify(given);
    if (dense.copied) {
      check_copies_into(given);
      written_.emplace_back(given, dense.tensor);
    }
    char* const param = static_cast<char*>(dense.tensor.mutable_data_ptr());
    if (same_layout(g, dense.tensor)) {
      return {param, static_cast<const char*>(g.data())};
    }
    const Tensor copy = like(dense.tensor, g.scalar_type());
    torch::stable::copy_(kept_.emplace_back(copy), g.tensor());
    return {param, static_cast<const char*>(copy.const_data_ptr())};
  }

  // Writes the copies back into their parameters.
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

inline bool is_wide(const Arguments& given) {
  return given.params.size() > 0 && given.params[0].scalar_type() == ScalarType::Double;
}

// Checks the arguments; returns the parameters' packed_offsets.
inline std::vector<int64_t> check(const Arguments& given) {
  const size_t n = given.params.size();
  const bool wide = is_wide(given);
  STD_TORCH_CHECK(
      given.grads.size() == n,
      "adamw_: grads has ",
      given.grads.size(),
      " tensors; with ",
      n,
      " params it must have as many");
  check_scalars(TensorView(given.grad_coef.get()), TensorView(given.verdict.get()), n);
  for (size_t i = 0; i < n; ++i) {
    check_tensors(given.params[i], given.grads[i], i, wide, given.master_param.has_value());
  }
  const ScalarType moment = wide ? ScalarType::Double : ScalarType::Float;
  // The checks above made sure that the memory of each parameter exists, so the sum is in range.
  const std::vector<int64_t> offsets = packed_offsets(given.params);
  for (int role = exp_avg; role < roles; ++role) {
    const bool unused = role == max_exp_avg_sq && !given.amsgrad;
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
  if (given.master_param) {
    check_packed(
        *given.master_param,
        "master_param",
        ScalarType::Float,
        offsets.back(),
        "the last of packed_offsets");
  }
  return offsets;
}

}  // namespace fastguard::adamw
