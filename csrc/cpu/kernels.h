// What one instruction set has to provide: passes over tiles of a row, and a race. Raw pointers and sizes only, so
// that each of the three translation units behind this table (kernels_*.cpp) stays tiny and free of torch headers.
#pragma once

#include <cstdint>

#include "../common/ops.h"

namespace specdec {

// A race draws its noise by vectors of Philox counters, of four words each. Arrays over tiles are padded to a multiple
// of the widest such vector's words, with 0 (weights) or -inf (maxima), so that no vector code sees an end.
constexpr int64_t kRaceBlock = 64;

// What a kernel may write behind the end of a tile.
constexpr int64_t kTileSlack = 16;

// Sums of a row's tiles are added up in fixed point, in units of 2^-kFixedBits: exact, so it makes no difference where
// the row is cut. What is below a unit is lost.
using FixedPoint = unsigned __int128;
constexpr int kFixedBits = 75;

struct Row {
  const void* logits;
  DType dtype;
  int64_t vocab;
  Columns columns{};  // of a draft row with a vocabulary of its own
};

// prob(v) = [logit >= cutoff] * exp(scale * logit - logsumexp). The logsumexp is a sum of two floats: at a low
// temperature scale * logit is in the hundreds, and one float would leave the probability an error of 1e-5.
struct Distribution {
  float scale;
  float cutoff;
  float lse_high;
  float lse_low;
};

// logsumexp = scale * base + log(total): nan where the row is not valid, -inf where nothing in it is finite.
struct Combined {
  float base;
  float total;  // of the tile weights
};

// The logits of a tile that are not below a pivot: the sum of exp(scale * (logit - base)), the smallest.
struct TailStats {
  float mass;
  float least;
};

// Whether all tiles were summed from the base that was given, and if so what they sum up to.
struct Summed {
  bool shared;
  FixedPoint total;
};

struct Arrival {
  int64_t index;
  float time;
};

struct Kernels {
  const char* name;

  // All passes take tiles [begin, end), begin a multiple of 16, and may write up to the next multiple of 16.

  // Largest logit of each tile, nan where the tile holds one.
  void (*tile_max)(const Row&, int64_t begin, int64_t end, float* max);

  // A logit of these tiles that few are far above.
  float (*estimate_max)(const Row&, int64_t begin, int64_t end);

  // Of each tile, the sum of exp(scale * (logit - base)) and that base, which is the one given but for tiles that are
  // far above it. nan or inf where a tile holds a nan or +inf.
  Summed (*tile_stats)(const Row&, float scale, float base, int64_t begin, int64_t end, float* tile_base,
                       float* tile_sum);

  // Brings the tiles' sums to a common base: they become race weights, where they are or elsewhere.
  Combined (*combine)(const float* tile_base, const float* tile_sum, int64_t padded_tiles, float scale, float* weight);

  // What one tile holds at and above a pivot.
  TailStats (*tile_above)(const Row&, float scale, float base, float pivot, int64_t tile);

  // The largest logit of one tile, of any value where there is a nan.
  float (*tile_peak)(const Row&, int64_t tile);

  // The logits of one tile in [low, high), to `out` (which may be the tile itself, or anything before it, and has room
  // for 128 + kTileSlack); returns how many.
  int64_t (*tile_between)(const Row&, float low, float high, int64_t tile, float* out);

  // The probability of every id of one tile (128, zeros past the end).
  void (*token_probs)(const Row&, const Distribution&, int64_t tile, float* weights);

  // The residual (target - draft)+ of every id of one tile; none where the draft's probability is not a number.
  void (*token_residuals)(const Row& target, const Distribution&, const Row& draft, const Distribution&, int64_t tile,
                          float* weights);

  // E_i / w_i, the arrival times of the entries first, first + 1, ... of a race; infinite where the weight is not
  // positive. `first` is a multiple of 4, `count` of 64.
  void (*arrivals)(const float* weights, int64_t first, int64_t count, const Noise&, float* out);

  // The first of `count` arrivals, a multiple of 64 of them; lowest index on ties.
  Arrival (*first_arrival)(const float* arrivals, int64_t count);

  // Words of the counters first, first + 1, ...: four each.
  void (*words)(const Noise&, uint32_t first, int64_t counters, uint32_t* out);

  // For a drafter: of x with each of `count` rows of `size` elements, one behind the other, times the row's scale.
  void (*eight_bit_products)(const int8_t* rows, const float* scale, int64_t size, int64_t count, const float* x,
                             float* out);
};

// The best table this machine can run; SPECDEC_CPU_ISA=scalar|avx2|avx512 forces one (null if it cannot run).
const Kernels* kernels();

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace specdec
