#include "kernels.h"
#include <bit>
#include <cmath>
#include <cstring>

#include "vec_avx512.h"

namespace specdec {
namespace avx512 {
namespace {
#include "kernels_body.h"
}  // namespace
}  // namespace avx512

const Kernels kAvx512Kernels = avx512::table("avx512");

}  // namespace specdec
