// The one body of every row kernel, written against a vector type `V` (vec_*.h). Each kernels_*.cpp includes it once,
// inside a namespace of its own: code compiled for AVX-512 must never be merged by the linker with code for AVX2.

constexpr float kLog2e = 1.44269504088896341f;

// --- rows -----------------------------------------------------------------------------------------------------------

// Calls body(T{}) with the row's element type.
template <class F>
void with_dtype(DType dtype, F&& body) {
  switch (dtype) {
    case DType::bf16: return body(BFloat16{});
    case DType::f16: return body(Half{});
    default: return body(float{});
  }
}

// The tile from `first` on where it cannot be read as it lies: -inf behind the last logit of the row, and wherever a
// draft row has no column for an id. The columns that it has are visited by the bits of a vector: to look at each alone
// takes six times as long, since no branch could be predicted. Seldom called: not in place.
template <class T>
[[gnu::noinline]] void copy_tile(const Row& row, int64_t first, T* out) {
  const T* logits = static_cast<const T*>(row.logits);
  const int64_t left = row.vocab - first, count = left < kTile ? left : kTile;
  for (int64_t i = 0; i < kTile; ++i) out[i] = negative_infinity(T{});
  if (row.columns.table == nullptr) {
    std::memcpy(out, logits + first, size_t(count) * sizeof(T));
    return;
  }
  const auto copy_one = [&](int64_t i) {
    const int64_t column = column_of(row.columns, first + i);
    if (column >= 0) out[i] = logits[column];
  };
  constexpr unsigned kAll = (1u << V::width) - 1;
  int64_t i = 0;
  for (; i + V::width <= count; i += V::width) {
    float numbers[V::width];  // of these bits -1 is a nan, and no column is
    std::memcpy(numbers, row.columns.table + first + i, sizeof(numbers));
    for (unsigned bits = V::bits(V::is_nan(V::load(numbers))) ^ kAll; bits; bits &= bits - 1)
      copy_one(i + __builtin_ctz(bits));
  }
  for (; i < count; ++i) copy_one(i);
}

// A tile where it lies in the row; or in a copy, where the row ends in it, which is -inf behind that, or has columns of
// its own.
template <class T>
class Tile {
 public:
  Tile(const Row& row, int64_t tile) : logits_(static_cast<const T*>(row.logits) + tile * kTile) {
    if ((tile + 1) * kTile <= row.vocab && row.columns.table == nullptr) return;
    copy_tile(row, tile * kTile, copy_);
    logits_ = copy_;
  }

  const T* operator+(int64_t i) const { return logits_ + i; }

 private:
  const T* logits_;
  T copy_[kTile];
};

// Fetches two vectors. Line by line: float32 took a fifth longer when a tile's lines were requested at once.
template <class T>
void prefetch_two(uintptr_t begin) {  // may lie past the row: an address, no pointer
  for (uintptr_t at = 0; at < 2 * V::width * sizeof(T); at += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(begin + at), 0, 3);
}

// Tiles are reduced in groups of as many as a vector has lanes: folding their vectors into the lanes of one costs a
// third of reducing each alone, and does not wait for each. Where two vectors of a group are read, those of the next
// one are fetched: the hardware's own prefetch stops at every 4 KiB page.
template <class T>
constexpr uintptr_t kGroupBytes = V::width * kTile * sizeof(T);

template <class T>
void prefetch_next(const T* here) {
  prefetch_two<T>(reinterpret_cast<uintptr_t>(here) + kGroupBytes<T>);
}

// f(tile, its place in the group) of each tile of a group; `none` of those that are not before `end`.
template <class T, class F>
void each_of_group(const Row& row, int64_t first, int64_t end, float none, V::F* out, const F& f) {
  for (int64_t g = 0; g < V::width; ++g) out[g] = first + g < end ? f(Tile<T>(row, first + g), g) : V::set(none);
}

template <class T>
V::F max_of_tile(const Tile<T>& logits) {
  V::F a = V::load(logits + 0), b = V::load(logits + V::width);
  for (int64_t i = 2 * V::width; i < kTile; i += 2 * V::width) {
    a = V::max(a, V::load(logits + i));
    b = V::max(b, V::load(logits + i + V::width));
  }
  return V::max(a, b);
}

