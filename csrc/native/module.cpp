// What is native and made for Python: the suffix index of drafters that look back, facts of the build, and operators
// called without PyTorch's dispatcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "fast_path.h"
#include "suffix_index.h"

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
  using specdec::SuffixIndex;
  py::class_<SuffixIndex>(m, "SuffixIndex", "The longest suffix of a text that occurred in it before, as it grows.")
      .def(py::init<>())
      .def("append", &SuffixIndex::append, py::arg("token"), "Add one token to the text.")
      .def(
          "extend",
          [](SuffixIndex& index, const std::vector<SuffixIndex::Token>& tokens) {
            for (const auto token : tokens) index.append(token);
          },
          py::arg("tokens"), "Add tokens to the text.")
      .def("match", &SuffixIndex::match,
           "(length of the longest suffix that occurred before, index just after its first occurrence).")
      .def("continuation", &SuffixIndex::continuation, py::arg("count"),
           "What followed that occurrence: `count` tokens, a repetition going on past the end of the text.")
      .def("followers", &SuffixIndex::followers, py::arg("ahead"),
           "(tokens, lengths): what followed a suffix of the text and of tokens `ahead` of it, wherever it occurred in "
           "the text; each token once, with the length of the longest such suffix.")
      .def("__len__", &SuffixIndex::size);
  specdec::add_fast_path(m);
}
