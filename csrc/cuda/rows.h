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
  // Those of columns at(0) to at(7) of a row; -inf where that is negative.
  template <class F>
  __device__ __forceinline__ void gather(const T* row, const F& at) {
    const auto* bits = reinterpret_cast<const uint16_t*>(row);
    const auto element = [&](int column) { return column >= 0 ? __ldg(bits + column) : is_half() ? 0xFC00u : 0xFF80u; };
#pragma unroll
    for (int k = 0; k < 4; ++k) pairs[k] = element(at(2 * k)) | element(at(2 * k + 1)) << 16;
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
  template <class F>
  __device__ __forceinline__ void gather(const float* row, const F& at) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int column = at(e);
      x[e] = column >= 0 ? __ldg(row + column) : -INFINITY;
    }
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

  void load(const T* p) {
    gather(p, [](int e) { return e; });
  }
  template <class F>
  void gather(const T* row, const F& at) {
    for (int e = 0; e < 8; ++e) {
      const int column = at(e);
      x[e] = column >= 0 ? as_float(row[column]) : -INFINITY;
    }
  }
  float at(int e) const { return x[e]; }
  float top() const {
    float m = x[0];
    for (const float value : x) m = LargerOrNan()(m, value);
    return m;
  }
};

#endif

// Where rows that have some ids of the vocabulary only, `width` of them, have each. No table: rows have all, in order.
struct Columns {
  const int32_t* table = nullptr;
  int width = 0;

  SPECDEC_DEVICE bool all() const { return table == nullptr; }
  // Negative where there is none.
  SPECDEC_DEVICE int of(int id) const {
    const int column = given(table + id);
    return column < width ? column : -1;
  }
};

// The logits of eight ids from `first`, by their columns; -inf past the end of the vocabulary.
template <class T>
SPECDEC_SELDOM Eight<T> gathered(const T* row, const Columns columns, int first, int vocab) {
  Eight<T> v;
  v.gather(row, [&](int e) { return first + e < vocab ? columns.of(first + e) : -1; });
  return v;
}

// The rows of one request.
template <class T>
struct Rows {
  using Loaded = Eight<T>;
  const T* logits = nullptr;
  int64_t stride = 0;
  int vocab = 0;
  Columns columns{};

  SPECDEC_DEVICE const T* row(int i) const { return logits + i * stride; }
  SPECDEC_DEVICE float logit(int i, int id) const {
    if (columns.all()) return one(row(i) + id);
    const int column = columns.of(id);
    return column >= 0 ? one(row(i) + column) : -INFINITY;
  }

  // The logits of eight ids from `first`; -inf past the end of the row.
  SPECDEC_DEVICE Loaded load(int i, int first) const {
    Loaded v;
    if (!columns.all())
      v = gathered(row(i), columns, first, vocab);
    else if (first + kElements <= vocab && reinterpret_cast<uintptr_t>(row(i)) % 16 == 0)
      v.load(row(i) + first);
    else
      v.gather(row(i), [&](int e) { return first + e < vocab ? first + e : -1; });
    return v;
  }
};

// What specdec_kernels/ops/processing.py says is done to the logits as they are loaded, and never written.
template <>
struct Rows<Mixed> {
  using Loaded = Eight<float>;
  const void* logits = nullptr;
  int64_t stride = 0;
  int vocab = 0;
  Columns columns{};
  DType dtype = DType::f32;
  const uint32_t* mask = nullptr;  // of the first row
  Adjustments adjustments;
  Ids drafts;  // row i counts the i first of them as output
  int64_t first_draft = 0, draft_stride = 0;
  const int64_t* parents = nullptr;  // of a tree: a row counts the drafts on its node's path

  template <class T>
  SPECDEC_DEVICE Rows<T> as() const {
    return {static_cast<const T*>(logits), stride, vocab, columns};
  }

  // A logit of row i whose id has an adjustment.
  SPECDEC_DEVICE float adjusted(int i, int64_t adjustment, float x) const {
    int64_t drafted = 0;
    const auto is_here = [&](int64_t draft) {
      return drafts[first_draft + draft * draft_stride] == adjustments.ids[adjustment];
    };
    if (parents != nullptr)
      for (int64_t node = i; node > 0; node = parents[node]) drafted += is_here(node);
    else
      for (int64_t before = 0; before < i; ++before) drafted += is_here(before);
    return specdec::adjusted(adjustments, adjustment, drafted, x);
  }

