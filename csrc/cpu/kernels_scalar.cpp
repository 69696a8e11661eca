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

const Kernels kScalarKernels = {
    "scalar",
    scalar::tile_max,
    scalar::estimate_max,
    scalar::tile_stats,
    scalar::combine,
    scalar::tile_above,
    scalar::tile_peak,
    scalar::tile_between,
    scalar::token_probs,
    scalar::token_residuals,
    scalar::arrivals,
    scalar::first_arrival,
    scalar::words,
    scalar::eight_bit_products,
    scalar::products,
    scalar::mix,
};

}  // namespace specdec