// Subtracting -inf from -inf would give nan where the sum is 0.
V::F usable_base(V::F max) { return V::keep(V::differs(max, -INFINITY), max); }

void tile_max(const Row& row, int64_t begin, int64_t end, float* max) {
  with_dtype(row.dtype, [&](auto element) {
    using T = decltype(element);
    for (int64_t first = begin; first < end; first += V::width) {
      V::F largest[V::width];
      each_of_group<T>(row, first, end, -INFINITY, largest, [](const Tile<T>& logits, int64_t) {
        // max drops a nan or keeps it, depending on the order of its operands: look for it apart.
        V::F a = V::set(-INFINITY), b = a, x, y;
        V::M nan = V::is_nan(a);
        for (int64_t i = 0; i < kTile; i += 2 * V::width) {
          prefetch_next(logits + i);
          V::load_two(logits + i, x, y);
          nan = V::either(nan, V::either(V::is_nan(x), V::is_nan(y)));
          a = V::max(a, x);
          b = V::max(b, y);
        }
        return V::any(nan) ? V::set(NAN) : V::max(a, b);
      });
      V::store(max + first, V::fold_max(largest));
    }
  });
}

// What add(sum, logit, place of the tile) makes of the logits of each tile of a group.
template <class T, class F>
V::F group_sums(const Row& row, int64_t first, int64_t end, const F& add) {
  V::F sums[V::width];
  each_of_group<T>(row, first, end, 0.0f, sums, [&](const Tile<T>& logits, int64_t g) {
    V::F a = V::set(0.0f), b = a, x, y;
    for (int64_t i = 0; i < kTile; i += 2 * V::width) {
      prefetch_next(logits + i);
      V::load_two(logits + i, x, y);
      a = add(a, x, g);
      b = add(b, y, g);
    }
    return V::add(a, b);
  });
  return V::fold_add(sums);
}

// scale * (x - base), in two operations that round nothing before they scale. In halves: the difference of two floats
// may be none.
class Gap {
 public:
  Gap(V::F base, V::F scale2) : half_base_(V::mul(base, V::set(-0.5f))), twice_(V::add(scale2, scale2)) {}
  V::F operator()(V::F x) const { return V::mul(V::fma(x, V::set(0.5f), half_base_), twice_); }

 private:
  V::F half_base_, twice_;
};

// Sums of exp(scale * (logit - base)) with a base for each tile, `scale2` to base 2: for low temperatures.
template <class T>
V::F sums_from_own(const Row& row, int64_t first, int64_t end, V::F bases, V::F scale2) {
  float base[V::width];
  V::store(base, bases);
  return group_sums<T>(row, first, end, [&](V::F sum, V::F logit, int64_t g) {
    return V::add(sum, V::exp2(Gap(V::set(base[g]), scale2)(logit)));
  });
}

// Up to it an offset is below 2^22, as V::Powers takes it, and what that leaves of the base a small factor. Beyond it:
// low temperatures.
constexpr float kLargeSpread = 0x1p20f;

// The largest logit of each tile of a group.
template <class T>
V::F group_maxima(const Row& row, int64_t first, int64_t end) {
  V::F largest[V::width];
  const auto largest_of = [](const Tile<T>& logits, int64_t) { return max_of_tile(logits); };
  each_of_group<T>(row, first, end, -INFINITY, largest, largest_of);
  return V::fold_max(largest);
}

// A row's tiles are summed from one base, so that nothing has to be known of a group before it is summed. Any logit of
// the row will do that is not far below a tile's largest: what it makes vanish is nothing beside it. Those at the begin
// are needed next anyway, and all of them are fetched at once: logits from all over the row, each in a page of its own,
// took a twentieth of a pass.
float estimate_max(const Row& row, int64_t begin, int64_t end) {
  constexpr int64_t kTiles = 16;
  V::F largest = V::set(-INFINITY);
  with_dtype(row.dtype, [&](auto element) {
    using T = decltype(element);
    const T* const logits = static_cast<const T*>(row.logits) + begin * kTile;
    for (int64_t i = 0; i < kTiles * kTile; i += 2 * V::width) prefetch_two<T>(reinterpret_cast<uintptr_t>(logits + i));
    for (int64_t tile = begin; tile < begin + kTiles && tile < end; ++tile)
      largest = V::max(largest, V::load(Tile<T>(row, tile) + 0));
  });
  return V::reduce_max(largest);
}

