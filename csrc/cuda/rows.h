// Rows of logits, and measuring them.
#pragma once

#include "noise.h"

namespace specdec::cuda {

constexpr float kLog2E = 1.4426950408889634f;

SPECDEC_DEVICE float as_float(float x) { return x; }
SPECDEC_DEVICE float as_float(BFloat16 x) {
#ifdef __CUDACC__
  return __uint_as_float(uint32_t(x.bits) << 16);
#else
  return to_float(x);
#endif
}
SPECDEC_DEVICE float as_float(Half x) {
#ifdef __CUDACC__
  return __half2float(__ushort_as_half(x.bits));
#else
  return to_float(x);
#endif
}
SPECDEC_DEVICE float one(const float* p) { return given(p); }
template <class T>
SPECDEC_DEVICE float one(const T* p) {
  return as_float(T{given(reinterpret_cast<const uint16_t*>(p))});
}

#ifdef __CUDACC__

// Eight neighbouring logits as they lie in memory.
template <class T>
struct Eight {
  uint32_t pairs[4];

  __device__ __forceinline__ void load(const T* p) {
    const uint4 q = __ldcs(reinterpret_cast<const uint4*>(p));
    pairs[0] = q.x, pairs[1] = q.y, pairs[2] = q.z, pairs[3] = q.w;
  }
  __device__ __forceinline__ void gather(const T* row, int first, int vocab) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int id = first + 2 * k;
      const auto* bits = reinterpret_cast<const uint16_t*>(row) + id;
      const uint32_t none = is_half() ? 0xFC00u : 0xFF80u;
      pairs[k] = (id < vocab ? __ldg(bits) : none) | (id + 1 < vocab ? __ldg(bits + 1) : none) << 16;
    }
  }
  __device__ __forceinline__ float at(int e) const {
    if constexpr (is_half()) return as_float(Half{uint16_t(e % 2 ? pairs[e / 2] >> 16 : pairs[e / 2])});
    return __uint_as_float(e % 2 ? pairs[e / 2] & 0xFFFF0000u : pairs[e / 2] << 16);
  }
  // The largest; nan if one is.
  __device__ __forceinline__ float top() const {
    if constexpr (is_half()) {
      const auto pair = [&](int k) { return *reinterpret_cast<const __half2*>(&pairs[k]); };
      const __half2 m = __hmax2_nan(__hmax2_nan(pair(0), pair(1)), __hmax2_nan(pair(2), pair(3)));
      return LargerOrNan()(__low2float(m), __high2float(m));
    } else {
      const auto pair = [&](int k) { return *reinterpret_cast<const __nv_bfloat162*>(&pairs[k]); };
      const __nv_bfloat162 m = __hmax2_nan(__hmax2_nan(pair(0), pair(1)), __hmax2_nan(pair(2), pair(3)));
      return LargerOrNan()(__low2float(m), __high2float(m));
    }
  }

 private:
  __device__ static constexpr bool is_half() { return std::is_same_v<T, Half>; }
};
template <>
struct Eight<float> {
  float x[8];

  __device__ __forceinline__ void load(const float* p) {
    const float4 low = __ldcs(reinterpret_cast<const float4*>(p)),
                 high = __ldcs(reinterpret_cast<const float4*>(p) + 1);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  }
  __device__ __forceinline__ void gather(const float* row, int first, int vocab) {
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] = first + e < vocab ? __ldg(row + first + e) : -INFINITY;
  }
  __device__ __forceinline__ float at(int e) const { return x[e]; }
  __device__ __forceinline__ float top() const {
    const LargerOrNan larger;
    return larger(larger(larger(x[0], x[1]), larger(x[2], x[3])), larger(larger(x[4], x[5]), larger(x[6], x[7])));
  }
};

#else

template <class T>
struct Eight {
  float x[8];

  void load(const T* p) { gather(p, 0, kElements); }
  void gather(const T* row, int first, int vocab) {
    for (int e = 0; e < 8; ++e) x[e] = first + e < vocab ? as_float(row[first + e]) : -INFINITY;
  }
  float at(int e) const { return x[e]; }
  float top() const {
    float m = x[0];
    for (const float value : x) m = LargerOrNan()(m, value);
    return m;
  }
};

#endif

// The rows of one request.
template <class T>
struct Rows {
  using Loaded = Eight<T>;
  const T* logits = nullptr;
  int64_t stride = 0;
  int vocab = 0;

  SPECDEC_DEVICE const T* row(int i) const { return logits + i * stride; }
  SPECDEC_DEVICE float logit(int i, int id) const { return one(row(i) + id); }

  // The logits of eight ids from `first`; -inf past the end of the row.
  SPECDEC_DEVICE Loaded load(int i, int first) const {
    Loaded v;
    if (first + kElements <= vocab && reinterpret_cast<uintptr_t>(row(i)) % 16 == 0)
      v.load(row(i) + first);
    else
      v.gather(row(i), first, vocab);
    return v;
  }
};

