#include "simt/kernels/async_faults.cuh"
#include "simt/kernels/fragments.cuh"
#include "simt/kernels/matmul.cuh"

#include "simt/bind.h"

namespace {

using fastguard::BFloat16;
using fastguard::Float16;
using simt::allow;
using simt::Machine;
using simt::Options;
using simt::Report;
namespace py = pybind11;

template <class T, bool b_rows>
Report matmul(
    const Options& options,
    bool swizzled,
    const py::array& a,
    const py::array& b,
    const py::array& c) {
  Machine machine(options);
  const int64_t rows = c.shape(0);
  const int64_t columns = c.shape(1);
  const auto tiles = [](int64_t n) {
    return static_cast<unsigned>((n + fastguard::matmul_tile - 1) / fastguard::matmul_tile);
  };
  machine.launch(
      "matmul_kernel",
      {tiles(columns), tiles(rows)},
      fastguard::matmul_threads,
      fastguard::matmul_shared,
      false,
      swizzled ? fastguard::matmul_kernel<T, b_rows, true>
               : fastguard::matmul_kernel<T, b_rows, false>,
      allow<const T>(machine, a, "a"),
      allow<const T>(machine, b, "b"),
      allow<T>(machine, c, "c"),
      rows,
      columns,
      a.shape(1));
  return machine.report();
}

template <bool transposed>
Report ldmatrix(
    const Options& options,
    int count,
    const py::array& rows,
    int stride,
    const py::array& registers) {
  using Row = fastguard::Vector<uint16_t, 8>;
  Machine machine(options);
  const auto kernel = count == 1 ? fastguard::ldmatrix_kernel<1, transposed>
      : count == 2               ? fastguard::ldmatrix_kernel<2, transposed>
                                 : fastguard::ldmatrix_kernel<4, transposed>;
  machine.launch(
      "ldmatrix_kernel",
      1,
      32,
      512,
      false,
      kernel,
      reinterpret_cast<const Row*>(allow<const uint16_t>(machine, rows, "rows")),
      stride,
      allow<uint32_t>(machine, registers, "registers"));
  return machine.report();
}

template <class T>
Report mma(const Options& options, const py::array& a, const py::array& b, const py::array& d) {
  Machine machine(options);
  machine.launch(
      "mma_kernel",
      1,
      32,
      0,
      false,
      fastguard::mma_kernel<T>,
      allow<const uint32_t>(machine, a, "a"),
      allow<const uint32_t>(machine, b, "b"),
      allow<float>(machine, d, "d"));
  return machine.report();
}

Report numbers(
    const Options& options,
    const py::array& x,
    const py::array& y,
    const py::array& most,
    const py::array& least,
    const py::array& power,
    const py::array& inverse) {
  Machine machine(options);
  machine.launch(
      "numbers_kernel",
      (x.size() + 127) / 128,
      128,
      0,
      false,
      fastguard::numbers_kernel,
      allow<const float>(machine, x, "x"),
      allow<const float>(machine, y, "y"),
      x.size(),
      allow<float>(machine, most, "most"),
      allow<float>(machine, least, "least"),
      allow<float>(machine, power, "power"),
      allow<float>(machine, inverse, "inverse"));
  return machine.report();
}

template <class T>
Report pack(const Options& options, const py::array& x, const py::array& packed) {
  Machine machine(options);
  machine.launch(
      "pack_kernel",
      (packed.size() + 127) / 128,
      128,
      0,
      false,
      fastguard::pack_kernel<T>,
      allow<const float>(machine, x, "x"),
      static_cast<int>(packed.size()),
      allow<uint32_t>(machine, packed, "packed"));
  return machine.report();
}

#define FAULT(name) {#name, fastguard::name}
const std::map<std::string, void (*)(float*)> faults = {
    FAULT(read_before_the_wait),
    FAULT(others_read_before_the_wait),
    FAULT(read_before_the_barrier),
    FAULT(wait_for_too_few),
    FAULT(wait_without_a_commit),
    FAULT(fill_what_is_being_filled),
    FAULT(fill_what_others_read),
    FAULT(change_the_source),
    FAULT(end_before_the_wait),
    FAULT(end_before_zeros_arrive),
    FAULT(copy_from_beyond),
    FAULT(copy_from_across),
    FAULT(copy_to_beyond),
    FAULT(copy_to_across),
    FAULT(ldmatrix_beyond),
    FAULT(ldmatrix_across),
    FAULT(ldmatrix_without_syncwarp),
    FAULT(overwrite_what_ldmatrix_reads),
    FAULT(half_at_the_ldmatrix),
    FAULT(other_mma),
    FAULT(barrier_before_the_wait),
    FAULT(half_a_warp_ends_before_the_mma),
};
#undef FAULT

Report fault(const Options& options, const std::string& name, const py::array& x) {
  Machine machine(options);
  machine.launch(name, 1, 64, 1024, false, faults.at(name), allow<float>(machine, x, "x"));
  return machine.report();
}

}  // namespace

PYBIND11_MODULE(tensor_kernels, m) {
  simt::raise_errors_in_python();
  m.def("matmul_bfloat16_rows", &matmul<BFloat16, true>);
  m.def("matmul_bfloat16_columns", &matmul<BFloat16, false>);
  m.def("matmul_float16_rows", &matmul<Float16, true>);
  m.def("matmul_float16_columns", &matmul<Float16, false>);
  m.def("matmul_tf32_columns", &matmul<float, false>);
  m.def("ldmatrix", &ldmatrix<false>);
  m.def("ldmatrix_trans", &ldmatrix<true>);
  m.def("mma_bfloat16", &mma<BFloat16>);
  m.def("mma_float16", &mma<Float16>);
  m.def("mma_tf32", &mma<float>);
  m.def("numbers", &numbers);
  m.def("pack_bfloat16", &pack<BFloat16>);
  m.def("pack_float16", &pack<Float16>);
  m.def("fault", &fault);
}
