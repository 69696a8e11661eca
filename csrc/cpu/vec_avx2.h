// Eight lanes of AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "../common/elements.h"
#include "polynomials.h"

namespace specdec::avx2 {

struct V {
  using F = __m256;
  using M = __m256;  // all ones where true
  using U = __m256i;
  struct Words {
    U high, low;
  };
  static constexpr int64_t width = 8;

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const BFloat16* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static F load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  // Two vectors of consecutive elements in any order: sums and maxima do not care, and bfloat16 splits cheaper so.
  template <class T>
  static void load_two(const T* p, F& a, F& b) {
    a = load(p), b = load(p + width);
  }
  static void load_two(const BFloat16* p, F& a, F& b) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(int(0xFFFF0000u))));
  }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static float reduce_add(F x) { return first(reduce(x, add)); }
  static float reduce_max(F x) { return first(reduce(x, max)); }
  static float reduce_min(F x) { return first(reduce(x, min)); }
  static float first(F x) { return _mm256_cvtss_f32(x); }
  // Lane i of the result: x[i] reduced.
  static F fold_add(const F* x) { return fold(x, add); }
  static F fold_max(const F* x) { return fold(x, max); }
  static M differs(F x, float y) { return _mm256_cmp_ps(x, set(y), _CMP_NEQ_UQ); }
  static M exceeds(F x, float y) { return _mm256_cmp_ps(x, set(y), _CMP_NLE_UQ); }  // nan does
  static M is_nan(F x) { return _mm256_cmp_ps(x, x, _CMP_UNORD_Q); }
  static M at_least(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_NLT_UQ); }
  static M positive(F x) { return _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ); }
  static M either(M a, M b) { return _mm256_or_ps(a, b); }
  static M except(M a, M b) { return _mm256_andnot_ps(b, a); }
  static unsigned bits(M m) { return unsigned(_mm256_movemask_ps(m)); }  // a lane each
  static bool any(M m) { return bits(m) != 0; }
  // The lanes of the mask to `out`; how many they are.
  static int64_t compress(float* out, M m, F x) {
    float lanes[width];
    store(lanes, x);
    int64_t kept = 0;
    for (unsigned left = bits(m); left; left &= left - 1) out[kept++] = lanes[__builtin_ctz(left)];
    return kept;
  }
  static F keep(M m, F x) { return _mm256_and_ps(m, x); }
  static F either_of(M m, F x, float otherwise) { return _mm256_blendv_ps(set(otherwise), x, m); }

  static F exp2(F x) {
    x = max(set(-127.0f), x);  // where the result is 0; lets a nan through
    const F shifted = add(x, set(kShift));
    return mul(exp2_near(sub(x, sub(shifted, set(kShift)))), power(shifted));
  }
  // Of 2^(scale * x + offset), the offset a whole number below 2^22: the exponent is split as it is rounded.
  struct Powers {
    F scale, shift, least;
    Powers(float scale, float offset)
        : scale(set(scale)), shift(set(offset + kShift)), least(set((-127.0f - offset) / scale)) {}
    F add(F sum, F x) const {
      x = max(least, x);
      const F shifted = fma(x, scale, shift);
      return fma(exp2_near(_mm256_fmsub_ps(x, scale, sub(shifted, shift))), power(shifted), sum);
    }
  };

  // Natural logarithm of a positive normal number.
  static F log(F x) {
    // Subtracting the bits of 0.75 and keeping the high ones leaves the exponent of x / mantissa, mantissa in [3/4,
    // 3/2).
    const __m256i bits = _mm256_castps_si256(x), origin = _mm256_set1_epi32(0x3F400000);
    const __m256i exponent = _mm256_srai_epi32(_mm256_sub_epi32(bits, origin), 23);
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
    // lost / y: where y is not next to 1, what rounding lost is next to nothing.
    const F correction = _mm256_andnot_ps(is_large, mul(lost, sub(set(2.0f), y)));
    return sub(set(0.0f), add(log(y), correction));
  }

  static U set_u(uint32_t x) { return _mm256_set1_epi32(int(x)); }
  // first, first + 1, ... in the order of lanes that store_words undoes.
  static U counters(uint32_t first) {
    return _mm256_add_epi32(set_u(first), _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
  }
  static U exclusive_or(U a, U b, U c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
  static Words multiply(U a, uint32_t b) {
    const U even = _mm256_mul_epu32(a, set_u(b)), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), set_u(b));
    return {_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA),
            _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA)};
  }
  static void store_words(uint32_t* out, U w0, U w1, U w2, U w3) {
    const U low01 = _mm256_unpacklo_epi32(w0, w1), low23 = _mm256_unpacklo_epi32(w2, w3);
    const U high01 = _mm256_unpackhi_epi32(w0, w1), high23 = _mm256_unpackhi_epi32(w2, w3);
    auto* to = reinterpret_cast<__m256i*>(out);
    _mm256_storeu_si256(to, _mm256_unpacklo_epi64(low01, low23));
    _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi64(low01, low23));
    _mm256_storeu_si256(to + 2, _mm256_unpacklo_epi64(high01, high23));
    _mm256_storeu_si256(to + 3, _mm256_unpackhi_epi64(high01, high23));
  }

 private:
  // Added to a number it rounds it to an integer, whose sum with 127, the bits of a power of two, is in the last bits.
  static constexpr float kShift = 0x1.8p23f + 127.0f;
  static F power(F shifted) {
    const U most = _mm256_castps_si256(set(0x1.8p23f + 255.0f));  // infinity
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_min_epi32(_mm256_castps_si256(shifted), most), 23));
  }
  static F exp2_near(F r) {
    F y = fma(set(kExp2Near[4]), r, set(kExp2Near[3]));
    y = fma(y, r, set(kExp2Near[2]));
    y = fma(y, r, set(kExp2Near[1]));
    return fma(y, r, set(kExp2Near[0]));
  }

  template <class Op>
  static F reduce(F x, Op op) {
    x = op(x, _mm256_permute2f128_ps(x, x, 0x01));
    x = op(x, _mm256_permute_ps(x, 0x4E));
    return op(x, _mm256_permute_ps(x, 0xB1));
  }

  // Each step folds two vectors into one, halving what is left of every operand; the order of the operands is such
  // that lane i ends up with x[i].
  template <class Op>
  static F fold(const F* x, Op op) {
    F halves[4], pairs[2];
    for (int i = 0; i < 4; ++i) {
      const F a = x[order(2 * i)], b = x[order(2 * i + 1)];
      halves[i] = op(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }
    for (int i = 0; i < 2; ++i) {
      const __m256d a = _mm256_castps_pd(halves[2 * i]), b = _mm256_castps_pd(halves[2 * i + 1]);
      pairs[i] = op(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
    }
    return op(_mm256_shuffle_ps(pairs[0], pairs[1], 0x88), _mm256_shuffle_ps(pairs[0], pairs[1], 0xDD));
  }
  static constexpr int order(int slot) { return 4 * (slot % 2) + slot / 2; }
};

}  // namespace specdec::avx2
