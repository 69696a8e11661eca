#include "kernels.h"
#include <bit>
#include <cmath>
#include <cstring>

#include "vec_scalar.h"

namespace specdec {
namespace scalar {
namespace {
#include "kernels_body.h"
}  // namespace
}  // namespace scalar

const Kernels kScalarKernels = scalar::table("scalar");

}  // namespace specdec
