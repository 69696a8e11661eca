// Operators without PyTorch's dispatcher, which takes longer to start than a row takes to read: tensors are viewed
// through DLPack's C interface, and every argument is checked once, in C++.
#pragma once

#include <pybind11/pybind11.h>

namespace specdec {

// Adds `connect`.
void add_fast_path(pybind11::module_& m);

}  // namespace specdec