  SPECDEC_DEVICE bool allowed(int i, int id) const {
    return mask == nullptr || (given(mask + int64_t(i) * ((vocab + 31) / 32) + id / 32) >> (id % 32) & 1) != 0;
  }

  SPECDEC_DEVICE float logit(int i, int id) const {
    float x = dtype == DType::f32    ? as<float>().logit(i, id)
              : dtype == DType::bf16 ? as<BFloat16>().logit(i, id)
                                     : as<Half>().logit(i, id);
    const int64_t adjustment = first_adjustment(adjustments, id);
    if (adjustment < adjustments.count && adjustments.ids[adjustment] == id) x = adjusted(i, adjustment, x);
    return allowed(i, id) ? x : -INFINITY;
  }

  SPECDEC_DEVICE Loaded load(int i, int first) const {
    Loaded v;
    if (dtype == DType::f32)
      v = as<float>().load(i, first);
    else if (dtype == DType::bf16)
      v = in_floats(as<BFloat16>().load(i, first));
    else
      v = in_floats(as<Half>().load(i, first));
    for (int64_t adjustment = first_adjustment(adjustments, first);
         adjustment < adjustments.count && adjustments.ids[adjustment] < first + kElements; ++adjustment) {
      const int64_t offset = adjustments.ids[adjustment] - first;
      SPECDEC_UNROLL
      for (int e = 0; e < kElements; ++e)  // an index known to the compiler keeps the logits in registers
        if (e == offset && first + e < vocab) v.x[e] = adjusted(i, adjustment, v.x[e]);
    }
    SPECDEC_UNROLL
    for (int e = 0; e < kElements; ++e)
      if (mask != nullptr && first + e < vocab && !allowed(i, first + e)) v.x[e] = -INFINITY;
    return v;
  }

 private:
  template <class T>
  SPECDEC_DEVICE static Loaded in_floats(const Eight<T>& packed) {
    Loaded v;
    SPECDEC_UNROLL
    for (int e = 0; e < kElements; ++e) v.x[e] = packed.at(e);
    return v;
  }
};

// A lane's part of a span of row i.
template <class T>
struct Span {
  typename Rows<T>::Loaded v[kLoads];

