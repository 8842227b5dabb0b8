#include "simt/kernels/reduce.cuh"

#include "simt/bind.h"

namespace {

using simt::allow;
using simt::Machine;
using simt::Options;
namespace py = pybind11;

simt::Report reduce(const Options& options, int blocks, const py::array& x, const py::array& partial,
                    const py::array& ended, const py::array& sum) {
  Machine machine(options);
  machine.launch("reduce_kernel", blocks, fastguard::reduce_threads, 0, false,
                 fastguard::reduce_kernel, allow<const float>(machine, x, "x"), x.size(),
                 allow<double>(machine, partial, "partial"),
                 allow<unsigned>(machine, ended, "ended"), allow<double>(machine, sum, "sum"));
  return machine.report();
}

}  // namespace

PYBIND11_MODULE(executor_kernels, m) {
  simt::raise_errors_in_python();
  m.def("reduce", &reduce);
}
