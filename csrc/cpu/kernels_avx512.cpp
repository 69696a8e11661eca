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

const Kernels kAvx512Kernels = {
    "avx512",
    avx512::tile_max,
    avx512::estimate_max,
    avx512::tile_stats,
    avx512::combine,
    avx512::tile_above,
    avx512::tile_peak,
    avx512::tile_between,
    avx512::token_probs,
    avx512::token_residuals,
    avx512::arrivals,
    avx512::first_arrival,
    avx512::words,
    avx512::eight_bit_products,
    avx512::products,
    avx512::mix,
};

}  // namespace specdec