  SPECDEC_DEVICE void load(const Team& team, const Rows<T>& rows, int i, int span) {
    SPECDEC_UNROLL
    for (int u = 0; u < kLoads; ++u) v[u] = rows.load(i, span * kSpan + load_offset(team, u));
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
struct alignas(16) Four {
  float x[4];
};
struct Table {
  float* at;
  int spans;

  SPECDEC_SHARED static int64_t floats(int64_t spans) { return kSpanFloats * spans; }
  SPECDEC_DEVICE float* sums() const { return at; }
  SPECDEC_DEVICE float* tops() const { return at + kTilesOfSpan * spans; }
  SPECDEC_DEVICE float* bases() const { return at + 2 * kTilesOfSpan * spans; }
  SPECDEC_DEVICE const Four* four_sums(int k) const { return reinterpret_cast<const Four*>(sums()) + k; }
  SPECDEC_DEVICE const Four* four_tops(int k) const { return reinterpret_cast<const Four*>(tops()) + k; }
  SPECDEC_DEVICE float* times() const { return bases() + spans; }
  SPECDEC_DEVICE float* winners() const { return times() + spans; }
};

// What of a row is measured: greedily the bases alone; and for what only some draws ask, the largest logits of tiles.
enum class Sums { none, plain, with_tops };
struct Measure {
  float scale2;  // scale, of base 2
  Sums sums;
};

// The race of all ids: the coupled rule's draw, its noise keyed on the absolute position. Eight ids, from `id`.
template <class Loaded>
SPECDEC_DEVICE void race(const Loaded& v, int id, const Weights& weight, const Noise& noise, Arrived& first) {
  SPECDEC_UNROLL
  for (int quad = 0; quad < kElements / 4; ++quad) {
    const Words words = philox(noise, uint32_t(id / 4 + quad));
    SPECDEC_UNROLL
    for (int word = 0; word < 4; ++word) {
      const float w = weight(v.at(4 * quad + word));
      // An exponential is not below its uniform, so most need no logarithm to be seen to come later.
      if (float(words.w[word]) * (0.999f * 0x1p-32f) < first.time * w)
        take_part(first, exponential(words.w[word]), w, id + 4 * quad + word);
    }
  }
}

// One span, loaded into `v`; `used(u)` once a load is not needed any more.
template <bool kRace, Sums kSums, class Loaded, class F>
SPECDEC_DEVICE void measure_span(const Team& team, const Loaded (&v)[kLoads], int span, float scale2,
                                 const Noise& noise, const Table& table, const F& used) {
  float x[kLoads], own[kOwnTiles], top = x[0] = v[0].top();
  SPECDEC_UNROLL
  for (int u = 1; u < kLoads; ++u) x[u] = v[u].top(), top = LargerOrNan()(top, x[u]);
  if constexpr (kSums == Sums::with_tops) {
    team.per_tile(x, LargerOrNan(), own);
    for (int k = 0; k < kOwnTiles; ++k)
      if (team.leads_tile()) put(table.tops() + (kTilesOfSpan * span + team.own_tile(k)), own[k]);
  }
  top = team.in_warp(top, LargerOrNan());
  if (team.lane() == 0) put(table.bases() + span, top);
  const Weights weight(scale2, usable_base(top));
  Arrived first;
  SPECDEC_UNROLL
  for (int u = 0; u < kLoads; ++u) {
    if constexpr (kSums != Sums::none) {
      x[u] = weight(v[u].at(0));
      SPECDEC_UNROLL
      for (int e = 1; e < kElements; ++e) x[u] += weight(v[u].at(e));
      if constexpr (kRace) race(v[u], span * kSpan + load_offset(team, u), weight, noise, first);
    }
    used(u);
  }
  if constexpr (kSums == Sums::none) return;
  team.per_tile(x, Plus(), own);
  for (int k = 0; k < kOwnTiles; ++k)
    if (team.leads_tile()) put(table.sums() + (kTilesOfSpan * span + team.own_tile(k)), own[k]);
  if constexpr (!kRace) return;
  first = team.first_in_warp(first);
  if (team.lane() == 0) put(table.times() + span, first.time), put(table.winners() + span, float_of_bits(first.id));
}

// Spans at the end of a row, and of rows that lie at odd addresses or have columns of their own, or whose logits are
// processed.
template <bool kRace, class T>
SPECDEC_SELDOM void measure_carefully(const Team team, const Rows<T> rows, int i, int span, int end, int stride,
                                      float scale2, const Noise noise, const Table table) {
  for (; span < end; span += stride) {
    Span<T> here;
    here.load(team, rows, i, span);
    measure_span<kRace, Sums::with_tops>(team, here.v, span, scale2, noise, table, [](int) {});
  }
}

// Spans that are loaded without asking for the end of the row, or whether it begins at a multiple of 16 bytes: all but
// the last one, nearly always. The first that was not.
template <bool kRace, class T, class F>
SPECDEC_DEVICE int measure_whole(const Team& team, const T* row, int vocab, int span, int end, int stride,
                                 const Measure& what, const Noise& noise, const Table& table, const F& meanwhile) {
  const int whole = reinterpret_cast<uintptr_t>(row) % 16 == 0 ? Smaller()(vocab / kSpan, end) : 0;
  Eight<T> v[kLoads];
  if (span < whole) {
    SPECDEC_UNROLL
    for (int u = 0; u < kLoads; ++u) v[u].load(row + (span * kSpan + load_offset(team, u)));
  }
  meanwhile();
  const auto all = [&](auto sums) {
    for (; span < whole; span += stride) {
      // What has been summed makes room for the same part of the next span, which comes while the rest is summed.
      // Behind the last one it is the begin of the row, the same for all lanes: a load that may be left out would go to
      // other registers first.
      const T* next = span + stride < whole ? row + ((span + stride) * kSpan + load_offset(team, 0)) : row;
      measure_span<kRace, decltype(sums)::value>(team, v, span, what.scale2, noise, table,
                                                 [&](int u) { v[u].load(next + u * kLanes * kElements); });
    }
  };
  if (what.sums == Sums::plain)
    all(std::integral_constant<Sums, Sums::plain>());
  else if (what.sums == Sums::none)
    all(std::integral_constant<Sums, Sums::none>());
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
  else if (rows.columns.all())
    span = measure_whole<kRace>(team, rows.row(i), rows.vocab, first, end, stride, what, noise, table, meanwhile);
  else
    meanwhile();
  if (span < end) measure_carefully<kRace, T>(team, rows, i, span, end, stride, what.scale2, noise, table);
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
