// The native face of the package that touches no tensor: facts of the build and of this CPU, and
// calibration loops. patchgen_fast/info.py is its user.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "native/build_facts.h"
#include "native/calibration.h"
#include "native/handover.h"
#include "native/machine.h"

namespace py = pybind11;
using namespace patchgen_fast;

namespace {

py::list instruction_set_list() {
  py::list rows;
  for (const InstructionSet& set : instruction_sets()) {
    rows.append(py::dict(py::arg("name") = set.name, py::arg("supported") = set.supported()));
  }
  return rows;
}

py::list cache_list() {
  py::list rows;
  for (const native::Cache& cache : native::caches()) {
    rows.append(py::dict(py::arg("level") = cache.level, py::arg("type") = cache.type,
                         py::arg("bytes") = cache.bytes, py::arg("line_bytes") = cache.line_bytes,
                         py::arg("shared_by") = cache.shared_by));
  }
  return rows;
}

py::dict as_dict(const native::Measurement& m) {
  return py::dict(py::arg("best") = m.best, py::arg("median") = m.median, py::arg("kept") = m.kept,
                  py::arg("discarded") = m.discarded, py::arg("disturbed") = m.disturbed);
}

// One of two names, or ValueError with both.
bool is_first(const std::string& argument, const std::string& name, const std::string& first,
              const std::string& second) {
  if (name != first && name != second) {
    throw py::value_error(argument + ": expected '" + first + "' or '" + second + "', got '" +
                          name + "'");
  }
  return name == first;
}

py::dict measure_arithmetic(const std::string& dtype, int threads, int samples) {
  const auto kind = is_first("dtype", dtype, "fp32", "bf16") ? native::Arithmetic::fp32
                                                             : native::Arithmetic::bf16;
  native::Measurement result;
  {
    py::gil_scoped_release release;
    result = native::measure_arithmetic(kind, threads, samples);
  }
  return as_dict(result);
}

py::dict measure_bandwidth(const std::string& traffic, int64_t bytes_per_thread, int threads,
                           int samples) {
  const auto kind =
      is_first("traffic", traffic, "read", "copy") ? native::Traffic::read : native::Traffic::copy;
  native::Measurement result;
  {
    py::gil_scoped_release release;
    result = native::measure_bandwidth(kind, bytes_per_thread, threads, samples);
  }
  return as_dict(result);
}

py::dict measure_clock(int samples) {
  native::Measurement result;
  {
    py::gil_scoped_release release;
    result = native::measure_clock(samples);
  }
  return as_dict(result);
}

double measure_handover(int samples) {
  py::gil_scoped_release release;
  return native::measure_handover(samples);
}

}  // namespace

PYBIND11_MODULE(_native_info, m) {
  m.doc() = "Facts of patchgen_fast's native build and of this CPU, and calibration loops.";
  m.def(
      "chosen_isa", [] { return chosen_isa().name; },
      "Name of the instruction set in use. ValueError for a wrong PATCHGEN_FAST_CPU_ISA.");
  m.def(
      "choose_isa", [](const std::string& name) { return choose_isa(name).name; },
      py::arg("override_name"), "What chosen_isa says with PATCHGEN_FAST_CPU_ISA=override_name.");
  m.def("instruction_sets", &instruction_set_list,
        "Instruction sets compiled in, best first: dicts of name, supported (by this CPU).");
  m.def("cpu_features", &native::cpu_features, "Vector features of this CPU.");
  m.def("caches", &cache_list,
        "Data caches: dicts of level, type, bytes, line_bytes, shared_by (logical CPUs).");
  m.def("build_facts", &native::build_facts, "Compiler, flags and GPU architectures of the build.");
  m.def("measure_arithmetic", &measure_arithmetic, py::arg("dtype"), py::arg("threads") = 1,
        py::arg("samples") = 25,
        "Peak of 'fp32' or 'bf16' multiply-adds in flop/s, all threads together: a dict of best, "
        "median, kept, discarded, disturbed.");
  m.def("measure_bandwidth", &measure_bandwidth, py::arg("traffic"), py::arg("bytes_per_thread"),
        py::arg("threads") = 1, py::arg("samples") = 25,
        "Bytes per second of 'read', or read and written by 'copy', in buffers of that size.");
  m.def("measure_clock", &measure_clock, py::arg("samples") = 25, "Cycles per second of one core.");
  m.def(
      "measure_handover", &measure_handover, py::arg("samples") = 8,
      "Seconds that a cache line takes between the first two CPUs of this process; 0: not known.");
}
