// The one body of every row kernel, written against a vector type `V` (vec_*.h). Each kernels_*.cpp includes it once,
// inside a namespace of its own: code compiled for AVX-512 must never be merged by the linker with code for AVX2.

constexpr float kLog2e = 1.44269504088896341f;

// --- rows -----------------------------------------------------------------------------------------------------------

template <class T>
const T* tile_pointer(const Row& row, int64_t tile) {
  return static_cast<const T*>(row.logits) + tile * kTile;
}

// The last tile may be short; it is copied out and padded with -inf, so that no other code knows about it.
template <class T>
void padded_tile(const Row& row, int64_t tile, float* out) {
  const T* logits = tile_pointer<T>(row, tile);
  const int64_t count = row.vocab - tile * kTile;
  for (int64_t i = 0; i < kTile; ++i) out[i] = i < count ? to_float(logits[i]) : -INFINITY;
}

inline bool is_short(const Row& row, int64_t tile) { return (tile + 1) * kTile > row.vocab; }

// Calls body(T*, ...) with the row's element type.
template <class F>
auto with_dtype(DType dtype, F&& body) {
  switch (dtype) {
    case DType::bf16: return body(BFloat16{});
    case DType::f16: return body(Half{});
    default: return body(float{});
  }
}

// Calls body(tile, pointer) for the tiles [begin, end), the pointer being to 128 readable elements.
template <class F>
void each_tile(const Row& row, int64_t begin, int64_t end, F&& body) {
  with_dtype(row.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t tile = begin; tile < end; ++tile) {
      if (is_short(row, tile)) {
        float padded[kTile];
        padded_tile<T>(row, tile, padded);
        body(tile, padded);
      } else {
        body(tile, tile_pointer<T>(row, tile));
      }
    }
  });
}

// Fetches ahead of the hardware, which stops at every 4 KiB page.
template <class T>
void prefetch(const T* tile) {
  constexpr int64_t kAhead = 4096;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tile) + kAhead;  // may lie past the row: an address, not a pointer
  for (uintptr_t at = begin; at < begin + kTile * sizeof(T); at += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
}

template <class T>
V::F max_of_tile(const T* logits) {
  V::F a = V::load(logits), b = V::load(logits + V::width);
  for (int64_t i = 2 * V::width; i < kTile; i += 2 * V::width) {
    a = V::max(a, V::load(logits + i));
    b = V::max(b, V::load(logits + i + V::width));
  }
  return V::max(a, b);
}

void tile_max(const Row& row, int64_t begin, int64_t end, float* max) {
  each_tile(row, begin, end, [&](int64_t tile, const auto* logits) {
    prefetch(logits);
    // max drops a nan or keeps it, depending on the order of its operands: look for it apart.
    V::M nan = V::is_nan(V::load(logits));
    for (int64_t i = V::width; i < kTile; i += V::width) nan = V::either(nan, V::is_nan(V::load(logits + i)));
    max[tile] = V::any(nan) ? NAN : V::reduce_max(max_of_tile(logits));
  });
}

void tile_stats(const Row& row, float scale, int64_t begin, int64_t end, float* max, float* sum) {
  const V::F scale2 = V::set(scale * kLog2e);
  each_tile(row, begin, end, [&](int64_t tile, const auto* logits) {
    prefetch(logits);
    const float largest = V::reduce_max(max_of_tile(logits));
    // An all -inf tile keeps base 0, so that its sum is 0; a nan or +inf anywhere makes the sum nan.
    const V::F base = V::set(largest == -INFINITY ? 0.0f : largest);
    V::F a = V::set(0.0f), b = V::set(0.0f);
    for (int64_t i = 0; i < kTile; i += 2 * V::width) {
      a = V::add(a, V::exp2(V::mul(V::sub(V::load(logits + i), base), scale2)));
      b = V::add(b, V::exp2(V::mul(V::sub(V::load(logits + i + V::width), base), scale2)));
    }
    max[tile] = largest;
    sum[tile] = V::reduce_add(V::add(a, b));
  });
}

Combined combine(const float* tile_max, float* tile_sum, int64_t tiles, float scale) {
  float largest = -INFINITY;
  for (int64_t t = 0; t < tiles; ++t) largest = tile_max[t] > largest ? tile_max[t] : largest;
  const V::F base = V::set(largest), scale2 = V::set(scale * kLog2e);
  V::F total = V::set(0.0f);
  float buffer[V::width];
  for (int64_t t = 0; t < tiles; t += V::width) {
    const int64_t count = tiles - t < V::width ? tiles - t : V::width;
    for (int64_t i = 0; i < V::width; ++i) buffer[i] = i < count ? tile_max[t + i] : -INFINITY;
    const V::F factor = V::exp2(V::mul(V::sub(V::load(buffer), base), scale2));
    for (int64_t i = 0; i < V::width; ++i) buffer[i] = i < count ? tile_sum[t + i] : 0.0f;
    const V::F weight = V::mul(V::load(buffer), factor);
    total = V::add(total, weight);
    V::store(buffer, weight);
    for (int64_t i = 0; i < count; ++i) tile_sum[t + i] = buffer[i];
  }
  return {largest, V::reduce_add(total)};
}

// --- probabilities --------------------------------------------------------------------------------------------------

// The scalars of a distribution, spread over vectors and brought to base 2.
struct Spread {
  V::F scale, cutoff, high, low, log2e;

