// The decoder layer of the feature drafter over a few new tokens, with weights of eight bits. A draft takes as long as
// these weights take to read and as its operators take to start: so all of it is one operator. What it computes is
// normative in specdec_kernels/decode/drafters/feature_model.py; everything but the cache is float32 here.
#pragma once

#include <cstdint>

#include "verify.h"

namespace specdec {

// A matrix [outputs, inputs]: scale[o] * rows[o, i].
struct EightBits {
  const int8_t* rows;
  const float* scale;
  int64_t outputs, inputs;
};

// Keys or values [B, kv_heads, tokens, head_size]; elements of a token are neighbours.
struct Cached {
  const void* data;
  int64_t request_stride, head_stride, token_stride;  // in elements
};

struct FeatureLayer {
  int64_t batch, rows;  // new tokens of each request
  int64_t width, features_width, heads, kv_heads, head_size, cached;
  const float *embeddings, *features;  // [B, R, width], [B, R, features_width]: of middle layers, then of the last
  EightBits fuse, qkv, output, gate_up, down, middle;
  const float* norm;        // [width]; the other norms' weights are in the matrices behind them
  const float *cos, *sin;   // [positions, head_size / 2]
  const int64_t* position;  // [B, R]
  DType dtype;              // of the cache
  Cached keys, values;
  const bool* mask;  // [B, R, cached + R], which tokens each new one attends to; null where it is all before it
  float eps;
  float *out, *new_keys, *new_values;  // [B, R, width], [B, kv_heads, R, head_size]
};

void feature_layer(const FeatureLayer&, int64_t threads, RunOnThreads);

// out[n, o], for `rows` rows of x.
void eight_bit_product(const EightBits&, const float* x, int64_t rows, float* out, int64_t threads, RunOnThreads);

}  // namespace specdec
