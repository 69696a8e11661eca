// Rows of logits, and measuring them.
#pragma once

#include "noise.h"

namespace specdec::cuda {

SPECDEC_DEVICE float as_float(float x) { return x; }
SPECDEC_DEVICE float as_float(BFloat16 x) { return float_of_bits(int(uint32_t(x.bits) << 16)); }
SPECDEC_DEVICE float as_float(Half x) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(x.bits));
#else
  return to_float(x);
#endif
}
// One logit as it lies in memory; -inf where there is none.
SPECDEC_DEVICE float one(const float* p) { return p == nullptr ? -INFINITY : given(p); }
template <class T>
SPECDEC_DEVICE T one(const T* p) {
  const uint16_t none = std::is_same_v<T, Half> ? 0xFC00 : 0xFF80;
  return {p == nullptr ? none : given(reinterpret_cast<const uint16_t*>(p))};
}

// x[at] where the compiler does not know the index, which would put all of x into memory.
template <class T, int kCount>
SPECDEC_DEVICE T at_of(const T (&x)[kCount], int at) {
  T found = x[0];
  SPECDEC_UNROLL
  for (int k = 1; k < kCount; ++k) found = k == at ? x[k] : found;
  return found;
}
template <class T, int kCount>
SPECDEC_DEVICE void set_at(T (&x)[kCount], int at, T value) {
  SPECDEC_UNROLL
  for (int k = 0; k < kCount; ++k) x[k] = k == at ? value : x[k];
}

// Eight neighbouring logits as they lie in memory.
template <class T>
struct alignas(16) Eight {
  T x[kElements];

  SPECDEC_DEVICE float at(int e) const {
    if constexpr (std::is_same_v<T, BFloat16>) {  // where two lie in a word, the upper one is there without a shift
      uint32_t pair;
      memcpy(&pair, x + e / 2 * 2, sizeof pair);
      return float_of_bits(int(e % 2 ? pair & 0xFFFF0000u : pair << 16));
    }
    return as_float(x[e]);
  }
  // The largest; nan if one is.
  SPECDEC_DEVICE float top() const {
    const LargerOrNan larger;
#ifdef __CUDACC__
    if constexpr (sizeof(T) == 2) {
      std::conditional_t<std::is_same_v<T, Half>, __half2, __nv_bfloat162> pairs[4];
      memcpy(pairs, x, sizeof x);
      const auto top = __hmax2_nan(__hmax2_nan(pairs[0], pairs[1]), __hmax2_nan(pairs[2], pairs[3]));
      return larger(__low2float(top), __high2float(top));
    }
#endif
    return larger(larger(larger(at(0), at(1)), larger(at(2), at(3))),
                  larger(larger(at(4), at(5)), larger(at(6), at(7))));
  }
};

template <class T>
SPECDEC_DEVICE Eight<T> eight_at(const T* p) {
  return load_streaming(reinterpret_cast<const Eight<T>*>(p));
}

template <class T>
SPECDEC_DEVICE const T* begin_of(const Rows& all, int i) {
  return static_cast<const T*>(all.logits.data) + uint32_t(i) * all.logits.row_stride;  // a sign takes a register
}

// The logits of eight ids from `first`; -inf past the end of the row, and where it has no column for an id.
template <class T>
SPECDEC_DEVICE Eight<T> eight_of(const T* row, int first, int vocab, const Columns& columns) {
  if (columns.table == nullptr && first + kElements <= vocab && reinterpret_cast<uintptr_t>(row) % 16 == 0)
    return eight_at(row + first);
  Eight<T> v;
  SPECDEC_UNROLL
  for (int e = 0; e < kElements; ++e) {
    const int column = first + e < vocab ? column_of(columns, first + e) : -1;
    v.x[e] = one(column >= 0 ? row + column : nullptr);
  }
  return opaque(v);  // or those of 16 bits would have a register each
}

// Eight logits that this thread has in the block's memory, and putting them there.
SPECDEC_DEVICE Eight<float> own(const Eights& all) {
  return by_words<Four>(Eight<float>{}, [&](Four, int half) { return all[half][block::rank()]; });
}
SPECDEC_DEVICE void put_own(Eights& all, const Eight<float>& v) {
  by_words<Four>(v, [&](Four four, int half) { return all[half][block::rank()] = four; });
}

