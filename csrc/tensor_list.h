// A list of tensors as bare handles, as the dispatcher passes it to a kernel. A kernel takes a
// StableListHandle for it: for a std::vector of tensors, TORCH_BOX would allocate a shared_ptr
// each.
#pragma once

#include "memory.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace fastguard {

// The dtype behind the shim's number. torch's own conversion compares the number with that of each
// dtype in turn, and gets each by a call.
inline torch::headeronly::ScalarType scalar_type_of(int32_t dtype) {
  using torch::headeronly::ScalarType;
  static const int32_t float32 = aoti_torch_dtype_float32();
  static const int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  if (dtype == float32) {
    return ScalarType::Float;
  }
  if (dtype == bfloat16) {
    return ScalarType::BFloat16;
  }
  return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(dtype));
}

// The properties of a tensor that a kernel needs, borrowed from the list that owns it.
class TensorView {
 public:
  explicit TensorView(AtenTensorHandle handle) : handle_(handle) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim_));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes_));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype_));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle, &contiguous_));
    scalar_type_ = scalar_type_of(dtype_);
    for (int64_t dim = 0; dim < dim_; ++dim) {
      numel_ *= sizes_[dim];
    }
  }

  AtenTensorHandle handle() const { return handle_; }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t dim) const { return sizes_[dim]; }
  // The shim's number of the dtype. Equal numbers mean equal dtypes.
  int32_t dtype() const { return dtype_; }

  torch::headeronly::ScalarType scalar_type() const { return scalar_type_; }
  int64_t numel() const { return numel_; }
  bool is_contiguous() const { return contiguous_; }

  const int64_t* strides() const {
    int64_t* strides;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle_, &strides));
    return strides;
  }

  int64_t stride(int64_t dim) const { return strides()[dim]; }

  const void* data() const {
    const void* data;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle_, &data));
    return data;
  }

  // Gives a copy-on-write tensor its own memory. Several threads must not call it at once.
  void* mutable_data() const {
    void* data;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_, &data));
    return data;
  }

  // The same tensor, owned.
  torch::stable::Tensor tensor() const {
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_, &handle));
    return torch::stable::Tensor(handle);
  }

 private:
  AtenTensorHandle handle_;
  int64_t dim_;
  int64_t* sizes_;
  int32_t dtype_;
  bool contiguous_;
  torch::headeronly::ScalarType scalar_type_;
  int64_t numel_ = 1;
};

// check_memory of memory.h, without the strides of a contiguous tensor.
inline void check_memory(const TensorView& tensor, const char* op, const char* name, size_t index) {
  const auto named = [&] { return name_in_list(name, index); };
  if (!tensor.is_contiguous()) {
    check_memory(tensor.handle(), op, named);
  } else if (tensor.numel() > 0) {
    check_reach(tensor.handle(), tensor.numel(), tensor.dtype(), op, named);
  }
}

class TensorList {
 public:
  // Takes the list and its tensors over.
  explicit TensorList(StableListHandle list) {
    size_t size = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    tensors_.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue element;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
      tensors_.emplace_back(torch::stable::detail::to<AtenTensorHandle>(element));
    }
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  }

  ~TensorList() {
    for (const TensorView& tensor : tensors_) {
      aoti_torch_delete_tensor_object(tensor.handle());
    }
  }

  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  size_t size() const { return tensors_.size(); }
  const TensorView& operator[](size_t index) const { return tensors_[index]; }

 private:
  std::vector<TensorView> tensors_;
};

}  // namespace fastguard
