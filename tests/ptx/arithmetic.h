// Instructions that each lane executes for itself, in its registers.
#pragma once
#include <bit>
#include <cmath>
#include <concepts>
#include <cstring>
#include <limits>

#include "warp.h"

struct bfloat16 {
  uint16_t bits;
  operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
};
struct predicate {
  uint8_t set;
};

template <class T>
T value(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <class T>
uint64_t bits(T x) {
  if constexpr (std::signed_integral<T>) return static_cast<uint64_t>(int64_t{x});
  uint64_t made = 0;
  std::memcpy(&made, &x, sizeof x);
  return made;
}

template <class F, class R, class... A>
Step lanewise(F f, R (F::*)(A...) const) {
  return [f](Warp& warp, const Instruction& by, uint32_t active) {
    [&]<size_t... I>(std::index_sequence<I...>) {
      const std::array<const Lanes*, sizeof...(A)> in{&warp.lanes(by.operands[I + 1])...};
      Lanes& out = warp.lanes(by.operands[0]);
      each_lane(active, [&](int lane) { out[lane] = bits(f(value<A>((*in[I])[lane])...)); });
    }(std::index_sequence_for<A...>{});
  };
}

template <class F>
Step lanewise(F f) {
  return lanewise(f, &F::operator());
}

template <class T>
void add_bits(Table& table, const std::string& type) {
  table["mov." + type] = lanewise([](T a) { return a; });
  table["selp." + type] = lanewise([](T a, T b, predicate p) { return p.set ? a : b; });
}

template <class T>
void add_logic(Table& table, const std::string& type) {
  table["and." + type] = lanewise([](T a, T b) { return T(a & b); });
  table["or." + type] = lanewise([](T a, T b) { return T(a | b); });
  table["xor." + type] = lanewise([](T a, T b) { return T(a ^ b); });
  table["not." + type] = lanewise([](T a) { return T(~a); });
  table["shl." + type] = lanewise([](T a, uint32_t n) { return n < 8 * sizeof(T) ? T(a << n) : T(0); });
}

template <class T>
void add_comparisons(Table& table, const std::string& type) {
  auto add = [&](const std::string& name, auto f) {
    table["setp." + name + "." + type] = lanewise([f](T a, T b) { return predicate{f(a, b)}; });
    if constexpr (!std::integral<T>)  // or one of them is nan
      table["setp." + name + "u." + type] = lanewise([f](T a, T b) { return predicate{f(a, b) || a != a || b != b}; });
  };
  table["setp.num." + type] = lanewise([](T a, T b) { return predicate{a == a && b == b}; });
  add("eq", [](T a, T b) { return a == b; });
  add("ne", [](T a, T b) { return a == a && b == b && a != b; });
  add("lt", [](T a, T b) { return a < b; });
  add("le", [](T a, T b) { return a <= b; });
  add("gt", [](T a, T b) { return a > b; });
  add("ge", [](T a, T b) { return a >= b; });
}

template <class T>
void add_words(Table& table, const std::string& type) {
  add_bits<T>(table, type);
  add_logic<T>(table, type);
  add_comparisons<T>(table, type);
}

// The other one, if one is nan; 0 is above -0.
template <class T>
T larger(T a, T b) {
  if (a != a || b != b) return a != a ? b : a;
  return a == b ? (std::signbit(a) ? b : a) : std::max(a, b);
}

template <class T>
void add_arithmetic(Table& table, const std::string& type) {
  table["add." + type] = lanewise([](T a, T b) { return T(a + b); });
  table["sub." + type] = lanewise([](T a, T b) { return T(a - b); });
  table["mul." + type] = lanewise([](T a, T b) { return T(a * b); });
  table["neg." + type] = lanewise([](T a) { return T(-a); });
}

template <class To, class From>
To converted(From x) {
  if constexpr (std::integral<To> && !std::integral<From>) {  // toward 0, and no further than the range goes
    double whole = std::trunc(static_cast<double>(x)), size = std::ldexp(1.0, 8 * sizeof(To) - 1);
    if (std::isnan(whole)) return sizeof(To) == 8 ? std::numeric_limits<To>::min() : To(0);
    if (whole >= size) return std::numeric_limits<To>::max();
    if (whole < -size) return std::numeric_limits<To>::min();
    return static_cast<To>(whole);
  } else {
    return static_cast<To>(x);
  }
}

template <class From>
void add_conversions(Table& table, const std::string& from) {
  auto to = [&]<class To>(const std::string& name, To) {
    table["cvt." + name + "." + from] = lanewise([](From x) { return converted<To>(x); });
  };
  to("f32", 0.0f), to("f64", 0.0), to("s32", int32_t{}), to("s64", int64_t{});
  to("s16", int16_t{}), to("u16", uint16_t{}), to("u32", uint32_t{}), to("u64", uint64_t{});
}

template <std::integral T>
void add_integers(Table& table, const std::string& type) {
  using Wide = std::conditional_t<std::signed_integral<T>, int64_t, uint64_t>;
  add_arithmetic<T>(table, type);
  add_comparisons<T>(table, type);
  add_conversions<T>(table, type);
  table["div." + type] = lanewise([](T a, T b) { return b ? T(a / b) : T(-1); });
  table["rem." + type] = lanewise([](T a, T b) { return b ? T(a % b) : T(-1); });
  table["max." + type] = lanewise([](T a, T b) { return std::max(a, b); });
  table["min." + type] = lanewise([](T a, T b) { return std::min(a, b); });
  table["mad." + type] = lanewise([](T a, T b, T c) { return T(a * b + c); });
  table["mul.wide." + type] = lanewise([](T a, T b) { return Wide{a} * Wide{b}; });
  table["mad.wide." + type] = lanewise([](T a, T b, Wide c) { return Wide{a} * Wide{b} + c; });
  table["mul.hi." + type] = lanewise([](T a, T b) { return T(__int128{a} * b >> 8 * sizeof(T)); });
  table["shr." + type] = lanewise([](T a, uint32_t n) {
    constexpr uint32_t last = 8 * sizeof(T) - 1;
    return n <= last ? T(a >> n) : std::signed_integral<T> ? T(a >> last) : T(0);
  });
  table["bfe." + type] = lanewise([](T a, uint32_t from, uint32_t count) {
    int64_t whole = Wide{a} >> std::min(from & 255u, 63u);
    uint32_t rest = 64 - std::min(count & 255u, 63u);
    if (rest == 64) return T(0);
    return std::signed_integral<T> ? T(whole << rest >> rest) : T(static_cast<uint64_t>(whole) << rest >> rest);
  });
}

template <std::unsigned_integral T>
void add_bit_fields(Table& table, const std::string& type) {
  table["bfi." + type] = lanewise([](T a, T b, uint32_t from, uint32_t count) {
    constexpr uint32_t size = 8 * sizeof(T);
    from = std::min(from & 255u, size), count = std::min(count & 255u, size - from);
    if (!count) return b;
    const T field = T(T(~T{0}) >> (size - count)) << from;
    return T((b & ~field) | (T(a << from) & field));
  });
}

template <std::floating_point T>
void add_floats(Table& table, const std::string& type) {
  add_arithmetic<T>(table, type);
  add_comparisons<T>(table, type);
  add_conversions<T>(table, type);
  table["div." + type] = lanewise([](T a, T b) { return a / b; });
  table["max." + type] = lanewise([](T a, T b) { return larger(a, b); });
  table["min." + type] = lanewise([](T a, T b) { return -larger(-a, -b); });
  table["fma." + type] = lanewise([](T a, T b, T c) { return std::fma(a, b, c); });
  table["abs." + type] = lanewise([](T a) { return std::abs(a); });
}

// The sum toward 0: the nearest one, or the next one where that is further away than what was summed.
inline float sum_toward_0(float a, float b) {
  const float sum = a + b, of_b = sum - a, missing = (a - (sum - of_b)) + (b - of_b);
  return missing != 0 && (missing < 0) != (sum < 0) ? std::nextafter(sum, 0.0f) : sum;
}

inline uint16_t rounded(float x) {  // to bfloat16
  if (std::isnan(x)) return 0x7fff;
  uint32_t whole = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((whole + 0x7fff + (whole >> 16 & 1)) >> 16);
}

inline float flushed(float x) { return std::abs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline uint32_t bytes_chosen(uint32_t a, uint32_t b, uint32_t which) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t made = 0;
  for (int i = 0; i < 4; ++i) {
    uint32_t choice = which >> 4 * i & 15, byte = both >> 8 * (choice & 7) & 255;
    made |= (choice & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
  }
  return made;
}

// All of them.
inline void add_lanewise(Table& table) {
  add_words<uint16_t>(table, "b16");
  add_words<uint32_t>(table, "b32");
  add_words<uint64_t>(table, "b64");
  add_bits<uint16_t>(table, "u16");
  for (const char* type : {"u32", "f32"}) add_bits<uint32_t>(table, type);
  for (const char* type : {"u64", "f64"}) add_bits<uint64_t>(table, type);
  add_bits<uint8_t>(table, "pred");
  add_logic<uint8_t>(table, "pred");
  table["not.pred"] = lanewise([](predicate p) { return predicate{!p.set}; });
  auto integers = [&](const std::string& bits, auto natural, auto whole) {
    add_integers<decltype(natural)>(table, "u" + bits);
    add_integers<decltype(whole)>(table, "s" + bits);
  };
  integers("16", uint16_t{}, int16_t{}), integers("32", uint32_t{}, int32_t{}), integers("64", uint64_t{}, int64_t{});
  add_bit_fields<uint32_t>(table, "b32"), add_bit_fields<uint64_t>(table, "b64");
  add_conversions<int8_t>(table, "s8"), add_conversions<uint8_t>(table, "u8");
  add_floats<float>(table, "f32");
  add_floats<double>(table, "f64");
  auto narrow = [&](const std::string& type, auto number) {
    add_comparisons<decltype(number)>(table, type);
    add_conversions<decltype(number)>(table, type);
  };
  narrow("bf16", bfloat16{}), narrow("f16", _Float16{});
  table["cvt.bf16x2.f32"] = lanewise([](float a, float b) { return uint32_t{rounded(a)} << 16 | rounded(b); });
  table["cvt.bf16.f32"] = lanewise([](float a) { return rounded(a); });
  table["cvt.f16.f32"] = lanewise([](float a) { return static_cast<_Float16>(a); });
  table["cvt.f16x2.f32"] = lanewise([](float a, float b) {
    auto half = [](float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); };
    return uint32_t{half(a)} << 16 | half(b);
  });
  table["add.rz.f32"] = lanewise([](float a, float b) { return sum_toward_0(a, b); });
  table["max.NaN.f32"] = lanewise([](float a, float b) { return a != a || b != b ? NAN : larger(a, b); });
  auto pairs = [&](const std::string& type, auto half) {
    table["max.NaN." + type] = lanewise([](uint32_t a, uint32_t b) {
      auto larger_half = [&](int from) -> uint32_t {
        const float x = std::bit_cast<decltype(half)>(uint16_t(a >> from));
        const float y = std::bit_cast<decltype(half)>(uint16_t(b >> from));
        return x != x || y != y                                                      ? 0x7fff
               : std::bit_cast<uint32_t>(larger(x, y)) == std::bit_cast<uint32_t>(x) ? a >> from & 0xffff
                                                                                     : b >> from & 0xffff;
      };
      return larger_half(16) << 16 | larger_half(0);
    });
  };
  pairs("bf16x2", bfloat16{}), pairs("f16x2", _Float16{});
  for (const char* full : {"div.approx.f32", "div.full.f32"}) table[full] = table["div.f32"];
  table["rcp.f32"] = lanewise([](float a) { return 1 / a; });
  table["rcp.f64"] = lanewise([](double a) { return 1 / a; });
  table["lg2.approx.f32"] = lanewise([](float a) { return std::log2(a); });
  table["ex2.approx.f32"] = lanewise([](float a) { return flushed(std::exp2(flushed(a))); });
  table["rcp.approx.f64"] =
      lanewise([](double a) { return std::bit_cast<double>(std::bit_cast<uint64_t>(1 / a) >> 32 << 32); });
  table["cvta.to.global.u64"] = table["mov.b64"];
  table["popc.b32"] = lanewise([](uint32_t a) { return static_cast<uint32_t>(std::popcount(a)); });
  table["prmt.b32"] = lanewise([](uint32_t a, uint32_t b, uint32_t which) { return bytes_chosen(a, b, which); });
  // Several words of 16, 32 or 64 bits as one, and one as several; an operand of -1 is left out.
  for (int width : {32, 64}) {
    const std::string type = ".b" + std::to_string(width);
    table["pack" + type] = [width](Warp& warp, const Instruction& by, uint32_t active) {
      const int parts = static_cast<int>(by.operands.size()) - 1, size = width / parts;
      each_lane(active, [&](int lane) {
        uint64_t whole = 0;
        for (int i = 0; i < parts; ++i)
          whole |= (warp.lanes(by.operands[i + 1])[lane] & ((uint64_t{1} << size) - 1)) << i * size;
        warp.lanes(by.operands[0])[lane] = whole;
      });
    };
    table["unpack" + type] = [width](Warp& warp, const Instruction& by, uint32_t active) {
      const int parts = static_cast<int>(by.operands.size()) - 1, size = width / parts;
      each_lane(active, [&](int lane) {
        const uint64_t whole = warp.lanes(by.operands.back())[lane];
        for (int i = 0; i < parts; ++i)
          if (by.operands[i] >= 0) warp.lanes(by.operands[i])[lane] = whole >> i * size & ((uint64_t{1} << size) - 1);
      });
    };
  }
}
