#include "simt/kernels/copies.cuh"
#include "simt/kernels/faults.cuh"
#include "simt/kernels/histogram.cuh"
#include "simt/kernels/normalise.cuh"
#include "simt/kernels/reduce.cuh"
#include "simt/kernels/transpose.cuh"
#include "simt/kernels/warps.cuh"

#include "simt/bind.h"

namespace {

using simt::allow;
using simt::Machine;
using simt::Options;
using simt::Report;
namespace py = pybind11;

Report reduce(
    const Options& options,
    int blocks,
    const py::array& x,
    const py::array& partial,
    const py::array& ended,
    const py::array& sum) {
  Machine machine(options);
  machine.launch(
      "reduce_kernel",
      blocks,
      fastguard::reduce_threads,
      0,
      false,
      fastguard::reduce_kernel,
      allow<const float>(machine, x, "x"),
      x.size(),
      allow<double>(machine, partial, "partial"),
      allow<unsigned>(machine, ended, "ended"),
      allow<double>(machine, sum, "sum"));
  return machine.report();
}

Report normalise(const Options& options, int blocks, const py::array& x, const py::array& partial) {
  Machine machine(options);
  machine.launch(
      "normalise_kernel",
      blocks,
      fastguard::reduce_threads,
      0,
      true,
      fastguard::normalise_kernel,
      allow<float>(machine, x, "x"),
      x.size(),
      allow<double>(machine, partial, "partial"));
  return machine.report();
}

Report transpose(const Options& options, bool padded, const py::array& from, const py::array& to) {
  Machine machine(options);
  const int64_t rows = from.shape(0);
  const int64_t columns = from.shape(1);
  const dim3 grid(
      (columns + fastguard::tile - 1) / fastguard::tile,
      (rows + fastguard::tile - 1) / fastguard::tile);
  machine.launch(
      "transpose_kernel",
      grid,
      {fastguard::tile, fastguard::tile_rows},
      0,
      false,
      padded ? fastguard::transpose_kernel<33> : fastguard::transpose_kernel<32>,
      allow<const float>(machine, from, "from"),
      allow<float>(machine, to, "to"),
      rows,
      columns);
  return machine.report();
}

Report reverse(const Options& options, const py::array& from, const py::array& to) {
  Machine machine(options);
  machine.launch(
      "reverse_kernel",
      1,
      from.size(),
      from.size() * sizeof(float),
      false,
      fastguard::reverse_kernel,
      allow<const float>(machine, from, "from"),
      allow<float>(machine, to, "to"));
  return machine.report();
}

Report shuffle(
    const Options& options,
    const py::array& values,
    int argument,
    int width,
    const py::array& out) {
  Machine machine(options);
  machine.launch(
      "shuffle_kernel",
      1,
      32,
      0,
      false,
      fastguard::shuffle_kernel,
      allow<const int64_t>(machine, values, "values"),
      argument,
      width,
      allow<int64_t>(machine, out, "out"));
  return machine.report();
}

Report histogram(
    const Options& options,
    const py::array& x,
    const py::array& counts,
    const py::array& sum,
    const py::array& least,
    const py::array& greatest,
    const py::array& lock) {
  Machine machine(options);
  machine.launch(
      "histogram_kernel",
      (x.size() + 63) / 64,
      64,
      0,
      false,
      fastguard::histogram_kernel,
      allow<const int>(machine, x, "x"),
      x.size(),
      allow<int>(machine, counts, "counts"),
      allow<double>(machine, sum, "sum"),
      allow<int>(machine, least, "least"),
      allow<int>(machine, greatest, "greatest"),
      allow<int>(machine, lock, "lock"));
  return machine.report();
}

Report copy(
    const Options& options,
    int n,
    const py::array& from,
    int offset,
    int stride,
    const py::array& to) {
  Machine machine(options);
  const int64_t count = to.size() / n;
  machine.launch(
      "copy_kernel",
      (count + 63) / 64,
      64,
      0,
      false,
      n == 4 ? fastguard::copy_kernel<4> : fastguard::copy_kernel<1>,
      allow<const float>(machine, from, "from") + offset,
      allow<float>(machine, to, "to"),
      count,
      stride);
  return machine.report();
}

Report stride(const Options& options, int n, int stride, const py::array& out) {
  Machine machine(options);
  auto* const kernel = n == 4 ? fastguard::stride_kernel<4>
      : n == 2                ? fastguard::stride_kernel<2>
                              : fastguard::stride_kernel<1>;
  machine.launch(
      "stride_kernel",
      1,
      32,
      32 * stride * n * sizeof(float),
      false,
      kernel,
      allow<float>(machine, out, "out"),
      stride);
  return machine.report();
}

#define FAULT(name) {#name, fastguard::name}
const std::map<std::string, void (*)(float*)> faults = {
    FAULT(load_beyond),         FAULT(load_before),
    FAULT(load_across),         FAULT(shared_beyond),
    FAULT(shared_before),       FAULT(shared_across),
    FAULT(write_after_write),   FAULT(read_after_write),
    FAULT(write_after_read),    FAULT(atomic_and_plain),
    FAULT(shuffle_is_no_fence), FAULT(other_barrier),
    FAULT(other_collective),    FAULT(lane_ends_first),
    FAULT(lane_ends_last),      FAULT(half_a_mask),
    FAULT(half_at_the_barrier), FAULT(odd_width),
    FAULT(grid_sync_alone),     FAULT(no_end),
    FAULT(blocks_disagree),
};
#undef FAULT

Report fault(
    const Options& options,
    const std::string& name,
    int blocks,
    bool writable,
    const py::array& x) {
  Machine machine(options);
  float* const memory = static_cast<float*>(const_cast<void*>(x.data()));
  machine.memory.allow(memory, x.nbytes(), "x", writable);
  machine.launch(name, blocks, 64, 128, false, faults.at(name), memory);
  return machine.report();
}

template <class T>
py::array_t<float> to_float(const py::array_t<uint16_t>& bits) {
  return py::vectorize([](uint16_t x) { return fastguard::to_float(T{x}); })(bits);
}

template <class T>
py::array_t<uint16_t> from_float(const py::array_t<float>& x) {
  return py::vectorize([](float x) { return fastguard::from_float<T>(x).bits; })(x);
}

}  // namespace

PYBIND11_MODULE(executor_kernels, m) {
  simt::raise_errors_in_python();
  m.def("reduce", &reduce);
  m.def("normalise", &normalise);
  m.def("transpose", &transpose);
  m.def("reverse", &reverse);
  m.def("shuffle", &shuffle);
  m.def("histogram", &histogram);
  m.def("copy", &copy);
  m.def("stride", &stride);
  m.def("fault", &fault);
  m.def("bfloat16_to_float", &to_float<fastguard::BFloat16>);
  m.def("float16_to_float", &to_float<fastguard::Float16>);
  m.def("bfloat16_from_float", &from_float<fastguard::BFloat16>);
  m.def("float16_from_float", &from_float<fastguard::Float16>);
}
