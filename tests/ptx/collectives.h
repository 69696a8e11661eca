// Instructions that the lanes of a warp, or four warps, execute together.
#pragma once
#include <bit>
#include <cstring>

#include "arithmetic.h"

constexpr int GROUP = 4;  // warps that multiply matrices together

inline Step shuffle(const std::string& way) {
  return [way](Warp& warp, const Instruction& by, uint32_t active) {
    together(warp, by, active);
    const int* operands = by.operands.data();  // the result, perhaps whether there is one, and what it comes of
    const bool tells = by.operands.size() == 6;
    const Lanes from = warp.lanes(operands[tells + 1]);
    each_lane(active, [&](int lane) {
      const int by_how = warp.lanes(operands[tells + 2])[lane] & 31;
      const uint32_t bounds = warp.lanes(operands[tells + 3])[lane], segment = bounds >> 8 & 31;
      const int last = (lane & segment) | (bounds & 31 & ~segment), first = lane & segment;
      const int at = way == "bfly"   ? lane ^ by_how
                     : way == "up"   ? lane - by_how
                     : way == "down" ? lane + by_how
                                     : first | by_how;
      const bool inside = way == "up" ? at >= last : at <= last;  // `up`: 0 is where it begins
      if (inside && !(active >> at & 1)) fail(by, "a lane that is not here");
      warp.lanes(operands[0])[lane] = static_cast<uint32_t>(from[inside ? at : lane]);
      if (tells) warp.lanes(operands[1])[lane] = inside;
    });
  };
}

template <class T, class F>
Step reduction(F f) {
  return [f](Warp& warp, const Instruction& by, uint32_t active) {
    together(warp, by, active);
    const Lanes& in = warp.lanes(by.operands[1]);
    T all = value<T>(in[std::countr_zero(active)]);
    each_lane(active & (active - 1), [&](int lane) { all = f(all, value<T>(in[lane])); });
    each_lane(active, [&](int lane) { warp.lanes(by.operands[0])[lane] = static_cast<uint32_t>(all); });
  };
}

inline void ballot(Warp& warp, const Instruction& by, uint32_t active) {
  together(warp, by, active);
  const Lanes& in = warp.lanes(by.operands[1]);
  uint32_t all = 0;
  each_lane(active, [&](int lane) { all |= (in[lane] & 1) << lane; });
  each_lane(active, [&](int lane) { warp.lanes(by.operands[0])[lane] = all; });
}

// 8 x 8 elements of 16 bits, `count` of them: lane l has two neighbours of row l / 4, or of column l / 4.
inline Step matrices(int count, bool transposed, bool store) {
  return [=](Warp& warp, const Instruction& by, uint32_t active) {
    together(warp, by, active);
    const Lanes rows = warp.lanes(store ? by.operands[0] : by.operands.back());
    for (int matrix = 0; matrix < count; ++matrix) {
      Lanes& elements = warp.lanes(by.operands[matrix + store]);
      each_lane(active, [&](int lane) {
        uint32_t pair = static_cast<uint32_t>(elements[lane]);
        for (int half = 0; half < 2; ++half) {
          int row = lane / 4, column = lane % 4 * 2 + half;
          if (transposed) std::swap(row, column);
          uint32_t address = static_cast<uint32_t>(rows[8 * matrix + row] + by.immediate) + 2 * column;
          uint8_t* word = reinterpret_cast<uint8_t*>(&pair) + 2 * half;
          if (store)
            warp.store_shared(address, word, 2, by, lane);
          else
            std::memcpy(word, warp.at_shared(address, 2, Access::READ, by, lane), 2);
        }
        if (!store) elements[lane] = pair;
      });
    }
  };
}

// PTX ISA, "Matrix Descriptor" and "Strides": where an element of 16 bits lies, of an operand in shared memory.
struct Descriptor {
  uint64_t word;
  bool along_k;  // neighbours follow each other along the summed dimension

  uint32_t address(uint32_t other, uint32_t k) const {
    auto field = [&](int from) { return static_cast<uint32_t>(word >> from & 0x3fff) << 4; };
    constexpr std::array<uint32_t, 4> WIDTHS{16, 128, 64, 32};  // bytes that neighbours have together
    const uint32_t kind = word >> 62, width = WIDTHS[kind];
    const uint32_t leading = field(16), stride = field(32), a = along_k ? k : other, b = along_k ? other : k;
    const uint32_t beyond = a / (width / 2), inside = a % (width / 2) * 2 + b % 8 * width;
    // Without a swizzle the two strides change places where neighbours do not follow k.
    const bool exchanged = kind == 0 && !along_k;
    const uint32_t at =
        field(0) + inside + beyond * (exchanged ? stride : leading) + b / 8 * (exchanged ? leading : stride);
    return at ^ ((at >> 7 & (width / 16 - 1)) << 4);
  }
};

using Number = float (*)(uint16_t);
inline float of_bfloat16(uint16_t x) { return bfloat16{x}; }
inline float of_half(uint16_t x) { return std::bit_cast<_Float16>(x); }