// Not negative, and not too large. In place, since a call (which a cast is) would cost the loop its registers.
FixedPoint fixed_point(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const int up = int(bits >> 23) - 150 + kFixedBits;
  const uint32_t digits = (bits & 0x7fffff) | 0x800000;
  return up >= 0 ? FixedPoint(digits) << up : FixedPoint(up > -24 ? digits >> -up : 0);
}

Summed tile_stats(const Row& row, float scale, float base, int64_t begin, int64_t end, float* tile_base,
                  float* tile_sum) {
  // From one base in one operation: 2^(scale2 * logit + offset) with a whole offset, times what that leaves of the
  // base.
  const float scale2 = scale * kLog2e, offset = -std::nearbyint(base * scale2);
  const float factor = std::exp2(-std::fma(base, scale2, offset));
  const typename V::Powers powers{scale2, offset};
  const bool usable = std::fabs(base * scale) <= kLargeSpread;  // and finite
  // So that a row of them fits.
  const int64_t tiles = row.vocab / kTile + 1;
  const float most = std::ldexp(1.0f, 127 - kFixedBits) / float(tiles);
  Summed summed{true, 0};
  with_dtype(row.dtype, [&](auto element) {
    using T = decltype(element);
    const auto add_power = [powers](V::F sum, V::F logit, int64_t) { return powers.add(sum, logit); };
    for (int64_t first = begin; first < end; first += V::width) {
      V::F bases = V::set(base), sums = V::set(INFINITY);
      if (usable) sums = V::mul(group_sums<T>(row, first, end, add_power), V::set(factor));
      if (V::any(V::exceeds(sums, most))) {
        summed.shared = false;
        bases = usable_base(group_maxima<T>(row, first, end));
        sums = sums_from_own<T>(row, first, end, bases, V::set(scale2));
      } else {
        summed.total += fixed_point(V::reduce_add(sums));
      }
      V::store(tile_base + first, bases);
      V::store(tile_sum + first, sums);
    }
  });
  return summed;
}

Combined combine(const float* tile_base, const float* tile_sum, int64_t padded_tiles, float scale, float* weights) {
  V::F largest = V::set(-INFINITY);
  for (int64_t t = 0; t < padded_tiles; t += V::width) {
    // A tile without weight must not decide on the base.
    const V::M weighs = V::differs(V::load(tile_sum + t), 0.0f);
    largest = V::max(largest, V::either_of(weighs, V::load(tile_base + t), -INFINITY));
  }
  const float base = V::reduce_max(largest);
  const Gap gap(usable_base(V::set(base)), V::set(scale * kLog2e));
  V::F total = V::set(0.0f);
  for (int64_t t = 0; t < padded_tiles; t += V::width) {
    const V::F factor = V::exp2(gap(V::load(tile_base + t)));
    const V::F sum = V::load(tile_sum + t);
    const V::F weight = V::either_of(V::differs(sum, 0.0f), V::mul(sum, factor), 0.0f);
    total = V::add(total, weight);
    V::store(weights + t, weight);
  }
  return {base, V::reduce_add(total)};
}

// --- filters --------------------------------------------------------------------------------------------------------

TailStats tile_above(const Row& row, float scale, float base, float pivot, int64_t tile) {
  const Gap gap(V::set(base), V::set(scale * kLog2e));
  const V::F pivots = V::set(pivot);
  V::F mass = V::set(0.0f), least = V::set(INFINITY);
  with_dtype(row.dtype, [&](auto element) {
    const Tile<decltype(element)> logits(row, tile);
    for (int64_t i = 0; i < kTile; i += V::width) {
      const V::F x = V::load(logits + i);
      const V::M above = V::at_least(x, pivots);
      mass = V::add(mass, V::keep(above, V::exp2(gap(x))));
      least = V::min(least, V::either_of(above, x, INFINITY));
    }
  });
  return {V::reduce_add(mass), V::reduce_min(least)};
}

