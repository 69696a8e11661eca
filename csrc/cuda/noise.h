// The noise contract: docs/noise.md.
#pragma once

#include <cmath>

#include "thread_block.h"

namespace specdec::cuda {

struct Words {
  uint32_t w[4];
};

SPECDEC_DEVICE Words philox(const Noise& noise, uint32_t index) {
  uint32_t k0 = uint32_t(noise.seed), k1 = uint32_t(noise.seed >> 32);
  compute_here(k0), compute_here(k1);  // and not before a loop, with ten times as many registers
  Words words{{index, uint32_t(noise.position), uint32_t(noise.position >> 32), noise.tag}};
  uint32_t (&c)[4] = words.w;
  SPECDEC_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = uint64_t(0xD2511F53u) * c[0], odd = uint64_t(0xCD9E8D57u) * c[2];
    c[0] = uint32_t(odd >> 32) ^ c[1] ^ k0, c[1] = uint32_t(odd);
    c[2] = uint32_t(even >> 32) ^ c[3] ^ k1, c[3] = uint32_t(even);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return words;
}

// A standard exponential, -log1p(-u) of u = (word + 1/2) / 2^32; from 1 - u where u is closer to 1.
SPECDEC_DEVICE float exponential(uint32_t word) {
  const bool small = word < 0x80000000u;
  const float half = (float(small ? word : ~word) + 0.5f) * 0x1p-32f;
  return small ? -log1pf(-half) : -log_of_small(half);
}

// The uniform in [0, 1) that decides on acceptance, of 53 bits.
SPECDEC_DEVICE double uniform(uint64_t seed, uint64_t position, int row) {
  const Words words = philox({seed, position, kAccept | uint32_t(row) << 16}, 0);
  return double((uint64_t(words.w[0]) << 32 | words.w[1]) >> 11) * 0x1p-53;
}

// An entry takes part if its weight is positive.
SPECDEC_DEVICE void take_part(Arrived& first, float exponential, float weight, int id) {
  const float time = quotient(exponential, weight);
  if (weight > 0.0f && time < INFINITY) first = Earlier()(first, {time, id});
}

}  // namespace specdec::cuda