// The sums of 16 rows and `columns` columns: lane l has two columns of row l / 4 and of row l / 4 + 8 in every eight.
template <class Left, class Right>
void add_products(Warp& warp, const int* sums, const int* before, int columns, Left left, Right right) {
  std::vector<std::array<float, 16>> a(16), b(columns);
  for (int k = 0; k < 16; ++k) {
    for (int row = 0; row < 16; ++row) a[row][k] = left(row, k);
    for (int column = 0; column < columns; ++column) b[column][k] = right(column, k);
  }
  for (int i = 0; i < columns / 2; ++i)
    for (int lane = 0; lane < LANES; ++lane) {
      double total = before ? value<float>(warp.lanes(before[i])[lane]) : 0;
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) total += double{a[row][k]} * b[column][k];
      warp.lanes(sums[i])[lane] = bits(static_cast<float>(total));
    }
}

// What lies in registers: two neighbours along k in each, first of k below 8.
inline float in_registers(Warp& warp, const int* registers, bool of_rows, int other, int k, Number number) {
  const int lane = other % 8 * 4 + k % 8 / 2, reg = of_rows ? other / 8 + k / 8 * 2 : k / 8;
  return number(static_cast<uint16_t>(warp.lanes(registers[reg])[lane] >> k % 2 * 16));
}

// mma: a warp's own 16 rows, from registers.
inline Step product_of_warp(Number number) {
  return [=](Warp& warp, const Instruction& by, uint32_t active) {
    together(warp, by, active);
    const int* operands = by.operands.data();  // four sums, four registers of rows, two of columns, four sums before
    add_products(
        warp, operands, operands + 10, 8,
        [&](int row, int k) { return in_registers(warp, operands + 4, true, row, k, number); },
        [&](int column, int k) { return in_registers(warp, operands + 8, false, column, k, number); });
  };
}

// wgmma: 64 rows, of which each warp of four has 16.
inline Step product_of_group(int columns, Number number) {
  return [=](Warp& warp, const Instruction& by, uint32_t active) {
    together(warp, by, active);
    const auto& operands = by.operands;
    const int sums = columns / 2;
    const bool from_registers = std::ssize(operands) == sums + 9;
    if (!from_registers && std::ssize(operands) != sums + 7) fail(by, "operands");
    auto scalar = [&](int i) { return warp.lanes(operands[i])[0]; };
    const int second = sums + (from_registers ? 4 : 1);
    const bool adds = scalar(second + 1) & 1;
    if (scalar(second + 2) != 1 || scalar(second + 3) != 1) fail("a product with a negated operand");
    const Descriptor rows{scalar(sums), from_registers || !scalar(second + 4)};
    const Descriptor others{scalar(second), !scalar(static_cast<int>(operands.size()) - 1)};
    warp.products.back().push_back([=, &warp, &by] {
      const int* sums_at = by.operands.data();
      auto element = [&](const Descriptor& matrix, uint32_t other, uint32_t k) {
        uint16_t x;
        std::memcpy(&x, warp.at_shared(matrix.address(other, k), 2, Access::READ, by, SEVERAL), 2);
        return number(x);
      };
      add_products(
          warp, sums_at, adds ? sums_at : nullptr, columns,
          [&](int row, int k) {
            return from_registers ? in_registers(warp, sums_at + sums, true, row, k, number)
                                  : element(rows, warp.rank % GROUP * 16 + row, k);
          },
          [&](int column, int k) { return element(others, column, k); });
    });
  };
}

// All of them.
inline void add_collectives(Table& table) {
  for (const char* way : {"bfly", "up", "down", "idx"}) table[std::string("shfl.") + way + ".b32"] = shuffle(way);
  table["redux.add.s32"] = reduction<int32_t>(std::plus<>());
  table["redux.max.s32"] = reduction<int32_t>([](int32_t a, int32_t b) { return std::max(a, b); });
  table["redux.min.s32"] = reduction<int32_t>([](int32_t a, int32_t b) { return std::min(a, b); });
  table["redux.or.b32"] = reduction<uint32_t>(std::bit_or<>());
  table["vote.ballot.b32"] = ballot;
  table["bar.warp"] = together;
  table["redux.min.u32"] = reduction<uint32_t>([](uint32_t a, uint32_t b) { return std::min(a, b); });
  for (int count : {1, 2, 4})
    for (bool transposed : {false, true})
      for (bool stores : {false, true})
        table[std::string(stores ? "stmatrix" : "ldmatrix") + ".m8n8.x" + std::to_string(count) +
              (transposed ? ".trans" : "") + ".shared.b16"] = matrices(count, transposed, stores);
  table["wgmma.commit_group"] = close(&Warp::products);
  table["wgmma.wait_group"] = wait(&Warp::products);
  for (bool wide : {false, true}) {
    const std::string type = wide ? ".bf16.bf16" : ".f16.f16";
    const Number number = wide ? of_bfloat16 : of_half;
    table["mma.m16n8k16.row.col.f32" + type + ".f32"] = product_of_warp(number);
    for (int columns = 8; columns <= 256; columns += 8)
      table["wgmma.mma_async.m64n" + std::to_string(columns) + "k16.f32" + type] = product_of_group(columns, number);
  }
}
