// One lane, any machine.
#pragma once

#include "../common/elements.h"

namespace specdec::scalar {

struct V {
  using F = float;
  using M = bool;
  using U = uint32_t;
  struct Words {
    U high, low;
  };
  static constexpr int64_t width = 1;

  template <class T>
  static F load(const T* p) {
    return to_float(*p);
  }
  template <class T>
  static void load_two(const T* p, F& a, F& b) {
    a = load(p), b = load(p + 1);
  }
  static void store(float* p, F x) { *p = x; }
  static F set(float x) { return x; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return std::fma(a, b, c); }
  // As the vector instructions: the second operand where either is nan.
  static F max(F a, F b) { return a > b ? a : b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static float reduce_add(F x) { return x; }
  static float reduce_max(F x) { return x; }
  static float reduce_min(F x) { return x; }
  // Lane i of the result: x[i] reduced.
  static F fold_add(const F* x) { return *x; }
  static F fold_max(const F* x) { return *x; }
  static M differs(F x, float y) { return x != y; }
  static M exceeds(F x, float y) { return !(x <= y); }  // nan does
  static M is_nan(F x) { return x != x; }
  static M at_least(F a, F b) { return !(a < b); }
  static M positive(F x) { return x > 0.0f; }
  static M either(M a, M b) { return a || b; }
  static M except(M a, M b) { return a && !b; }
  static unsigned bits(M m) { return m ? 1 : 0; }  // a lane each
  static bool any(M m) { return m; }
  static int64_t compress(float* out, M m, F x) {
    if (m) *out = x;
    return m;
  }
  static F keep(M m, F x) { return m ? x : 0.0f; }
  static F either_of(M m, F x, float otherwise) { return m ? x : otherwise; }
  static F exp2(F x) { return std::exp2(x); }
  struct Powers {
    float scale, offset;
    F add(F sum, F x) const { return sum + exp2(fma(x, scale, offset)); }
  };
  static F exponential(const uint32_t* word) {
    const bool small = *word < 0x80000000u;  // u = (word + 1/2) / 2^32 < 1/2
    const float half = (float(small ? *word : ~*word) + 0.5f) * 0x1p-32f;
    return small ? -std::log1p(-half) : -std::log(half);
  }

  static U set_u(uint32_t x) { return x; }
  static U counters(uint32_t first) { return first; }
  static U exclusive_or(U a, U b, U c) { return a ^ b ^ c; }
  static Words multiply(U a, uint32_t b) {
    const uint64_t product = uint64_t(a) * b;
    return {U(product >> 32), U(product)};
  }
  static void store_words(uint32_t* out, U w0, U w1, U w2, U w3) { out[0] = w0, out[1] = w1, out[2] = w2, out[3] = w3; }
};

}  // namespace specdec::scalar