// A logit of row i whose id has an adjustment. What is said of the rows is read again, so that few registers have it.
SPECDEC_DEVICE float adjusted(uint32_t which, int i, int adjustment, int id, float x) {
  int drafted = 0;
  SPECDEC_ROLLED
  for (int node = i; node > 0;) {
    compute_here(which);
    const Rows& all = block::memory().rows[which];
    drafted += all.draft(node) == id;
    node = all.parents == nullptr ? node - 1 : int(given(all.parents + node));
  }
  compute_here(which);
  return specdec::adjusted(block::memory().rows[which].adjustments, adjustment, drafted, x);
}

// Logits of any dtype, to which is done what specdec_kernels/ops/processing.py says as they are loaded; they are never
// written back. They are left in the block's memory: a register that is needed here is one less for what calls it.
SPECDEC_SELDOM void process(Which which, int i, int first) {
  const Rows& all = block::memory().rows[which];
  Eights& processed = block::memory().processed;
  const auto load = [&](auto type) {
    const auto raw = eight_of(begin_of<typename decltype(type)::type>(all, i), first, all.vocab, all.columns);
    Eight<float> v;
    SPECDEC_UNROLL
    for (int e = 0; e < kElements; ++e) v.x[e] = raw.at(e);
    put_own(processed, v);
  };
  switch (all.logits.dtype) {
    case DType::f32: load(TypeOf<float>()); break;
    case DType::bf16: load(TypeOf<BFloat16>()); break;
    default: load(TypeOf<Half>());
  }
  const int end = std::min(first + kElements, all.vocab);
  int adjustment = int(first_adjustment(all.adjustments, first));
  SPECDEC_ROLLED
  for (; adjustment < int(all.adjustments.count); ++adjustment) {
    const int id = given(all.adjustments.ids + adjustment);
    if (id >= end) break;
    const auto x = [&](int e) -> float& { return processed[e / 4][block::rank()].x[e % 4]; };
    x(id - first) = adjusted(which, i, adjustment, id, x(id - first));
  }
  if (all.mask != nullptr && first < end) {
    const uint32_t allowed = given(all.mask + (int64_t(i) * words_of(all.vocab) + first / 32)) >> first % 32;
    Eight<float> v = own(processed);
    SPECDEC_UNROLL
    for (int e = 0; e < kElements; ++e) v.x[e] = (allowed >> e & 1) != 0 ? v.x[e] : -INFINITY;
    put_own(processed, v);
  }
}

SPECDEC_DEVICE Sampling sampling_of(const SamplingParameters& all, int request) {
  const SamplingParameters own = all.of(request);
  const int top_k = int(std::min(own.top_k, int64_t(std::numeric_limits<int>::max())));
  return {scale_of(own.temperature), top_k, own.top_p, own.min_p};
}

// What of a row is measured: greedily the bases alone; and for what only some draws ask, the largest logits of tiles.
enum class Sums { none, plain, with_tops };

// A row is measured into its table: of every tile the sum of the weights of its ids relative to the largest logit of
// the tile's span, which is the base of that span; its largest logit, where filters will ask for it; and of every span
// who came first in the race of all ids, where there is one. All else that is asked about a row is read from there, so
// it does not matter which block measured which span.
struct Table {
  float* at;
  int spans;

  SPECDEC_SHARED static int64_t floats(int64_t spans) { return kSpanFloats * spans; }
  SPECDEC_DEVICE float* sum(int tile) const { return at + tile; }
  SPECDEC_DEVICE float* top(int tile) const { return at + (kTilesOfSpan * spans + tile); }
  SPECDEC_DEVICE float* base(int span) const { return at + (2 * kTilesOfSpan * spans + span); }
  SPECDEC_DEVICE float* time(int span) const { return base(spans + span); }
  SPECDEC_DEVICE float* winner(int span) const { return base(2 * spans + span); }
  SPECDEC_DEVICE const Four* four_sums(int k) const { return reinterpret_cast<const Four*>(sum(4 * k)); }
  SPECDEC_DEVICE const Four* four_tops(int k) const { return reinterpret_cast<const Four*>(top(4 * k)); }
};

// The rows of a request, from an element of the logits on, the first one's table by its number.
SPECDEC_DEVICE Rows described(const Logits& logits, int64_t begin, int64_t vocab, const Sampling& sampling,
                              const Plan& work, int64_t first_table) {
  Rows rows;
  rows.logits = logits, rows.logits.data = address(logits, begin);
  rows.vocab = int(vocab), rows.spans = work.spans, rows.sampling = sampling;
  rows.tables = work.tables + first_table * Table::floats(work.spans);
  return rows;
}

// Row i of some that the block's memory describes.
template <class T>
struct Row {
  Which which;
  int i;

