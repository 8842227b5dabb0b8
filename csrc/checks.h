// Argument checks shared by the CPU and CUDA kernels.
#pragma once

#include "decide.h"
#include "memory.h"

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace fastguard {

inline void check_tensor(
    const torch::stable::Tensor& tensor,
    const char* op,
    const char* name,
    torch::headeronly::ScalarType dtype,
    int64_t dim) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype && tensor.dim() == dim && tensor.is_contiguous(),
      op,
      ": ",
      name,
      " must be a contiguous tensor of dtype number ",
      static_cast<int>(dtype),
      " with ",
      dim,
      " dimensions; got dtype number ",
      static_cast<int>(tensor.scalar_type()),
      " and ",
      tensor.dim(),
      " dimensions");
  check_memory(tensor.get(), op, [&] { return name; });
}

// The checks of a list's tensors take a torch::stable::Tensor or a TensorView.

template <class AnyTensor>
void check_dtype(const AnyTensor& tensor, const char* op, size_t index) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
          dtype == ScalarType::Half,
      op,
      ": tensor ",
      index,
      " has dtype number ",
      static_cast<int>(dtype),
      "; float32, float64, bfloat16 and float16 are supported");
  check_memory(tensor, op, "tensor", index);
}

template <class AnyTensor>
void check_no_overlap(const AnyTensor& tensor, const char* op, size_t index) {
  if (tensor.is_contiguous()) {
    return;
  }
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    STD_TORCH_CHECK(
        tensor.stride(dim) != 0 || tensor.size(dim) <= 1 || tensor.numel() == 0,
        op,
        ": tensor ",
        index,
        " is expanded: several of its elements share a single memory location; clone it");
  }
}

template <class AnyTensor>
bool same_shape(const AnyTensor& a, const AnyTensor& b) {
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

inline void check_total_norm(const torch::stable::Tensor& total_norm) {
  STD_TORCH_CHECK(
      total_norm.dim() == 0 && total_norm.scalar_type() == torch::headeronly::ScalarType::Double,
      "decide: total_norm must be a float64 tensor of shape (), as grad_norm returns it; got ",
      total_norm.dim(),
      " dimensions and dtype number ",
      static_cast<int>(total_norm.scalar_type()));
  check_memory(total_norm.get(), "decide", [] { return "total_norm"; });
}

// A factor for all of n gradients, shape (), or one for each, shape (n,).
inline void check_coef(
    const torch::stable::Tensor& coef, const char* op, const char* name, int64_t n) {
  STD_TORCH_CHECK(
      coef.scalar_type() == torch::headeronly::ScalarType::Double && coef.is_contiguous() &&
          (coef.dim() == 0 || (coef.dim() == 1 && coef.numel() == n)),
      op,
      ": ",
      name,
      " must be a float64 tensor of shape () or (",
      n,
      ",), as decide returns it; got ",
      coef.dim(),
      " dimensions, ",
      coef.numel(),
      " elements and dtype number ",
      static_cast<int>(coef.scalar_type()));
  check_memory(coef.get(), op, [&] { return name; });
}

inline void check_measured(
    const char* op, const torch::stable::Tensor& total_norm, const torch::stable::Tensor& norms) {
  check_tensor(total_norm, op, "total_norm", torch::headeronly::ScalarType::Double, 0);
  check_tensor(norms, op, "norms", torch::headeronly::ScalarType::Double, 1);
  STD_TORCH_CHECK(
      norms.numel() <= INT32_MAX, op, ": norms of ", norms.numel(), " gradients are too many");
}

// `tensors`: the number of gradients.
inline void check_guard_decide(
    const char* op,
    int64_t tensors,
    const std::optional<torch::stable::Tensor>& unscale,
    const std::optional<torch::stable::Tensor>& loss,
    const torch::stable::Tensor& statistics,
    const torch::stable::Tensor& seen_norms,
    const torch::stable::Tensor& accepted_norms,
    const torch::stable::Tensor& per_tensor,
    int64_t threshold,
    const std::vector<double>& options) {
  using torch::headeronly::ScalarType;
  constexpr auto adagc = static_cast<int64_t>(Threshold::adagc);
  if (unscale.has_value()) {
    check_tensor(*unscale, op, "unscale", ScalarType::Double, 0);
  }
  if (loss.has_value()) {
    check_tensor(*loss, op, "loss", ScalarType::Double, 0);
  }
  check_tensor(statistics, op, "statistics", ScalarType::Double, 1);
  check_tensor(seen_norms, op, "seen_norms", ScalarType::Double, 1);
  check_tensor(accepted_norms, op, "accepted_norms", ScalarType::Double, 1);
  check_tensor(per_tensor, op, "per_tensor", ScalarType::Double, 2);
  STD_TORCH_CHECK(
      statistics.numel() == 4 && options.size() == 3,
      op,
      ": statistics and options must have 4 and 3 elements; got ",
      statistics.numel(),
      " and ",
      options.size());
  STD_TORCH_CHECK(
      seen_norms.numel() >= 1 && accepted_norms.numel() == seen_norms.numel(),
      op,
      ": seen_norms and accepted_norms must have one length, at least 1; got ",
      seen_norms.numel(),
      " and ",
      accepted_norms.numel());
  STD_TORCH_CHECK(
      threshold >= 0 && threshold <= adagc,
      op,
      ": threshold must be 0 to ",
      adagc,
      ", the numbers in fastguard/thresholds.py; got ",
      threshold);
  STD_TORCH_CHECK(
      per_tensor.size(0) == 4 &&
          (per_tensor.size(1) == tensors || (per_tensor.size(1) == 0 && threshold != adagc)),
      op,
      ": per_tensor must have 4 rows and a column for each of the ",
      tensors,
      " gradients, or none without AdaGC; got ",
      per_tensor.size(0),
      " rows and ",
      per_tensor.size(1),
      " columns");
}

// A GradScaler's scale and growth tracker, both or neither, and growth factor, backoff factor and
// growth interval.
inline void check_growth(
    const char* op,
    const std::optional<torch::stable::Tensor>& scale,
    const std::optional<torch::stable::Tensor>& growth_tracker,
    const std::vector<double>& growth) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(
      scale.has_value() == growth_tracker.has_value() && growth.size() == 3,
      op,
      ": scale and growth_tracker come together, and growth has 3 numbers; got ",
      growth.size());
  if (scale.has_value()) {
    STD_TORCH_CHECK(
        scale->numel() == 1 && scale->scalar_type() == ScalarType::Float &&
            growth_tracker->numel() == 1 && growth_tracker->scalar_type() == ScalarType::Int,
        op,
        ": scale and growth_tracker must be one float32 and one int32");
    check_memory(scale->get(), op, [] { return "scale"; });
    check_memory(growth_tracker->get(), op, [] { return "growth_tracker"; });
  }
}

