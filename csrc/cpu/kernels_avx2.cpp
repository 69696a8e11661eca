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

const Kernels kAvx2Kernels = {
    "avx2",           avx2::tile_max,      avx2::estimate_max, avx2::tile_stats,         avx2::combine,
    avx2::tile_above, avx2::tile_peak,     avx2::tile_between, avx2::token_probs,        avx2::token_residuals,
    avx2::arrivals,   avx2::first_arrival, avx2::words,        avx2::eight_bit_products, avx2::products,
    avx2::mix,
};

}  // namespace specdec
