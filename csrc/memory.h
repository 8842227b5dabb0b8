// Checks of a tensor's memory before a kernel gets its address; for every device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace fastguard {

// Checks that the storage holds `reach` elements from the tensor's first one on.
template <class Name>
void check_reach(
    AtenTensorHandle tensor, int64_t reach, int32_t dtype, const char* op, const Name& name) {
  int64_t storage, offset;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor, &storage));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor, &offset));
  const int64_t bytes =
      (offset + reach) * static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
  STD_TORCH_CHECK(
      bytes <= storage,
      op,
      ": ",
      name(),
      " reaches ",
      bytes,
      " bytes into a storage of ",
      storage,
      ": its memory was freed or shrunk");
}

// Checks that the storage holds the whole tensor. It may not after `untyped_storage().resize_`,
// which sharded training calls to free a parameter while tensors still refer to it. name() returns
// the tensor's name for an error.
template <class Name>
void check_memory(AtenTensorHandle tensor, const char* op, Name name) {
  int64_t dim;
  int64_t *sizes, *strides;
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &dim));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &sizes));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &strides));
  int64_t last = 0;
  for (int64_t i = 0; i < dim; ++i) {
    if (sizes[i] == 0) {
      return;
    }
    last += (sizes[i] - 1) * strides[i];
  }
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
  check_reach(tensor, last + 1, dtype, op, name);
}

// The name of a tensor of a list, for an error.
inline std::string name_in_list(const char* name, size_t index) {
  return std::string(name) + " " + std::to_string(index);
}

// check_memory for a tensor of a list.
inline void check_memory(
    const torch::stable::Tensor& tensor, const char* op, const char* name, size_t index) {
  check_memory(tensor.get(), op, [&] { return name_in_list(name, index); });
}

// A new tensor on the device of `like`, from the shim, because torch::stable::new_empty takes about
// 1 us for the dispatcher. `dtype` is the shim's number.
inline torch::stable::Tensor empty_strided(
    const torch::stable::Tensor& like,
    std::initializer_list<int64_t> sizes,
    std::initializer_list<int64_t> strides,
    int32_t dtype) {
  int32_t type, index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()),
      sizes.begin(),
      strides.begin(),
      dtype,
      type,
      index,
      &handle));
  return torch::stable::Tensor(handle);
}

// Turns autograd off while it lives. Operators write tensors with gaps through torch's copy_, and
// autograd forbids this for a leaf that requires a gradient. The kernels' own writes to leaves
// without gaps are not affected.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool before_;
};

// Raises the error of a later copy_ into the tensor, before anything is written.
inline void check_copies_into(const torch::stable::Tensor& tensor) {
  torch::stable::Tensor given = tensor.dim() == 0 ? torch::stable::unsqueeze(tensor, 0) : tensor;
  torch::stable::Tensor none = torch::stable::narrow(given, 0, 0, 0);
  torch::stable::copy_(none, torch::stable::empty_like(none));
}

}  // namespace fastguard
