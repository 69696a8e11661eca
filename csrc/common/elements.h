// bfloat16 and float16 as stored, with scalar conversions that need no instruction-set extension. Internal linkage:
// every unit compiles them for its own instruction set, and the linker must not choose one of the copies.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace specdec {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

static inline float to_float(float x) { return x; }
static inline float to_float(int8_t x) { return float(x); }
static inline float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
static inline float to_float(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7FFFu;
  if (magnitude >= 0x7C00u) return std::bit_cast<float>(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
  // Multiplying by 2^112 turns the half's exponent bias into the float's, subnormals included.
  const float value = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
}

static inline float negative_infinity(float) { return -INFINITY; }
static inline BFloat16 negative_infinity(BFloat16) { return {0xFF80u}; }
static inline Half negative_infinity(Half) { return {0xFC00u}; }

}  // namespace specdec
