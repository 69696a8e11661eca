#include "kernels.h"
#include <bit>
#include <cmath>
#include <cstring>

#include "vec_avx2.h"

namespace specdec {
namespace avx2 {
namespace {
#include "kernels_body.h"
}  // namespace
}  // namespace avx2

const Kernels kAvx2Kernels = avx2::table("avx2");

}  // namespace specdec
