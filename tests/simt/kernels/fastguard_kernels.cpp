// The kernels of csrc/cuda, bound to Python as their launchers in csrc/cuda/*.cu call them.
#include "cuda/accumulate.cuh"
#include "cuda/adamw.cuh"
#include "cuda/build_plan.cuh"
#include "cuda/clip.cuh"
#include "cuda/decide.cuh"
#include "cuda/grad_norm.cuh"
#include "cuda/plan.h"
#include "cuda/scale.cuh"
#include "cuda/settle.cuh"
#include "simt/bind.h"

#include <optional>

namespace fastguard {
namespace {

using simt::allow;
using simt::Machine;
using simt::Options;
namespace py = pybind11;

// data, other (0 for none), numel, type, type of the other, (stride, row-major stride)...
using Tensor =
    std::tuple<uintptr_t, uintptr_t, int64_t, int, int, std::vector<std::pair<int64_t, int64_t>>>;
using Tensors = std::vector<Tensor>;

// A machine whose memory holds the tensors and their plan.
class Device {
 public:
  // `writes` the tensors, `writes_others` those of the second list.
  Device(const Options& options, const Tensors& tensors, bool writes, bool writes_others = false)
      : machine(options),
        host_(given(tensors, writes, writes_others)),
        memory_(host_.bytes() / sizeof(Word16)) {
    std::memset(static_cast<void*>(memory_.data()), 0xff, host_.bytes());
    machine.memory.allow(memory_.data(), host_.bytes(), "plan", true);
    plan = host_.at(memory_.data());
    for (size_t begin = 0; begin < host_.words.size(); begin += upload_words) {
      const int n = static_cast<int>(std::min<size_t>(upload_words, host_.words.size() - begin));
      UploadPart part;
      std::copy_n(&host_.words[begin], n, part.words);
      machine.launch(
          "upload_kernel",
          (n + threads - 1) / threads,
          threads,
          0,
          false,
          upload_kernel,
          part,
          &memory_[begin],
          n);
    }
    machine.launch(
        "expand_plan_kernel", plan.tensors + 1, threads, 0, false, expand_plan_kernel, plan);
  }

  Machine machine;
  Plan plan;

 private:
  std::vector<Given> given(const Tensors& tensors, bool writes, bool writes_others) {
    std::vector<Given> list;
    for (const auto& [data, other, numel, type, other_type, dims] : tensors) {
      const std::string index = std::to_string(list.size());
      allow_elements(data, numel, type, "tensor " + index, writes);
      allow_elements(other, numel, other_type, "other " + index, writes_others);
      std::vector<PermutedDim> permutation;
      for (const auto& [stride, row_major_stride] : dims) {
        permutation.push_back({stride, row_major_stride});
      }
      list.push_back(
          {reinterpret_cast<void*>(data),
           reinterpret_cast<void*>(other),
           numel,
           static_cast<Type>(type),
           static_cast<Type>(other_type),
           permutation});
    }
    return list;
  }

  void allow_elements(
      uintptr_t data, int64_t numel, int type, const std::string& name, bool writable) {
    if (data != 0 && numel != 0) {
      const int64_t bytes = numel * bytes_of(static_cast<Type>(type));
      machine.memory.allow(reinterpret_cast<void*>(data), bytes, name, writable);
    }
  }

