// Operators on CPUs without PyTorch's dispatcher, which takes longer to start than a row takes to read: tensors are
// looked at through DLPack's C interface, and all results of a call lie in one allocation.
#pragma once

#include <pybind11/pybind11.h>

namespace specdec {

// Adds `connect`, `verify_chain`, `verify_tree`, `sample` and `sample_children`.
void add_direct(pybind11::module_& m);

}  // namespace specdec
