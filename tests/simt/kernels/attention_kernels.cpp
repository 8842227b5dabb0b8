// Attention's kernels, bound to Python as their launcher in csrc/cuda/attention.cu calls them.
#include "cuda/attention_backward.cuh"
#include "cuda/attention_forward.cuh"
#include "simt/bind.h"

namespace fastguard {
namespace {

using simt::Machine;
using simt::Options;
namespace py = pybind11;

// first element, first byte of its storage, bytes of that, strides
using Strided = std::tuple<uintptr_t, uintptr_t, int64_t, std::vector<int64_t>>;

class Arguments {
 public:
  Arguments(Machine& machine, const py::dict& given) : machine_(machine), given_(given) {}

  // Null where it is None.
  template <class T>
  T* pointer(const char* name) const {
    const py::object value = given_[name];
    if (value.is_none()) {
      return nullptr;
    }
    const auto [data, storage, bytes, strides] = value.cast<Strided>();
    machine_.memory.allow(reinterpret_cast<void*>(storage), bytes, name, !std::is_const_v<T>);
    return reinterpret_cast<T*>(data);
  }

  std::vector<int64_t> strides(const char* name) const {
    const py::object value = given_[name];
    return value.is_none() ? std::vector<int64_t>(4) : std::get<3>(value.cast<Strided>());
  }

  template <class T>
  Heads<T> heads(const char* name) const {
    const auto by = strides(name);
    return {pointer<T>(name), by[0], by[1], by[2]};
  }

  template <class T = double>
  T number(const char* name) const {
    return given_[name].cast<T>();
  }

  Attention attention() const {
    const auto by = strides(given_["mask_kind"].cast<std::string>().c_str());
    const auto padding = strides("padding");
    return {
        number<int>("heads"),
        number<int>("kv_heads"),
        number<int>("queries"),
        number<int>("keys"),
        number<int>("head_dim"),
        number<int>("value_dim"),
        number<float>("scale"),
        number<float>("softcap"),
        number<float>("clamp"),
        dropout_of(number("dropout_p")),
        pointer<const int64_t>("seed"),
        {pointer<const uint8_t>("padding"),
         padding[0],
         padding[1],
         pointer<const uint8_t>("shown"),
         pointer<const float>("added"),
         pointer<const uint16_t>("narrow"),
         by[0],
         by[1],
         by[2],
         by[3],
         number<bool>("is_causal")}};
  }

 private:
  Machine& machine_;
  const py::dict& given_;
};

template <class T>
simt::Report attention(const Options& options, const py::dict& given) {
  Machine machine(options);
  const Arguments arguments(machine, given);
  const Forward<T> forward{
      arguments.attention(),
      arguments.heads<const T>("query"),
      arguments.heads<const T>("key"),
      arguments.heads<const T>("value"),
      arguments.heads<T>("output"),
      arguments.heads<float>("unrounded"),
      arguments.pointer<float>("logsumexp"),
      arguments.pointer<float>("stats"),
      arguments.number<int64_t>("rows")};
  const Attention& a = forward.attention;
  with_width<T>(std::max(a.head_dim, a.value_dim), [&](auto width) {
    using Tiles = ForwardTiles<T, width>;
    machine.launch(
        "attention_kernel",
        Tiles::blocks(a, arguments.number<int>("batch")),
        attention_threads,
        Tiles::bytes,
        false,
        attention_kernel<T, width>,
        forward);
  });
  return machine.report();
}

template <class T>
simt::Report attention_backward(const Options& options, const py::dict& given) {
  Machine machine(options);
  const Arguments arguments(machine, given);
  const Backward<T> backward{
      arguments.attention(),
      arguments.number<int>("batch"),
      arguments.number<int>("terms_rows"),
      arguments.heads<const T>("query"),
      arguments.heads<const T>("key"),
      arguments.heads<const T>("value"),
      arguments.heads<const T>("output"),
      arguments.heads<const float>("unrounded"),
      arguments.heads<const T>("grad_output"),
      arguments.pointer<const float>("logsumexp"),
      arguments.heads<T>("passed"),
      arguments.pointer<RowTerms>("terms"),
      arguments.heads<T>("grad_query"),
      arguments.heads<T>("grad_key"),
      arguments.heads<T>("grad_value")};
  const Attention& a = backward.attention;
  const auto launch = [&](const char* name, int64_t blocks, int shared, auto* kernel) {
    machine.launch(name, blocks, attention_threads, shared, false, kernel, backward);
  };
  const bool is_rounded = backward.output.first != nullptr;
  const auto delta = is_rounded ? attention_delta_kernel<T, T> : attention_delta_kernel<T, float>;
  launch("attention_delta_kernel", backward.delta_blocks(), 0, delta);
  with_width<T>(std::max(a.head_dim, a.value_dim), [&](auto width) {
    using Tiles = BackwardTiles<T, width>;
    launch(
        "attention_grad_query_kernel",
        Tiles::query_blocks(backward),
        Tiles::bytes,
        attention_grad_query_kernel<T, width>);
    launch(
        "attention_grad_key_kernel",
        Tiles::key_blocks(backward),
        Tiles::bytes,
        attention_grad_key_kernel<T, width>);
  });
  return machine.report();
}

}  // namespace
}  // namespace fastguard

PYBIND11_MODULE(attention_kernels, m) {
  simt::raise_errors_in_python();
  m.def("attention_bfloat16", &fastguard::attention<fastguard::BFloat16>);
  m.def("attention_float16", &fastguard::attention<fastguard::Float16>);
  m.def("attention_float32", &fastguard::attention<float>);
  m.def("attention_backward_bfloat16", &fastguard::attention_backward<fastguard::BFloat16>);
  m.def("attention_backward_float16", &fastguard::attention_backward<fastguard::Float16>);
  m.def("attention_backward_float32", &fastguard::attention_backward<float>);
}