  SPECDEC_DEVICE const Rows& all() const { return block::memory().rows[which]; }
  SPECDEC_DEVICE const T* begin() const { return begin_of<T>(all(), i); }
  SPECDEC_DEVICE int vocab() const { return all().vocab; }
  SPECDEC_DEVICE const Sampling& sampling() const { return all().sampling; }
  SPECDEC_DEVICE Table table() const { return {all().tables + uint32_t(i) * all().floats_a_table, all().spans}; }
  SPECDEC_DEVICE Sums sums() const {
    return sampling().greedy() ? Sums::none : sampling().filters(vocab()) ? Sums::with_tops : Sums::plain;
  }
  // The logits of eight ids from `first`, a multiple of eight; -inf past the end of the row.
  SPECDEC_DEVICE auto load(int first) const {
    if constexpr (std::is_same_v<T, Mixed>)
      return process(which, i, first), own(block::memory().processed);
    else
      return eight_of(begin(), first, vocab(), {});
  }
  // f(logit) of as many ids as there are places, a part of such eight.
  template <int kCount, class F = std::identity>
  SPECDEC_DEVICE void load(int first, float (&x)[kCount], const F& f = {}) const {
    const auto v = load(first / kElements * kElements);
    SPECDEC_UNROLL
    for (int k = 0; k < kCount; ++k) {
      const float low = v.at(k), high = v.at(k + kElements - kCount);  // values to choose from, not memory
      x[k] = f(first % kElements == 0 ? low : high);
    }
  }
  SPECDEC_DEVICE float logit(int id) const {
    if constexpr (std::is_same_v<T, Mixed>)
      return at_of(load(id / kElements * kElements).x, id % kElements);
    else
      return as_float(one(begin() + id));
  }
  // f(id, logit) on ids from `first`, a multiple of eight, to before `end`, by a block.
  template <class F>
  SPECDEC_DEVICE void for_ids(int first, int end, const F& f) const {
    for (first += block::rank() * kElements; first < end; first += kThreads * kElements) {
      const auto v = load(first);
      SPECDEC_UNROLL
      for (int e = 0; e < kElements; ++e)
        if (first + e < end) f(first + e, v.at(e));
    }
  }
};

// 2^(scale2 * (x - base)); in halves: the difference of two floats may be none. A base of -inf would give nan.
struct Weights {
  float scale2, base;

  SPECDEC_DEVICE float operator()(float x) const {
    return ex2(fmaf(x, 0.5f, base == -INFINITY ? 0.0f : -0.5f * base) * (2.0f * scale2));
  }
};

// A sum of weights relative to the largest logit among them.
struct Mass {
  float top = -INFINITY, sum = 0.0f;

  SPECDEC_DEVICE bool valid() const { return top > -INFINITY && top < INFINITY; }
};

// The race of all ids: the coupled rule's draw, its noise keyed on the absolute position. Eight ids of each lane, from
// `id`; `first` is the warp's. Most need no logarithm to be seen to be late: an exponential is not below its uniform.
template <class Loaded, class Weight>
SPECDEC_DEVICE void race(const Loaded& v, int id, const Weight& weight, const Noise& noise, Arrived& first) {
  SPECDEC_UNROLL
  for (int quad = 0; quad < kElements; quad += 4) {
    const Words words = philox(noise, uint32_t((id + quad) / 4));
    uint32_t early = 0;
    float w[4];
    SPECDEC_UNROLL
    for (int e = 0; e < 4; ++e) {
      w[e] = weight(v.at(quad + e));
      early |= uint32_t(float(words.w[e]) * (0.999f * 0x1p-32f) < first.time * w[e]) << e;
    }
    SPECDEC_ROLLED
    for (; early != 0; early &= early - 1) {
      const int at = trailing_zeros(early);
      take_part(first, exponential(at_of(words.w, at)), at_of(w, at), id + quad + at);
    }
  }
  first = block::first_in_warp(first);
}

// One span, of which a lane has its loads v(u); `used(u)` is called once the u-th is not needed any more.
template <bool kRace, Sums kSums, class Loads, class F>
SPECDEC_DEVICE void measure_span(int span, int own_tile, float scale2, const Noise& noise, const Table& table,
                                 const Loads& v, const F& used) {
  float x[kLoads], top = -INFINITY;
  const int first_tile = kTilesOfSpan * span + own_tile;
  SPECDEC_UNROLL
  for (int u = 0; u < kLoads; ++u) x[u] = v(u).top(), top = u == 0 ? x[u] : LargerOrNan()(top, x[u]);
  if constexpr (kSums == Sums::with_tops) block::put_tiles(x, own_tile, LargerOrNan(), table.top(first_tile));
  top = block::in_warp(top, LargerOrNan());
  if (block::lane() == 0) store_l2(table.base(span), top);
  const Weights weight{scale2, top};
  Arrived first;
  SPECDEC_UNROLL
  for (int u = 0; u < kLoads; ++u) {
    const auto& own = v(u);
    if constexpr (kSums != Sums::none) {
      x[u] = weight(own.at(0));
      SPECDEC_UNROLL
      for (int e = 1; e < kElements; ++e) x[u] += weight(own.at(e));
    }
    if constexpr (kRace) race(own, span * kSpan + load_offset(u), weight, noise, first);
    used(u);
  }
  if constexpr (kSums == Sums::none) return;
  block::put_tiles(x, own_tile, std::plus<>(), table.sum(first_tile));
  if (kRace && block::lane() == 0)
    store_l2(table.time(span), first.time), store_l2(table.winner(span), float_of_bits(first.id));
}

