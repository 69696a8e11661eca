// Sixteen lanes of AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include "../common/elements.h"
#include "polynomials.h"

namespace specdec::avx512 {

struct V {
  using F = __m512;
  using M = __mmask16;
  using U = __m512i;
  struct Words {
    U high, low;
  };
  static constexpr int64_t width = 16;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static F load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  // Two vectors of consecutive elements in any order: sums and maxima do not care, and bfloat16 splits cheaper so.
  template <class T>
  static void load_two(const T* p, F& a, F& b) {
    a = load(p), b = load(p + width);
  }
  static void load_two(const BFloat16* p, F& a, F& b) {
    const __m512i bits = _mm512_loadu_si512(p);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(int(0xFFFF0000u))));
  }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static float reduce_add(F x) { return _mm512_reduce_add_ps(x); }
  static float reduce_max(F x) { return _mm512_reduce_max_ps(x); }
  static float reduce_min(F x) { return _mm512_reduce_min_ps(x); }
  // Lane i of the result: x[i] reduced.
  static F fold_add(const F* x) { return fold(x, add); }
  static F fold_max(const F* x) { return fold(x, max); }
  static M differs(F x, float y) { return _mm512_cmp_ps_mask(x, set(y), _CMP_NEQ_UQ); }
  static M exceeds(F x, float y) { return _mm512_cmp_ps_mask(x, set(y), _CMP_NLE_UQ); }  // nan does
  static M is_nan(F x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
  static M at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
  static M positive(F x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ); }
  static M either(M a, M b) { return M(a | b); }
  static M except(M a, M b) { return M(a & ~b); }
  static unsigned bits(M m) { return m; }  // a lane each
  static bool any(M m) { return m != 0; }
  // The lanes of the mask to `out`, and anything behind them; how many they are.
  static int64_t compress(float* out, M m, F x) {
    store(out, _mm512_maskz_compress_ps(m, x));
    return __builtin_popcount(m);
  }
  static F keep(M m, F x) { return _mm512_maskz_mov_ps(m, x); }
  static F either_of(M m, F x, float otherwise) { return _mm512_mask_mov_ps(set(otherwise), m, x); }

  static F exp2(F x) {
    const F r = _mm512_reduce_ps(x, 1);  // x minus the integer below it; 0 for infinities, nan for nan
    F y = fma(set(kExp2[4]), r, set(kExp2[3]));
    y = fma(y, r, set(kExp2[2]));
    y = fma(y, r, set(kExp2[1]));
    y = fma(y, r, set(kExp2[0]));
    return _mm512_scalef_ps(y, x);  // which takes the integer below x itself
  }

  struct Powers {
    F scale, offset;
    Powers(float scale, float offset) : scale(set(scale)), offset(set(offset)) {}
    F add(F sum, F x) const { return V::add(sum, exp2(fma(x, scale, offset))); }
  };

  // Natural logarithm of a positive normal number.
  static F log(F x) {
    // Subtracting the bits of 0.75 and keeping the high ones leaves the exponent of x / mantissa, mantissa in [3/4,
    // 3/2).
    const __m512i bits = _mm512_castps_si512(x), origin = _mm512_set1_epi32(0x3F400000);
    const __m512i exponent = _mm512_srai_epi32(_mm512_sub_epi32(bits, origin), 23);
    const F mantissa = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(exponent, 23)));
    const F f = sub(mantissa, set(1.0f));
    F y = set(kLog1p[7]);
    for (int i = 6; i >= 0; --i) y = fma(y, f, set(kLog1p[i]));
    const F square = mul(f, f);
    y = fma(mul(y, f), square, fma(square, set(-0.5f), f));
    return fma(_mm512_cvtepi32_ps(exponent), set(0.693147180559945f), y);
  }

  // -log1p(-u), u = (word + 1/2) / 2^32, without losing the small u nor the small 1 - u (docs/noise.md).
  static F exponential(const uint32_t* words) {
    const __m512i word = _mm512_loadu_si512(words);
    const M small = _mm512_movepi32_mask(word) ^ M(0xFFFF);
    const __m512i folded = _mm512_mask_xor_epi32(word, M(~small), word, _mm512_set1_epi32(-1));
    const F half = mul(add(_mm512_cvtepu32_ps(folded), set(0.5f)), set(0x1p-32f));
    const F complement = sub(set(1.0f), half);  // for small u: what the logarithm sees, and what rounding lost
    const F lost = sub(sub(set(1.0f), complement), half);
    const F y = _mm512_mask_mov_ps(half, small, complement);
    // lost / y: where y is not next to 1, what rounding lost is next to nothing.
    const F correction = _mm512_maskz_mul_ps(small, lost, sub(set(2.0f), y));
    return sub(set(0.0f), add(log(y), correction));
  }

  static U set_u(uint32_t x) { return _mm512_set1_epi32(int(x)); }
  // first, first + 1, ... in the order of lanes that store_words undoes.
  static U counters(uint32_t first) {
    return _mm512_add_epi32(set_u(first), _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  }
  static U exclusive_or(U a, U b, U c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
  static Words multiply(U a, uint32_t b) {
    const U even = _mm512_mul_epu32(a, set_u(b)), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), set_u(b));
    return {_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd),
            _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32))};
  }
  static void store_words(uint32_t* out, U w0, U w1, U w2, U w3) {
    const U low01 = _mm512_unpacklo_epi32(w0, w1), low23 = _mm512_unpacklo_epi32(w2, w3);
    const U high01 = _mm512_unpackhi_epi32(w0, w1), high23 = _mm512_unpackhi_epi32(w2, w3);
    _mm512_storeu_si512(out, _mm512_unpacklo_epi64(low01, low23));
    _mm512_storeu_si512(out + 16, _mm512_unpackhi_epi64(low01, low23));
    _mm512_storeu_si512(out + 32, _mm512_unpacklo_epi64(high01, high23));
    _mm512_storeu_si512(out + 48, _mm512_unpackhi_epi64(high01, high23));
  }

 private:
  // Each step folds two vectors into one, halving what is left of every operand; the order of the operands is such
  // that lane i ends up with x[i].
  template <class Op>
  static F fold(const F* x, Op op) {
    F halves[8], quarters[4], pairs[2];
    for (int i = 0; i < 8; ++i) {
      const F a = x[order(2 * i)], b = x[order(2 * i + 1)];
      halves[i] = op(_mm512_mask_blend_ps(0xFF00, a, b), _mm512_shuffle_f32x4(a, b, 0x4E));
    }
    for (int i = 0; i < 4; ++i) {
      const F a = halves[2 * i], b = halves[2 * i + 1];
      quarters[i] = op(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
    }
    for (int i = 0; i < 2; ++i) {
      const __m512d a = _mm512_castps_pd(quarters[2 * i]), b = _mm512_castps_pd(quarters[2 * i + 1]);
      pairs[i] =
          op(_mm512_castpd_ps(_mm512_mask_blend_pd(0xAA, a, b)), _mm512_castpd_ps(_mm512_shuffle_pd(a, b, 0x55)));
    }
    return op(_mm512_shuffle_ps(pairs[0], pairs[1], 0x88), _mm512_shuffle_ps(pairs[0], pairs[1], 0xDD));
  }
  static constexpr int order(int slot) { return 4 * (slot % 4) + slot / 4; }
};

}  // namespace specdec::avx512