template <class AnyTensor>
void check_pair(const AnyTensor& sum, const AnyTensor& grad, size_t i) {
  using torch::headeronly::ScalarType;
  check_dtype(sum, "accumulate_", i);
  check_no_overlap(sum, "accumulate_", i);
  check_dtype(grad, "accumulate_", i);
  const bool wide = grad.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(
      same_shape(sum, grad) && sum.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
      "accumulate_: sum ",
      i,
      " must have its gradient's shape, and be float64 for a float64 gradient, float32 for any "
      "other");
}

// Tensors: a TensorList, or a std::vector of tensors.
template <class Tensors>
void check_accumulate(
    const Tensors& sums,
    const Tensors& grads,
    const torch::stable::Tensor& verdict,
    const torch::stable::Tensor& window) {
  using torch::headeronly::ScalarType;
  check_tensor(verdict, "accumulate_", "verdict", ScalarType::Long, 0);
  check_tensor(window, "accumulate_", "window", ScalarType::Double, 1);
  STD_TORCH_CHECK(
      sums.size() == grads.size() && window.numel() == 3,
      "accumulate_: as many gradients as sums and a window of 3 numbers are needed; got ",
      sums.size(),
      " sums, ",
      grads.size(),
      " gradients and ",
      window.numel(),
      " numbers");
  for (size_t i = 0; i < sums.size(); ++i) {
    check_pair(sums[i], grads[i], i);
  }
}

// The number of floating-point numbers per element of a buffer: 2 for complex dtypes, 0 for
// integers and for formats that no kernel reads.
inline int64_t numbers_in(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Float:
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 1;
    case ScalarType::ComplexDouble:
    case ScalarType::ComplexFloat:
    case ScalarType::ComplexHalf:
      return 2;
    default:
      return 0;
  }
}

// The dtype of these numbers.
inline torch::headeronly::ScalarType real_of(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::ComplexDouble:
      return ScalarType::Double;
    case ScalarType::ComplexFloat:
      return ScalarType::Float;
    case ScalarType::ComplexHalf:
      return ScalarType::Half;
    default:
      return dtype;
  }
}

// owners: for each buffer the number of its owner, from 0 to the number of buffers - 1. Only their
// device can check the numbers themselves: see check_owner.
inline void check_settle(
    const std::vector<torch::stable::Tensor>& buffers,
    const std::vector<torch::stable::Tensor>& saved,
    const torch::stable::Tensor& verdict,
    const torch::stable::Tensor& owners) {
  using torch::headeronly::ScalarType;
  check_tensor(verdict, "settle_", "verdict", ScalarType::Long, 0);
  check_tensor(owners, "settle_", "owners", ScalarType::Long, 1);
  STD_TORCH_CHECK(
      buffers.size() == saved.size() && static_cast<int64_t>(buffers.size()) == owners.numel(),
      "settle_: ",
      buffers.size(),
      " buffers but ",
      saved.size(),
      " saved copies and ",
      owners.numel(),
      " owners");
  for (size_t i = 0; i < buffers.size(); ++i) {
    STD_TORCH_CHECK(
        buffers[i].sizes().equals(saved[i].sizes()) &&
            buffers[i].scalar_type() == saved[i].scalar_type(),
        "settle_: buffer ",
        i,
        " and its saved copy differ in shape or dtype");
    check_no_overlap(buffers[i], "settle_", i);
    check_no_overlap(saved[i], "settle_", i);
    check_memory(buffers[i], "settle_", "buffer", i);
    check_memory(saved[i], "settle_", "saved copy", i);
  }
}

inline void check_owner(int64_t owner, size_t buffers) {
  STD_TORCH_CHECK(
      0 <= owner && owner < static_cast<int64_t>(buffers),
      "settle_: owners must be numbers from 0 to ",
      static_cast<int64_t>(buffers) - 1,
      ", one for each buffer; got ",
      owner);
}

}  // namespace fastguard