// Rows of any dtype, to which is done what specdec_kernels/ops/processing.py says as they are loaded, and never
// written. That is said in the block's memory, and done in one place.
template <>
struct Rows<Mixed> {
  using Loaded = Eight<float>;
  Team team;
  Which which;
  int vocab;

  SPECDEC_DEVICE float logit(int i, int id) const;
  SPECDEC_DEVICE Loaded load(int i, int first) const;
};

// The rows as they lie in memory.
template <class T>
SPECDEC_DEVICE Rows<T> rows_in(const ProcessedRows& all) {
  return {static_cast<const T*>(all.logits.data), all.logits.row_stride, all.vocab};
}

// A logit of row i whose id has an adjustment.
SPECDEC_DEVICE float adjusted(const ProcessedRows& all, int i, int adjustment, int id, float x) {
  int drafted = 0;
  SPECDEC_ROLLED
  for (int before = i; before > 0;) {
    const int draft = all.parents == nullptr ? --before : before;
    drafted += all.drafts[all.first_draft + draft * all.draft_stride] == id;
    if (all.parents != nullptr) before = int(given(all.parents + before));
  }
  return specdec::adjusted(all.adjustments, adjustment, drafted, x);
}

// The 32 bits of the mask that have id's at the place id % 32.
SPECDEC_DEVICE uint32_t mask_word(const ProcessedRows& all, int i, int id) {
  return all.mask == nullptr ? ~0u : given(all.mask + (int64_t(i) * ((all.vocab + 31) / 32) + id / 32));
}

SPECDEC_SELDOM float processed_logit(const Team team, Which which, int i, int id) {
  const ProcessedRows& all = team.memory().rows[which];
  const int adjustment = int(first_adjustment(all.adjustments, id));
  const bool allowed = (mask_word(all, i, id) >> id % 32 & 1) != 0;
  const int column = all.columns.of(id);
  float x = column < 0                        ? -INFINITY
            : all.logits.dtype == DType::f32  ? rows_in<float>(all).logit(i, column)
            : all.logits.dtype == DType::bf16 ? rows_in<BFloat16>(all).logit(i, column)
                                              : rows_in<Half>(all).logit(i, column);
  if (adjustment < all.adjustments.count && given(all.adjustments.ids + adjustment) == id)
    x = adjusted(all, i, adjustment, id, x);
  return allowed ? x : -INFINITY;
}

SPECDEC_SELDOM Eight<float> processed_logits(const Team team, Which which, int i, int first) {
  const ProcessedRows& all = team.memory().rows[which];
  const int end = Smaller()(first + kElements, all.vocab);
  int adjustment = int(first_adjustment(all.adjustments, first));
  const uint32_t there = first < end ? (1u << (end - first)) - 1 : 0;
  const uint32_t allowed = there == 0 ? 0 : mask_word(all, i, first) >> first % 32 & there;
  Eight<float> v;
  if (!all.columns.all()) {
    SPECDEC_UNROLL
    for (int e = 0; e < kElements; ++e)
      v.x[e] = first + e < end ? processed_logit(team, which, i, first + e) : -INFINITY;
    return v;
  }
  if (all.logits.dtype == DType::f32) {
    v = rows_in<float>(all).load(i, first);
  } else {  // both types of 16 bits are loaded as one
    const auto packed = rows_in<BFloat16>(all).load(i, first);
    SPECDEC_UNROLL
    for (int e = 0; e < kElements; ++e) {
      const uint16_t bits = uint16_t(uint32_t(bits_of(packed.at(e))) >> 16);
      v.x[e] = all.logits.dtype == DType::bf16 ? as_float(BFloat16{bits}) : as_float(Half{bits});
    }
  }
  SPECDEC_ROLLED
  for (; adjustment < all.adjustments.count; ++adjustment) {
    const int id = given(all.adjustments.ids + adjustment);
    if (id >= end) break;
    float x = 0.0f;
    SPECDEC_UNROLL
    for (int e = 0; e < kElements; ++e) x = first + e == id ? v.x[e] : x;  // not an index, which takes memory
    x = adjusted(all, i, adjustment, id, x);
    SPECDEC_UNROLL
    for (int e = 0; e < kElements; ++e) v.x[e] = first + e == id ? x : v.x[e];
  }
  SPECDEC_UNROLL
  for (int e = 0; e < kElements; ++e)
    if ((allowed >> e & 1) == 0) v.x[e] = -INFINITY;
  return v;
}

SPECDEC_DEVICE float Rows<Mixed>::logit(int i, int id) const { return processed_logit(team, which, i, id); }
SPECDEC_DEVICE Eight<float> Rows<Mixed>::load(int i, int first) const {
  return processed_logits(team, which, i, first);
}