float tile_peak(const Row& row, int64_t tile) {
  float peak = -INFINITY;
  with_dtype(row.dtype, [&](auto element) {
    const Tile<decltype(element)> logits(row, tile);
    peak = V::reduce_max(max_of_tile(logits));
  });
  return peak;
}

int64_t tile_between(const Row& row, float low, float high, int64_t tile, float* out) {
  const V::F lows = V::set(low), highs = V::set(high);
  int64_t count = 0;
  with_dtype(row.dtype, [&](auto element) {
    const Tile<decltype(element)> logits(row, tile);
    for (int64_t i = 0; i < kTile; i += V::width) {
      const V::F x = V::load(logits + i);
      const V::M inside = V::except(V::at_least(x, lows), V::at_least(x, highs));
      if (V::any(inside)) count += V::compress(out + count, inside, x);
    }
  });
  return count;
}

// --- probabilities --------------------------------------------------------------------------------------------------

// The scalars of a distribution, spread over vectors and brought to base 2.
struct Spread {
  V::F scale, cutoff, high, low, log2e;

  explicit Spread(const Distribution& d)
      : scale(V::set(d.scale)),
        cutoff(V::set(d.cutoff)),
        high(V::set(-d.lse_high)),
        low(V::set(-d.lse_low)),
        log2e(V::set(kLog2e)) {}

  V::F prob(V::F logit) const {
    const V::F exponent = V::add(V::fma(logit, scale, high), low);
    return V::keep(V::at_least(logit, cutoff), V::exp2(V::mul(exponent, log2e)));
  }
};

template <class T, class U>
V::F residual(const Spread& target, const T* target_logits, const Spread& draft, const U* draft_logits) {
  // max(x, y) gives y where either is nan.
  return V::max(V::sub(target.prob(V::load(target_logits)), draft.prob(V::load(draft_logits))), V::set(0.0f));
}

void token_residuals(const Row& target, const Distribution& target_dist, const Row& draft,
                     const Distribution& draft_dist, int64_t tile, float* weights) {
  const Spread p(target_dist), q(draft_dist);
  with_dtype(target.dtype, [&](auto target_element) {
    with_dtype(draft.dtype, [&](auto draft_element) {
      const Tile<decltype(target_element)> targets(target, tile);
      const Tile<decltype(draft_element)> drafts(draft, tile);
      for (int64_t i = 0; i < kTile; i += V::width) V::store(weights + i, residual(p, targets + i, q, drafts + i));
    });
  });
}

void token_probs(const Row& row, const Distribution& dist, int64_t tile, float* weights) {
  const Spread p(dist);
  with_dtype(row.dtype, [&](auto element) {
    const Tile<decltype(element)> logits(row, tile);
    for (int64_t i = 0; i < kTile; i += V::width) V::store(weights + i, p.prob(V::load(logits + i)));
  });
}

// --- noise ----------------------------------------------------------------------------------------------------------

// Philox4x32-10 (Salmon et al., SC 2011) of n vectors of consecutive counters, a counter a lane. Every round waits for
// the one before, so two vectors at once take a quarter less than one after the other.
template <int n>
void philox(const Noise& noise, uint32_t first, uint32_t* out) {
  using U = typename V::U;
  U c0[n], c1[n], c2[n], c3[n];
  for (int i = 0; i < n; ++i) {
    c0[i] = V::counters(first + uint32_t(i * V::width));
    c1[i] = V::set_u(uint32_t(noise.position));
    c2[i] = V::set_u(uint32_t(noise.position >> 32));
    c3[i] = V::set_u(noise.tag);
  }
  uint32_t k0 = uint32_t(noise.seed), k1 = uint32_t(noise.seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    for (int i = 0; i < n; ++i) {
      const auto [high_a, low_a] = V::multiply(c0[i], 0xD2511F53u);
      const auto [high_b, low_b] = V::multiply(c2[i], 0xCD9E8D57u);
      c0[i] = V::exclusive_or(high_b, c1[i], V::set_u(k0));
      c1[i] = low_b;
      c2[i] = V::exclusive_or(high_a, c3[i], V::set_u(k1));
      c3[i] = low_a;
    }
  }
  for (int i = 0; i < n; ++i) V::store_words(out + i * 4 * V::width, c0[i], c1[i], c2[i], c3[i]);
}

