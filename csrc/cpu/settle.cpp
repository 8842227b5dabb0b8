// settle_: copies the saved values back into all buffers on a skip, and into the buffers of an
// owner if one of them was finite in its copy and is not finite now. Else it updates the copies.
// Reference: settle_ref_ in fastguard/ops/settle.py.

#include "checks.h"
#include "decide.h"
#include "dense.h"
#include "finite.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <vector>

namespace fastguard {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Word>
bool any_lost(const void* now, const void* saved, int64_t n, Word exponent) {
  const auto* const x = static_cast<const Word*>(now);
  const auto* const y = static_cast<const Word*>(saved);
  bool any = false;
  for (int64_t i = 0; i < n; ++i) {
    any |= lost(x[i], y[i], exponent);
  }
  return any;
}

// Whether an element is finite in the copy and not in the buffer; false for integers.
bool lost_something(const Tensor& buffer, const Tensor& saved) {
  const int64_t numbers = numbers_in(buffer.scalar_type());
  if (numbers == 0) {
    return false;
  }
  const Tensor now = densify(buffer).tensor;
  const Tensor before = laid_out_as(saved, now);
  const void* x = now.const_data_ptr();
  const void* y = before.const_data_ptr();
  const int64_t n = numbers * now.numel();
  switch (real_of(buffer.scalar_type())) {
    case ScalarType::Double:
      return any_lost(x, y, n, exponent_of_float64);
    case ScalarType::Float:
      return any_lost(x, y, n, exponent_of_float32);
    case ScalarType::BFloat16:
      return any_lost(x, y, n, exponent_of_bfloat16);
    default:
      return any_lost(x, y, n, exponent_of_float16);
  }
}

// For most buffers a dispatched copy takes longer than the copy itself. The memory of complex
// numbers may be that of a lazy conj().
constexpr int64_t small_bytes = 1 << 16;

int64_t bytes_of(const Tensor& tensor) {
  return tensor.numel() * static_cast<int64_t>(tensor.element_size());
}

bool copies_memory(const Tensor& to, const Tensor& from) {
  return bytes_of(to) <= small_bytes && numbers_in(to.scalar_type()) < 2 && to.is_contiguous() &&
      from.is_contiguous();
}

void copy(Tensor to, const Tensor& from) {
  if (copies_memory(to, from)) {
    if (bytes_of(to) > 0) {
      std::memmove(to.mutable_data_ptr(), from.const_data_ptr(), bytes_of(to));  // they may overlap
    }
  } else {
    torch::stable::copy_(to, from);
  }
}

Tensor settle_cpu(
    const std::vector<Tensor>& buffers,
    const std::vector<Tensor>& saved,
    const Tensor& verdict,
    const Tensor& owners) {
  check_settle(buffers, saved, verdict, owners);
  const NoGrad no_grad;
  const bool skip = skips(*verdict.const_data_ptr<int64_t>());
  const int64_t* const owner = owners.const_data_ptr<int64_t>();
  const size_t n = buffers.size();
  Tensor result = torch::stable::new_zeros(verdict, {2 * static_cast<int64_t>(n)}, ScalarType::Int);
  int32_t* const of_buffer = result.mutable_data_ptr<int32_t>();
  int32_t* const of_owner = of_buffer + n;
  for (size_t i = 0; i < n; ++i) {
    check_owner(owner[i], n);
    if (!skip && lost_something(buffers[i], saved[i])) {
      of_buffer[i] = of_owner[owner[i]] = 1;
    }
  }
  const auto restores = [&](size_t i) { return skip || of_owner[owner[i]] != 0; };
  for (size_t i = 0; i < n; ++i) {
    if (!copies_memory(buffers[i], saved[i])) {
      check_copies_into(restores(i) ? buffers[i] : saved[i]);
    }
  }
  // Nothing was written so far, and nothing throws from here on.
  for (size_t i = 0; i < n; ++i) {
    restores(i) ? copy(buffers[i], saved[i]) : copy(saved[i], buffers[i]);
  }
  return result;
}

}  // namespace
}  // namespace fastguard

STABLE_TORCH_LIBRARY_IMPL(fastguard, CPU, m) {
  m.impl("settle_", TORCH_BOX(&fastguard::settle_cpu));
}
