// What binds kernels to Python: Options from Python's, Report to Python's, Error raised as
// Python's, and numpy arrays as a kernel's memory.
#pragma once

#include "simt/machine.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

namespace simt {

namespace py = pybind11;

// The array's memory, which the machine then allows; not to be written if T is const. T may be
// another type of the same size, as BFloat16 is for uint16.
template <class T>
T* allow(Machine& machine, const py::array& array, const std::string& name) {
  constexpr bool writable = !std::is_const_v<T>;
  if (array.itemsize() != sizeof(T) || !(array.flags() & py::array::c_style)) {
    throw std::invalid_argument(
        "simt: `" + name + "` must be contiguous with elements of " + std::to_string(sizeof(T)) +
        " bytes, not " + std::to_string(array.itemsize()));
  }
  if (writable && !array.writeable()) {
    throw std::invalid_argument("simt: `" + name + "` is read-only for numpy");
  }
  machine.memory.allow(array.data(), array.nbytes(), name, writable);
  return static_cast<T*>(const_cast<void*>(array.data()));
}

// To be called once in a PYBIND11_MODULE.
inline void raise_errors_in_python() {
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      std::rethrow_exception(thrown);
    } catch (const Error& error) {
      const py::object type = py::module_::import("tests.simt").attr("Error");
      const py::object raised =
          type(error.what(), error.kind, error.kernel, error.block, error.thread, error.where);
      PyErr_SetObject(type.ptr(), raised.ptr());
    }
  });
}

}  // namespace simt

namespace pybind11::detail {

template <>
struct type_caster<simt::Options> {
  PYBIND11_TYPE_CASTER(simt::Options, const_name("tests.simt.Options"));

  bool load(handle source, bool) {
    if (!isinstance(source, module_::import("tests.simt").attr("Options"))) {
      return false;
    }
    const auto schedule = source.attr("schedule").cast<std::string>();
    const std::map<std::string, simt::Schedule> schedules = {
        {"round_robin", simt::Schedule::round_robin},
        {"greedy", simt::Schedule::greedy},
        {"random", simt::Schedule::random},
        {"unfair", simt::Schedule::unfair}};
    if (!schedules.contains(schedule)) {
      throw std::invalid_argument(
          "simt: schedule `" + schedule + "` is none of round_robin, greedy, random, unfair");
    }
    value.schedule = schedules.at(schedule);
    value.seed = source.attr("seed").cast<uint64_t>();
    value.resident = source.attr("resident").cast<int>();
    value.weak_memory = source.attr("weak_memory").cast<bool>();
    value.block_races = source.attr("block_races").cast<bool>();
    value.count = source.attr("count").cast<bool>();
    value.step_limit = source.attr("step_limit").cast<int64_t>();
    value.removed = source.attr("removed").cast<std::set<std::string>>();
    return true;
  }
};

template <>
struct type_caster<simt::Report> {
  PYBIND11_TYPE_CASTER(simt::Report, const_name("tests.simt.Report"));

  static handle cast(const simt::Report& report, return_value_policy, handle) {
    const module_ python = module_::import("tests.simt");
    list sites;
    for (const simt::Site& site : report.sites) {
      sites.append(python.attr("Site")(
          simt::name_of(site.kind),
          site.where,
          site.bytes,
          site.calls,
          site.requests,
          site.sectors,
          site.wavefronts,
          site.conflicts));
    }
    list launches;
    for (const simt::Launched& launch : report.launches) {
      launches.append(
          python.attr("Launched")(launch.kernel, launch.loaded_sectors, launch.stored_sectors));
    }
    return python.attr("Report")(tuple(launches), tuple(sites)).release();
  }
};

}  // namespace pybind11::detail
