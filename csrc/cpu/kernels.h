// What one instruction set has to provide: passes over tiles of a row, and a race. Raw pointers and sizes only, so
// that each of the three translation units behind this table (kernels_*.cpp) stays tiny and free of torch headers.
#pragma once

#include <cstdint>

namespace specdec {

enum class DType { f32, bf16, f16 };

// The two-level race draws a tile of 128 consecutive ids first, then an id inside it (docs/noise.md).
constexpr int64_t kTile = 128;

// Weight arrays given to `race` are zero-padded to this many entries: 16 Philox counters of four words.
constexpr int64_t kRaceBlock = 64;

struct Row {
  const void* logits;
  DType dtype;
  int64_t vocab;
};

// prob(v) = [logit >= cutoff] * exp(scale * logit - logsumexp). The logsumexp is a sum of two floats: at a low
// temperature scale * logit is in the hundreds, and one float would leave the probability an error of 1e-5.
struct Distribution {
  float scale;
  float cutoff;
  float lse_high;
  float lse_low;
};

// Everything of a Philox counter but the index: docs/noise.md.
struct Noise {
  uint64_t seed;
  uint64_t position;
  uint32_t tag;  // purpose | level << 8 | row << 16
};

struct Combined {
  float max;    // the largest logit; nan or infinite when the row is not valid
  float total;  // sum of exp(scale * (logit - max))
};

struct Kernels {
  const char* name;

  // Largest logit of each tile in [begin, end), nan where the tile holds one.
  void (*tile_max)(const Row&, int64_t begin, int64_t end, float* max);

  // Largest logit m of each tile, and its sum of exp(scale * (logit - m)), nan where the tile holds a nan or +inf.
  void (*tile_stats)(const Row&, float scale, int64_t begin, int64_t end, float* max, float* sum);

  // Brings the tiles' sums to the common base of the row's largest logit, in place: they become race weights.
  Combined (*combine)(const float* tile_max, float* tile_sum, int64_t tiles, float scale);

  // The residual (target - draft)+ summed over each tile; and for every id of one tile (128, zeros past the end).
  void (*tile_residuals)(const Row& target, const Distribution&, const Row& draft, const Distribution&, int64_t begin,
                         int64_t end, float* weights);
  void (*token_residuals)(const Row& target, const Distribution&, const Row& draft, const Distribution&, int64_t tile,
                          float* weights);

  // The probability of every id of one tile (128, zeros past the end).
  void (*token_probs)(const Row&, const Distribution&, int64_t tile, float* weights);

  // argmin E_i / w_i over the positive weights, lowest index on ties; -1 if there is none.
  int64_t (*race)(const float* weights, int64_t count, const Noise&);

  // Words of the counters first, first + 1, ...: four each.
  void (*words)(const Noise&, uint32_t first, int64_t counters, uint32_t* out);
};

// The best table this machine can run; SPECDEC_CPU_ISA=scalar|avx2|avx512 forces one (null if it cannot run).
const Kernels* kernels();

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace specdec