  HostPlan host_;
  std::vector<Word16> memory_;
};

template <class T>
T* allow_if(Machine& machine, const py::dict& arrays, const char* name) {
  const py::object array = arrays[name];
  return array.is_none() ? nullptr : allow<T>(machine, array.cast<py::array>(), name);
}

Norms norms_of(Machine& machine, const py::dict& out) {
  return {
      allow_if<double>(machine, out, "total_norm"),
      allow_if<double>(machine, out, "norms"),
      allow_if<int64_t>(machine, out, "nonfinite")};
}

Deciding deciding_of(Machine& machine, const py::dict& given) {
  const auto options = given["options"].cast<std::vector<double>>();
  return {
      policy_of(
          given["threshold"].cast<int64_t>(),
          given["max_norm"].cast<double>(),
          given["skip_norm"].cast<double>(),
          options),
      allow_if<const double>(machine, given, "unscale"),
      allow_if<const double>(machine, given, "loss"),
      allow_if<double>(machine, given, "statistics"),
      allow_if<double>(machine, given, "seen_norms"),
      allow_if<double>(machine, given, "accepted_norms"),
      given["seen_norms"].cast<py::array>().size(),
      allow_if<double>(machine, given, "per_tensor"),
      given["columns"].cast<int64_t>(),
      given["step"].cast<double>(),
      allow_if<float>(machine, given, "scale"),
      allow_if<int32_t>(machine, given, "growth_tracker"),
      growth_of(given["growth"].cast<std::vector<double>>()),
      allow_if<double>(machine, given, "grad_coef"),
      allow_if<int64_t>(machine, given, "verdict"),
      allow_if<double>(machine, given, "record")};
}

simt::Report grad_norm(
    const Options& options,
    int blocks,
    const Tensors& tensors,
    int repeats,
    const py::dict& out,
    const std::optional<py::dict>& decision) {
  Device device(options, tensors, false);
  const Norms norms = norms_of(device.machine, out);
  const Deciding deciding = decision ? deciding_of(device.machine, *decision) : Deciding{};
  for (int i = 0; i < repeats; ++i) {
    device.machine.launch(
        "grad_norm_kernel",
        blocks,
        threads,
        0,
        false,
        grad_norm_kernel,
        device.plan,
        norms,
        deciding);
  }
  return device.machine.report();
}

simt::Report guard_decide(
    const Options& options,
    const py::array& total_norm,
    const py::array& norms,
    const py::dict& decision) {
  Machine machine(options);
  machine.launch(
      "guard_decide_kernel",
      1,
      threads,
      0,
      false,
      guard_decide_kernel,
      deciding_of(machine, decision),
      allow<const double>(machine, total_norm, "total_norm"),
      allow<const double>(machine, norms, "norms"),
      static_cast<int32_t>(norms.size()));
  return machine.report();
}

simt::Report decide_(
    const Options& options,
    const py::array& total_norm,
    double max_norm,
    double skip_norm,
    const py::dict& out) {
  Machine machine(options);
  machine.launch(
      "decide_kernel",
      1,
      threads,
      0,
      false,
      decide_kernel,
      allow<const double>(machine, total_norm, "total_norm"),
      max_norm,
      skip_norm,
      allow_if<double>(machine, out, "clip_coef"),
      allow_if<int64_t>(machine, out, "verdict"));
  return machine.report();
}

simt::Report scale(
    const Options& options,
    int blocks,
    const Tensors& tensors,
    const py::array& clip_coef,
    int next_coef) {
  Device device(options, tensors, true);
  device.machine.launch(
      "scale_kernel",
      blocks,
      threads,
      0,
      false,
      scale_kernel,
      device.plan,
      allow<const double>(device.machine, clip_coef, "clip_coef"),
      next_coef);
  return device.machine.report();
}

simt::Report clip(
    const Options& options,
    int blocks,
    const Tensors& tensors,
    double max_norm,
    double skip_norm,
    bool float32_norm,
    const py::dict& out) {
  Device device(options, tensors, true);
  device.machine.launch(
      "clip_kernel",
      blocks,
      threads,
      kept_bytes,
      true,
      clip_kernel,
      device.plan,
      norms_of(device.machine, out),
      Clipping{
          max_norm,
          skip_norm,
          float32_norm,
          allow_if<double>(device.machine, out, "clip_coef"),
          allow_if<int64_t>(device.machine, out, "verdict")});
  return device.machine.report();
}

simt::Report adamw(
    const Options& options,
    int blocks,
    const Tensors& tensors,
    const py::dict& state,
    const py::array& grad_coef,
    int next_coef,
    const py::array& verdict,
    const py::dict& rule) {
  Device device(options, tensors, true);
  Machine& machine = device.machine;
  const auto moments = [&](const char* name) -> void* {
    const py::object array = state[name];
    if (array.is_none()) {
      return nullptr;
    }
    return array.cast<py::array>().itemsize() == sizeof(double)
        ? static_cast<void*>(allow<double>(machine, array.cast<py::array>(), name))
        : allow<float>(machine, array.cast<py::array>(), name);
  };
  const AdamwState packed{
      moments("exp_avg"),
      moments("exp_avg_sq"),
      moments("max_exp_avg_sq"),
      allow_if<float>(machine, state, "state_steps"),
      allow_if<float>(machine, state, "master_param")};
  const bool masters = packed.master_param != nullptr;
  const auto number = [&](const char* name) { return rule[name].cast<double>(); };
  machine.launch(
      "adamw_kernel",
      blocks,
      threads,
      0,
      false,
      packed.max_exp_avg_sq == nullptr
          ? (masters ? adamw_kernel<false, true> : adamw_kernel<false, false>)
          : (masters ? adamw_kernel<true, true> : adamw_kernel<true, false>),
      device.plan,
      packed,
      AdamwDecision{
          allow<const double>(machine, grad_coef, "grad_coef"),
          next_coef,
          allow<const int64_t>(machine, verdict, "verdict")},
      AdamwOptions{
          number("lr"),
          number("beta1"),
          number("beta2"),
          number("weight_decay"),
          number("eps"),
          rule["decoupled_weight_decay"].cast<bool>(),
          rule["maximize"].cast<bool>()});
  return machine.report();
}

simt::Report accumulate(
    const Options& options,
    int blocks,
    const Tensors& tensors,
    const py::array& verdict,
    const py::array& window,
    double weight) {
  Device device(options, tensors, true);
  device.machine.launch(
      "accumulate_kernel",
      blocks,
      threads,
      0,
      false,
      accumulate_kernel,
      device.plan,
      allow<const int64_t>(device.machine, verdict, "verdict"),
      allow<double>(device.machine, window, "window"),
      weight);
  return device.machine.report();
}

simt::Report settle(
    const Options& options,
    int blocks,
    const Tensors& tensors,
    const py::array& verdict,
    const py::array& owners,
    const py::array& lost) {
  Device device(options, tensors, true, true);
  const auto* of_step = allow<const int64_t>(device.machine, verdict, "verdict");
  const auto* owner = allow<const int64_t>(device.machine, owners, "owners");
  auto* found = reinterpret_cast<unsigned*>(allow<int32_t>(device.machine, lost, "lost"));
  device.machine.launch(
      "find_lost_kernel",
      blocks,
      threads,
      0,
      false,
      find_lost_kernel,
      device.plan,
      of_step,
      owner,
      found);
  device.machine.launch(
      "settle_kernel",
      blocks,
      threads,
      0,
      false,
      settle_kernel,
      device.plan,
      of_step,
      owner,
      found);
  return device.machine.report();
}

}  // namespace
}  // namespace fastguard

PYBIND11_MODULE(fastguard_kernels, m) {
  simt::raise_errors_in_python();
  m.def("grad_norm", &fastguard::grad_norm);
  m.def("guard_decide", &fastguard::guard_decide);
  m.def("decide", &fastguard::decide_);
  m.def("scale", &fastguard::scale);
  m.def("clip", &fastguard::clip);
  m.def("adamw", &fastguard::adamw);
  m.def("accumulate", &fastguard::accumulate);
  m.def("settle", &fastguard::settle);
}