// A lane's part of a span of row i, a load at a time. What is asked for again is loaded again, so that nothing of it is
// in registers meanwhile; what was processed is kept in the block's memory.
template <class T>
struct Span {
  const Team& team;
  const Rows<T>& rows;
  int i, span;

  SPECDEC_DEVICE auto load(int u) const {
    const auto v = rows.load(i, span * kSpan + load_offset(team, u));
    if constexpr (std::is_same_v<T, Mixed>) {
      SPECDEC_UNROLL
      for (int e = 0; e < kElements; ++e) team.kept(u * kElements + e) = v.x[e];
    }
    return v;
  }
  SPECDEC_DEVICE auto again(int u) const {
    if constexpr (std::is_same_v<T, Mixed>) {
      Eight<float> v;
      SPECDEC_UNROLL
      for (int e = 0; e < kElements; ++e) v.x[e] = team.kept(u * kElements + e);
      return v;
    } else {
      return load(u);
    }
  }
};

// Subtracting -inf from -inf would give nan where the sum is 0.
SPECDEC_DEVICE float usable_base(float top) { return top == -INFINITY ? 0.0f : top; }

// 2^(scale * (x - base)), with the scale of base 2; in halves: the difference of two floats may be none.
class Weights {
 public:
  SPECDEC_DEVICE Weights(float scale2, float base) : half_(-0.5f * base), twice_(2.0f * scale2) {}
  SPECDEC_DEVICE float operator()(float x) const { return ex2(fmaf(x, 0.5f, half_) * twice_); }

 private:
  float half_, twice_;
};

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

// What of a row is measured: greedily the bases alone; and for what only some draws ask, the largest logits of tiles.
enum class Sums { none, plain, with_tops };
struct Measure {
  float scale2;  // scale, of base 2
  Sums sums;
};

// The race of all ids: the coupled rule's draw, its noise keyed on the absolute position. Eight ids of each lane, from
// `id`; `first` is the warp's. An exponential is not below its uniform, so most need no logarithm to be seen to come
// later than that one.
template <class Loaded, class Weight>
SPECDEC_DEVICE void race(const Team& team, const Loaded& v, int id, const Weight& weight, const Noise& noise,
                         Arrived& first) {
  Words quads[kElements / 4];
  philox(noise, uint32_t(id / 4), 1, quads);
  uint32_t early = 0;
  SPECDEC_UNROLL
  for (int e = 0; e < kElements; ++e)
    early |= uint32_t(float(quads[e / 4].w[e % 4]) * (0.999f * 0x1p-32f) < first.time * weight(v.at(e))) << e;
  SPECDEC_ROLLED
  for (; early != 0; early &= early - 1) {
    const int at = first_bit(early);
    uint32_t word = 0;
    float x = 0.0f;
    SPECDEC_UNROLL
    for (int e = 0; e < kElements; ++e)  // not an index, which takes memory
      if (e == at) word = quads[e / 4].w[e % 4], x = v.at(e);
    take_part(first, exponential(word), weight(x), id + at);
  }
  first = team.first_in_warp(first);
}

// One span: `load(u)` gives a lane's u-th load of it, `again(u)` the same once more; `used(u)` once it is not needed
// any more.
template <bool kRace, Sums kSums, int kUnroll, class F, class G, class H>
SPECDEC_DEVICE void measure_span(const Team& team, int span, int own_tile, float scale2, const Noise& noise,
                                 const Table& table, const F& load, const G& again, const H& used) {
  float x[kLoads] = {}, own[kOwnTiles], top = -INFINITY;
  const int first_tile = kTilesOfSpan * span + own_tile;
  SPECDEC_UNROLL_BY(kUnroll)
  for (int u = 0; u < kLoads; ++u) {
    const float here = load(u).top();
    team.set(x, u, here), top = u == 0 ? here : LargerOrNan()(top, here);
  }
  if constexpr (kSums == Sums::with_tops) {
    team.per_tile(x, LargerOrNan(), own);
    for (int k = 0; k < kOwnTiles; ++k)
      if (team.leads_tile()) put(table.top(first_tile + k), own[k]);
  }
  top = team.in_warp(top, LargerOrNan());
  if (team.lane() == 0) put(table.base(span), top);
  const Weights weight(scale2, usable_base(top));
  Arrived first;
  SPECDEC_UNROLL_BY(kUnroll)
  for (int u = 0; u < kLoads; ++u) {
    if constexpr (kSums != Sums::none) {
      const auto& v = again(u);
      float sum = weight(v.at(0));
      SPECDEC_UNROLL
      for (int e = 1; e < kElements; ++e) sum += weight(v.at(e));
      team.set(x, u, sum);
      if constexpr (kRace) race(team, v, span * kSpan + load_offset(team, u), weight, noise, first);
    }
    used(u);
  }
  if constexpr (kSums == Sums::none) return;
  team.per_tile(x, Plus(), own);
  for (int k = 0; k < kOwnTiles; ++k)
    if (team.leads_tile()) put(table.sum(first_tile + k), own[k]);
  if constexpr (!kRace) return;
  if (team.lane() == 0) put(table.time(span), first.time), put(table.winner(span), float_of_bits(first.id));
}

