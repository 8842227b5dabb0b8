// Torch's tensors as a plan is given them.
#pragma once

#include "checks.h"
#include "cuda/launch.h"
#include "dense.h"

namespace fastguard {

inline Type type_of(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Double:
      return Type::float64;
    case ScalarType::Float:
      return Type::float32;
    case ScalarType::BFloat16:
      return Type::bfloat16;
    default:
      return Type::float16;
  }
}

inline void check_devices(
    const std::vector<torch::stable::Tensor>& tensors, int device, const char* op) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    STD_TORCH_CHECK(
        cuda_device_of(tensors[i].get()) == device,
        op,
        ": tensor ",
        i,
        " is not on cuda:",
        device,
        " as the others are; call it once for each device");
  }
}

// The tensors' memory as it is, or copies in place of those that have gaps.
class Dense1D {
 public:
  Dense1D(const std::vector<torch::stable::Tensor>& tensors, int device, const char* op, bool written)
      : given_(tensors) {
    check_devices(tensors, device, op);
    for (size_t i = 0; i < tensors.size(); ++i) {
      check_dtype(tensors[i], op, i);
      if (written) {
        check_no_overlap(tensors[i], op, i);
      }
    }
    for (const torch::stable::Tensor& tensor : tensors) {
      dense_.push_back(densify(tensor));
      const Dense& dense = dense_.back();
      const torch::stable::Tensor& values = dense.tensor;
      const Type type = type_of(values.scalar_type());
      std::vector<PlanDim> dims;
      for (const Dense::Dim& dim : dense.permutation) {
        dims.push_back({dim.stride, dim.row_major_stride});
      }
      const void* data = written ? values.mutable_data_ptr() : values.const_data_ptr();
      given.push_back({data, nullptr, values.numel(), type, type, std::move(dims)});
    }
  }

  void copy_back() const {
    for (size_t i = 0; i < given_.size(); ++i) {
      if (dense_[i].copied) {
        torch::stable::Tensor to = given_[i];
        torch::stable::copy_(to, dense_[i].tensor);
      }
    }
  }

  const torch::stable::Tensor& operator[](size_t index) const { return dense_[index].tensor; }

  std::vector<Given> given;

 private:
  const std::vector<torch::stable::Tensor>& given_;
  std::vector<Dense> dense_;
};

}  // namespace fastguard