  explicit Spread(const Distribution& d)
      : scale(V::set(d.scale)), cutoff(V::set(d.cutoff)), high(V::set(-d.lse_high)), low(V::set(-d.lse_low)),
        log2e(V::set(kLog2e)) {}

  V::F prob(V::F logit) const {
    const V::F exponent = V::add(V::fma(logit, scale, high), low);
    return V::keep(V::at_least(logit, cutoff), V::exp2(V::mul(exponent, log2e)));
  }
};

template <class T, class U>
V::F residual(const Spread& target, const T* target_logits, const Spread& draft, const U* draft_logits, int64_t i) {
  // max(x, y) gives y when either is nan: a nan in the draft must reach the sum.
  return V::max(V::set(0.0f), V::sub(target.prob(V::load(target_logits + i)), draft.prob(V::load(draft_logits + i))));
}

void tile_residuals(const Row& target, const Distribution& target_dist, const Row& draft, const Distribution& draft_dist,
                    int64_t begin, int64_t end, float* weights) {
  const Spread p(target_dist), q(draft_dist);
  for (int64_t tile = begin; tile < end; ++tile) {
    each_tile(target, tile, tile + 1, [&](int64_t, const auto* target_logits) {
      each_tile(draft, tile, tile + 1, [&](int64_t, const auto* draft_logits) {
        prefetch(target_logits);
        prefetch(draft_logits);
        V::F a = V::set(0.0f), b = V::set(0.0f);
        for (int64_t i = 0; i < kTile; i += 2 * V::width) {
          a = V::add(a, residual(p, target_logits, q, draft_logits, i));
          b = V::add(b, residual(p, target_logits, q, draft_logits, i + V::width));
        }
        weights[tile] = V::reduce_add(V::add(a, b));
      });
    });
  }
}

void token_residuals(const Row& target, const Distribution& target_dist, const Row& draft, const Distribution& draft_dist,
                     int64_t tile, float* weights) {
  const Spread p(target_dist), q(draft_dist);
  each_tile(target, tile, tile + 1, [&](int64_t, const auto* target_logits) {
    each_tile(draft, tile, tile + 1, [&](int64_t, const auto* draft_logits) {
      for (int64_t i = 0; i < kTile; i += V::width) V::store(weights + i, residual(p, target_logits, q, draft_logits, i));
    });
  });
}

void token_probs(const Row& row, const Distribution& dist, int64_t tile, float* weights) {
  const Spread p(dist);
  each_tile(row, tile, tile + 1, [&](int64_t, const auto* logits) {
    for (int64_t i = 0; i < kTile; i += V::width) V::store(weights + i, p.prob(V::load(logits + i)));
  });
}

// --- noise ----------------------------------------------------------------------------------------------------------

constexpr int64_t kCounters = kRaceBlock / 4;

// Philox4x32-10 (Salmon et al., SC 2011) of 16 consecutive counters, written so that compilers vectorise it.
void philox_block(const Noise& noise, uint32_t first, uint32_t* out) {
  uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
  for (int i = 0; i < kCounters; ++i) {
    c0[i] = first + uint32_t(i);
    c1[i] = uint32_t(noise.position);
    c2[i] = uint32_t(noise.position >> 32);
    c3[i] = noise.tag;
  }
  uint32_t k0 = uint32_t(noise.seed), k1 = uint32_t(noise.seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    for (int i = 0; i < kCounters; ++i) {
      const uint64_t a = uint64_t(c0[i]) * 0xD2511F53u, b = uint64_t(c2[i]) * 0xCD9E8D57u;
      c0[i] = uint32_t(b >> 32) ^ c1[i] ^ k0;
      c1[i] = uint32_t(b);
      c2[i] = uint32_t(a >> 32) ^ c3[i] ^ k1;
      c3[i] = uint32_t(a);
    }
  }
  for (int i = 0; i < kCounters; ++i) {
    out[4 * i] = c0[i];
    out[4 * i + 1] = c1[i];
    out[4 * i + 2] = c2[i];
    out[4 * i + 3] = c3[i];
  }
}

void words(const Noise& noise, uint32_t first, int64_t counters, uint32_t* out) {
  uint32_t block[kRaceBlock];
  for (int64_t done = 0; done < counters; done += kCounters) {
    philox_block(noise, first + uint32_t(done), block);
    const int64_t count = counters - done < kCounters ? counters - done : kCounters;
    for (int64_t i = 0; i < 4 * count; ++i) out[4 * done + i] = block[i];
  }
}

int64_t race(const float* weights, int64_t count, const Noise& noise) {
  float best = INFINITY;
  int64_t winner = -1;
  uint32_t block[kRaceBlock];
  float arrivals[kRaceBlock];
  for (int64_t start = 0; start < count; start += kRaceBlock) {
    philox_block(noise, uint32_t(start / 4), block);
    V::F first = V::set(INFINITY);
    for (int64_t i = 0; i < kRaceBlock; i += V::width) {
      const V::F weight = V::load(weights + start + i);
      const V::F arrival = V::either_of(V::positive(weight), V::div(V::exponential(block + i), weight), INFINITY);
      V::store(arrivals + i, arrival);
      first = V::min(first, arrival);
    }
    if (!(V::reduce_min(first) < best)) continue;
    for (int64_t i = 0; i < kRaceBlock; ++i) {
      if (arrivals[i] < best) {
        best = arrivals[i];
        winner = start + i;
      }
    }
  }
  return winner;
}