void words(const Noise& noise, uint32_t first, int64_t counters, uint32_t* out) {
  uint32_t block[4 * V::width];
  for (int64_t done = 0; done < counters; done += V::width) {
    philox<1>(noise, first + uint32_t(done), block);
    const int64_t count = counters - done < V::width ? counters - done : V::width;
    for (int64_t i = 0; i < 4 * count; ++i) out[4 * done + i] = block[i];
  }
}

void arrivals(const float* weights, int64_t first, int64_t count, const Noise& noise, float* out) {
  constexpr int kAtOnce = 2;
  constexpr int64_t kWords = kAtOnce * 4 * V::width;
  uint32_t block[kWords];
  for (int64_t start = 0; start < count; start += kWords) {
    philox<kAtOnce>(noise, uint32_t((first + start) / 4), block);
    for (int64_t i = 0; i < kWords && start + i < count; i += V::width) {
      const V::F weight = V::load(weights + start + i);
      const V::F time = V::div(V::exponential(block + i), weight);
      V::store(out + start + i, V::either_of(V::positive(weight), time, INFINITY));
    }
  }
}

Arrival first_arrival(const float* times, int64_t count) {
  constexpr int kAtOnce = 4;  // one after the other, minima wait for each other
  V::F earliest[kAtOnce];
  for (V::F& lane : earliest) lane = V::set(INFINITY);
  for (int64_t i = 0; i < count; i += kAtOnce * V::width)
    for (int j = 0; j < kAtOnce; ++j) earliest[j] = V::min(earliest[j], V::load(times + i + j * V::width));
  const float time = V::reduce_min(V::min(V::min(earliest[0], earliest[1]), V::min(earliest[2], earliest[3])));
  int64_t index = 0;
  while (!V::any(V::at_least(V::set(time), V::load(times + index)))) index += V::width;
  while (times[index] != time) ++index;
  return {index, time};
}

// --- products -------------------------------------------------------------------------------------------------------

// Of x with `n` rows at once: their sums do not wait for each other. Where a vector of each is read, as much of what
// lies behind them is fetched: cold, a product takes a tenth longer than reading its rows does, and half as long again
// without.
template <int n>
void products_at_once(const int8_t* rows, const float* scale, int64_t size, const float* x, float* out) {
  constexpr uintptr_t kAhead = 8192;
  V::F sums[n];
  for (V::F& sum : sums) sum = V::set(0.0f);
  const int64_t whole = size - size % V::width;
  for (int64_t i = 0; i < whole; i += V::width) {
    const V::F factor = V::load(x + i);
    const uintptr_t ahead = reinterpret_cast<uintptr_t>(rows + n * i) + kAhead;  // may lie past the end: no pointer
    for (uintptr_t at = ahead; at < ahead + n * V::width; at += 64)
      __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 3);
    for (int r = 0; r < n; ++r) sums[r] = V::fma(V::load(rows + r * size + i), factor, sums[r]);
  }
  for (int r = 0; r < n; ++r) {
    float sum = V::reduce_add(sums[r]);
    for (int64_t i = whole; i < size; ++i) sum += float(rows[r * size + i]) * x[i];
    out[r] = sum * scale[r];
  }
}

void eight_bit_products(const int8_t* rows, const float* scale, int64_t size, int64_t count, const float* x,
                        float* out) {
  constexpr int kAtOnce = 8;
  int64_t r = 0;
  for (; r + kAtOnce <= count; r += kAtOnce) products_at_once<kAtOnce>(rows + r * size, scale + r, size, x, out + r);
  for (; r < count; ++r) products_at_once<1>(rows + r * size, scale + r, size, x, out + r);
}

// --- all of them ----------------------------------------------------------------------------------------------------

constexpr Kernels table(const char* name) noexcept {
  return {name,         tile_max,    estimate_max,    tile_stats, combine,       tile_above, tile_peak,
          tile_between, token_probs, token_residuals, arrivals,   first_arrival, words,      eight_bit_products};
}
