// Sixteen lanes of AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include "elements.h"
#include "polynomials.h"

namespace specdec::avx512 {

struct V {
  using F = __m512;
  using M = __mmask16;
  static constexpr int64_t width = 16;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const BFloat16* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static F load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
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
  static M is_nan(F x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
  static M at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
  static M positive(F x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ); }
  static M either(M a, M b) { return M(a | b); }
  static bool any(M m) { return m != 0; }
  static F keep(M m, F x) { return _mm512_maskz_mov_ps(m, x); }
  static F either_of(M m, F x, float otherwise) { return _mm512_mask_mov_ps(set(otherwise), m, x); }

  static F exp2(F x) {
    const F r = _mm512_reduce_ps(x, 0);  // x minus the nearest integer; 0 for infinities, nan for nan
    F y = fma(set(kExp2[5]), r, set(kExp2[4]));
    y = fma(y, r, set(kExp2[3]));
    y = fma(y, r, set(kExp2[2]));
    y = fma(y, r, set(kExp2[1]));
    y = fma(y, r, set(kExp2[0]));
    return _mm512_scalef_ps(y, sub(x, r));
  }

  // Natural logarithm of a positive normal number.
  static F log(F x) {
    const F mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero);
    const F exponent = _mm512_getexp_ps(div(x, mantissa));  // an exact power of two
    const F f = sub(mantissa, set(1.0f));
    F y = set(kLog1p[7]);
    for (int i = 6; i >= 0; --i) y = fma(y, f, set(kLog1p[i]));
    const F square = mul(f, f);
    y = fma(mul(y, f), square, fma(square, set(-0.5f), f));
    return fma(exponent, set(0.693147180559945f), y);
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
    const F correction = _mm512_maskz_div_ps(small, lost, y);
    return sub(set(0.0f), add(log(y), correction));
  }
};

}  // namespace specdec::avx512
