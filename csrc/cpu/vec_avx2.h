// Eight lanes of AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "elements.h"
#include "polynomials.h"

namespace specdec::avx2 {

struct V {
  using F = __m256;
  using M = __m256;  // all ones where true
  static constexpr int64_t width = 8;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static F load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static float reduce_add(F x) {
    return fold(x, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
  }
  static float reduce_max(F x) {
    return fold(x, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
  }
  static float reduce_min(F x) {
    return fold(x, [](__m128 a, __m128 b) { return _mm_min_ps(a, b); });
  }
  static M is_nan(F x) { return _mm256_cmp_ps(x, x, _CMP_UNORD_Q); }
  static M at_least(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_NLT_UQ); }
  static M positive(F x) { return _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ); }
  static M either(M a, M b) { return _mm256_or_ps(a, b); }
  static bool any(M m) { return _mm256_movemask_ps(m) != 0; }
  static F keep(M m, F x) { return _mm256_and_ps(m, x); }
  static F either_of(M m, F x, float otherwise) { return _mm256_blendv_ps(set(otherwise), x, m); }

  static F exp2(F x) {
    // Below 2^-125 the result is 0; the operand order of max lets a nan through.
    const M vanishes = _mm256_cmp_ps(x, set(-125.0f), _CMP_LT_OQ);
    x = _mm256_min_ps(set(127.0f), _mm256_max_ps(set(-125.0f), x));
    const F n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const F r = sub(x, n);
    F y = fma(set(kExp2[5]), r, set(kExp2[4]));
    y = fma(y, r, set(kExp2[3]));
    y = fma(y, r, set(kExp2[2]));
    y = fma(y, r, set(kExp2[1]));
    y = fma(y, r, set(kExp2[0]));
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_andnot_ps(vanishes, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent)));
  }

  // Natural logarithm of a positive normal number.
  static F log(F x) {
    // Subtracting the bits of 0.75 and keeping the high ones leaves the exponent of x / mantissa, mantissa in [3/4, 3/2).
    const __m256i bits = _mm256_castps_si256(x), origin = _mm256_set1_epi32(0x3F400000);
    const __m256i offset = _mm256_sub_epi32(bits, origin);
    const __m256i exponent = _mm256_srai_epi32(offset, 23);
    const F mantissa = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(exponent, 23)));
    const F f = sub(mantissa, set(1.0f));
    F y = set(kLog1p[7]);
    for (int i = 6; i >= 0; --i) y = fma(y, f, set(kLog1p[i]));
    const F square = mul(f, f);
    y = fma(mul(y, f), square, fma(square, set(-0.5f), f));
    return fma(_mm256_cvtepi32_ps(exponent), set(0.693147180559945f), y);
  }

  // -log1p(-u), u = (word + 1/2) / 2^32, without losing the small u nor the small 1 - u (docs/noise.md).
  static F exponential(const uint32_t* words) {
    const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    const __m256i large = _mm256_srai_epi32(word, 31);
    const __m256i folded = _mm256_xor_si256(word, large);  // below 2^31, so a signed conversion will do
    const F half = mul(add(_mm256_cvtepi32_ps(folded), set(0.5f)), set(0x1p-32f));
    const F complement = sub(set(1.0f), half);  // for small u: what the logarithm sees, and what rounding lost
    const F lost = sub(sub(set(1.0f), complement), half);
    const M is_large = _mm256_castsi256_ps(large);
    const F y = _mm256_blendv_ps(complement, half, is_large);
    const F correction = _mm256_andnot_ps(is_large, div(lost, y));
    return sub(set(0.0f), add(log(y), correction));
  }

 private:
  template <class Op>
  static float fold(F x, Op op) {
    __m128 y = op(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = op(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(op(y, _mm_shuffle_ps(y, y, 1)));
  }
};

}  // namespace specdec::avx2
