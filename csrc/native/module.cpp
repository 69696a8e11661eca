// What is native and made for Python: facts of the build, and operators called without PyTorch's dispatcher.
#include <pybind11/pybind11.h>

#include "fast_path.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native code made for Python.";
  m.def(
      "build_facts",
      [] {
        py::dict facts;
        facts["compiler"] = SPECDEC_COMPILER;
        facts["torch"] = SPECDEC_TORCH;
        facts["sanitized"] = bool(SPECDEC_SANITIZED);
        return facts;
      },
      "What the native libraries were built with: compiler, torch, whether with sanitizers.");
  specdec::add_fast_path(m);
}