// Spans that take more than to load them whole and to add them up: at the end of a row, of rows that lie at odd
// addresses, of logits that are processed, and of races, which take ten times what a sum does.
template <bool kRace, class T>
SPECDEC_DEVICE void measure_carefully(const Row<T>& row, int span, int end, int stride, const Noise& noise) {
  for (; span < end; span = opaque(span + stride)) {  // or its products would be counted on, each in a register
    decltype(row.load(0)) v[kLoads];
    // There are no registers for 32 floats while some are processed, or race: the first and the last are in memory.
    const auto in_memory = [](int u) -> Eights& { return u == 0 ? block::memory().aside : block::memory().processed; };
    SPECDEC_UNROLL
    for (int u = 0; u < kLoads; ++u) {
      v[u] = row.load(span * kSpan + load_offset(u));
      if constexpr (sizeof v[u] > 16)
        if (u % (kLoads - 1) == 0) put_own(in_memory(u), v[u]);
    }
    const auto loads = [&](int u) {
      if constexpr (sizeof v[u] > 16)
        if (u % (kLoads - 1) == 0) return own(in_memory(u));
      return v[u];
    };
    measure_span<kRace, Sums::with_tops>(span, block::own_tile(), row.sampling().scale2(), noise, row.table(), loads,
                                         [](int) {});
  }
}

// Spans that are loaded without asking for the end of the row: all but the last one, nearly always. The first that was
// not.
template <Sums kSums, class T>
SPECDEC_DEVICE int measure_whole(const Row<T>& row, int span, int end, int stride) {
  const T* const begin = uniform_value(row.begin());
  const Table table = uniform_value(row.table());
  const float scale2 = uniform_value(row.sampling().scale2());
  Eight<T> v[kLoads];
  const int own_tile = block::own_tile();
  if (span >= end) return span;
  SPECDEC_UNROLL
  for (int u = 0; u < kLoads; ++u) v[u] = eight_at(begin + (span * kSpan + load_offset(u)));
  for (; span < end; span += stride) {
    // What has been summed makes room for the same part of the next span, which comes while the rest is summed. Behind
    // the last one it is the begin of the row, the same for all lanes: a load that may be left out would go to other
    // registers first.
    const T* next = span + stride < end ? begin + ((span + stride) * kSpan + load_offset(0)) : begin;
    measure_span<false, kSums>(
        span, own_tile, scale2, {}, table, [&](int u) -> const auto& { return v[u]; },
        [&](int u) { v[u] = eight_at(next + u * kLanes * kElements); });
  }
  return span;
}

// The spans `span`, span + stride, ... before `end`, by a warp.
template <bool kRace, bool kWhole = true, class T>
SPECDEC_DEVICE void measure(const Row<T>& row, int span, int end, int stride, const Noise& noise) {
  span = uniform_value(span);
  if constexpr (kWhole && !std::is_same_v<T, Mixed>) {
    const int whole = reinterpret_cast<uintptr_t>(row.begin()) % 16 == 0 ? std::min(row.vocab() / kSpan, end) : 0;
    const Sums sums = row.sums();
    if (sums == Sums::none)
      span = measure_whole<Sums::none>(row, span, whole, stride);
    else if (!kRace && sums == Sums::plain)
      span = measure_whole<Sums::plain>(row, span, whole, stride);
    else if (!kRace)
      span = measure_whole<Sums::with_tops>(row, span, whole, stride);
  }
  if (span < end) measure_carefully<kRace>(row, span, end, stride, noise);
}

// A whole row anew, by one block, which sees it behind.
template <class T>
SPECDEC_SELDOM void measure_anew(const Row<T> row) {
  measure_carefully<false>(row, block::warp(), row.table().spans, kWarps, {});
  block::sync();
}

}  // namespace specdec::cuda