// Spans that take more than to load them whole and to add them up: at the end of a row, of rows that lie at odd
// addresses, of logits that are processed, and of races, which take ten times what a sum does.
template <bool kRace, class T>
SPECDEC_SELDOM void measure_carefully(const Team team, const Rows<T> rows, int i, int span, int end, int stride,
                                      float scale2, const Noise noise, const Table table) {
  for (; span < end; span += stride) {
    const Span<T> here{team, rows, i, span};
    measure_span<kRace, Sums::with_tops, 1>(
        team, span, team.own_tile(), scale2, noise, table, [&](int u) { return here.load(u); },
        [&](int u) { return here.again(u); }, [](int) {});
  }
}

// Spans that are loaded without asking for the end of the row, or whether it begins at a multiple of 16 bytes: all but
// the last one, nearly always. The first that was not.
template <bool kRace, class T, class F>
SPECDEC_DEVICE int measure_whole(const Team& team, const T* row, int vocab, int span, int end, int stride,
                                 const Measure& what, const Table& table, const F& meanwhile) {
  const bool fits = reinterpret_cast<uintptr_t>(row) % 16 == 0 && (!kRace || what.sums == Sums::none);
  const int whole = fits ? Smaller()(vocab / kSpan, end) : 0;
  Eight<T> v[kLoads];
  if (span < whole) {
    SPECDEC_UNROLL
    for (int u = 0; u < kLoads; ++u) v[u].load(row + (span * kSpan + load_offset(team, u)));
  }
  meanwhile();
  uint32_t own_tile = uint32_t(team.own_tile());
  compute_here(own_tile);  // and not for every span
  const auto here = [&](int u) -> const Eight<T>& { return v[u]; };
  const auto all = [&](auto sums) {
    for (; span < whole; span += stride) {
      // What has been summed makes room for the same part of the next span, which comes while the rest is summed.
      // Behind the last one it is the begin of the row, the same for all lanes: a load that may be left out would go to
      // other registers first.
      const T* next = span + stride < whole ? row + ((span + stride) * kSpan + load_offset(team, 0)) : row;
      measure_span<false, decltype(sums)::value, kLoads>(team, span, int(own_tile), what.scale2, {}, table, here, here,
                                                         [&](int u) { v[u].load(next + u * kLanes * kElements); });
    }
  };
  if (kRace || what.sums == Sums::none)
    all(std::integral_constant<Sums, Sums::none>());
  else if (what.sums == Sums::plain)
    all(std::integral_constant<Sums, Sums::plain>());
  else
    all(std::integral_constant<Sums, Sums::with_tops>());
  return span;
}

// The spans first, first + stride, ... before `end`, by a warp. `meanwhile` is called once, after the first loads have
// been asked for.
template <bool kRace, class T, class F>
SPECDEC_DEVICE void measure(const Team& team, const Rows<T>& rows, int i, int first, int end, int stride,
                            const Measure& what, const Noise& noise, const Table& table, const F& meanwhile) {
  int span = first;
  if constexpr (std::is_same_v<T, Mixed>)
    meanwhile();
  else
    span = measure_whole<kRace>(team, rows.row(i), rows.vocab, first, end, stride, what, table, meanwhile);
  if (span < end) measure_carefully<kRace, T>(team, rows, i, span, end, stride, what.scale2, noise, table);
}

// The same out of line, where rows are measured again and again. What calls it keeps so many registers that spans of
// float32 cannot be held.
template <class T>
SPECDEC_SELDOM void measure_row(const Team team, const Rows<T> rows, int i, int first, int end, int stride,
                                const Measure what, const Table table) {
  if constexpr (sizeof(typename Rows<T>::Loaded) > 16)
    measure_carefully<false, T>(team, rows, i, first, end, stride, what.scale2, {}, table);
  else
    measure<false>(team, rows, i, first, end, stride, what, {}, table, [] {});
}

// f(id, logit) on all ids of row i, by a block.
template <class T, class F>
SPECDEC_DEVICE void for_ids(const Team& team, const Rows<T>& rows, int i, const F& f) {
  for (int first = team.rank() * kElements; first < rows.vocab; first += kThreads * kElements) {
    const auto v = rows.load(i, first);
    SPECDEC_UNROLL
    for (int e = 0; e < kElements; ++e)
      if (first + e < rows.vocab) f(first + e, v.at(e));
  }
}

}  // namespace specdec::cuda
