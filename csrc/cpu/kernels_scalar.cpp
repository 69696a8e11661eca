#include "kernels.h"
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
    scalar::tile_stats,
    scalar::combine,
    scalar::tile_residuals,
    scalar::token_residuals,
    scalar::token_probs,
    scalar::race,
    scalar::words,
};

}  // namespace specdec
