// Torch's tensors in the form that a plan takes.
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

// Tensors in the form that a plan takes. `written`: whether a kernel writes them.
class PlanTensors : public DenseList {
 public:
  PlanTensors(
      const std::vector<torch::stable::Tensor>& tensors, int device, const char* op, bool written)
      : DenseList(checked(tensors, device, op, written), written) {
    given.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      const torch::stable::Tensor& values = (*this)[i].tensor;
      const Type type = type_of(values.scalar_type());
      const void* data = written ? values.mutable_data_ptr() : values.const_data_ptr();
      given.push_back({data, nullptr, values.numel(), type, type, (*this)[i].permutation});
    }
  }

  std::vector<Given> given;

 private:
  static const std::vector<torch::stable::Tensor>& checked(
      const std::vector<torch::stable::Tensor>& tensors, int device, const char* op, bool written) {
    check_devices(tensors, device, op);
    for (size_t i = 0; i < tensors.size(); ++i) {
      check_dtype(tensors[i], op, i);
      if (written) {
        check_no_overlap(tensors[i], op, i);
      }
    }
    return tensors;
  }
};

}  // namespace fastguard
