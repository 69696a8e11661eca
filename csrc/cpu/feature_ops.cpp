// Registers with PyTorch what the feature drafter runs on a CPU (specdec_kernels/decode/drafters/eight_bits.py). Stable
// ABI, as ops.cpp.
#include <algorithm>
#include <tuple>
#include <vector>

#include "../common/operators.h"
#include "feature_layer.h"
#include "pool.h"

namespace specdec {
namespace {

const float* floats(const Tensor& t, std::initializer_list<int64_t> sizes, const char* name) {
  STD_TORCH_CHECK(ArgumentChecker(t).array(t, ScalarType::Float, sizes), name,
                  " must be contiguous float32 of the size of the rest");
  return static_cast<const float*>(t.const_data_ptr());
}

EightBits matrix(const Tensor& rows, const Tensor& scale, int64_t inputs) {
  STD_TORCH_CHECK(rows.dim() == 2 && ArgumentChecker(rows).array(rows, ScalarType::Char, {rows.size(0), inputs}),
                  "weights must be contiguous int8 [outputs, ", inputs, "]");
  const int64_t outputs = rows.size(0);
  return {static_cast<const int8_t*>(rows.const_data_ptr()), floats(scale, {outputs}, "scales"), outputs, inputs};
}

Cached cached(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

std::tuple<Tensor, Tensor, Tensor> feature_layer_of(Tensor embeddings, Tensor features, std::vector<Tensor> weights,
                                                    std::vector<Tensor> scales, Tensor norm, Tensor cos, Tensor sin,
                                                    Tensor position, Tensor keys, Tensor values, OptionalTensor mask,
                                                    double eps) {
  const ArgumentChecker taken(embeddings);
  taken.require(embeddings.dim() == 3 && features.dim() == 3 && keys.dim() == 4 && weights.size() >= 5 &&
                scales.size() == weights.size() && cos.dim() == 2);
  const int64_t batch = embeddings.size(0), rows = embeddings.size(1), width = embeddings.size(2);
  const int64_t features_width = features.size(2), kv_heads = keys.size(1), length = keys.size(2), size = keys.size(3);
  const int64_t inner = weights[2].size(1), gated = weights[4].size(1), places = cos.size(0);
  const auto like_keys = [&](const Tensor& t) {
    return taken.logits(t, {batch, kv_heads, length, size}) && t.scalar_type() == keys.scalar_type();
  };
  const bool middle = features_width > width;
  taken.require((!middle || weights.size() == 6) && taken.keys(position, batch * rows) && kv_heads > 0 && size > 0 &&
                size % 2 == 0 && width > 0 && features_width % width == 0 &&
                (length == 0 || (like_keys(keys) && like_keys(values))) &&
                taken.array(mask, ScalarType::Bool, {batch, rows, length + rows}));
  const auto* at = static_cast<const int64_t*>(position.const_data_ptr());
  taken.require(std::all_of(at, at + batch * rows, [&](int64_t place) { return place >= 0 && place < places; }));
  Tensor out = make(embeddings, {batch * rows, width}, aoti_torch_dtype_float32());
  const auto fresh = [&] { return make(embeddings, {batch * kv_heads * rows, size}, aoti_torch_dtype_float32()); };
  Tensor new_keys = fresh(), new_values = fresh();
  const FeatureLayer op{
      .batch = batch,
      .rows = rows,
      .width = width,
      .features_width = features_width,
      .heads = inner / size,
      .kv_heads = kv_heads,
      .head_size = size,
      .cached = length,
      .embeddings = floats(embeddings, {batch, rows, width}, "embeddings"),
      .features = floats(features, {batch, rows, features_width}, "features"),
      .fuse = matrix(weights[0], scales[0], 2 * width),
      .qkv = matrix(weights[1], scales[1], width),
      .output = matrix(weights[2], scales[2], inner),
      .gate_up = matrix(weights[3], scales[3], width),
      .down = matrix(weights[4], scales[4], gated),
      .middle = middle ? matrix(weights[5], scales[5], features_width - width) : EightBits{},
      .norm = floats(norm, {width}, "norm"),
      .cos = floats(cos, {places, size / 2}, "cos"),
      .sin = floats(sin, {places, size / 2}, "sin"),
      .position = at,
      .dtype = dtype_of(keys),
      .keys = cached(keys),
      .values = cached(values),
      .mask = data_of<bool>(mask),
      .eps = float(eps),
      .out = specdec::out<float>(out),
      .new_keys = specdec::out<float>(new_keys),
      .new_values = specdec::out<float>(new_values),
  };
  const auto outputs_are = [](const EightBits& matrix, int64_t count) { return matrix.outputs == count; };
  taken.require(outputs_are(op.fuse, width) && outputs_are(op.qkv, inner + 2 * kv_heads * size) &&
                outputs_are(op.output, width) && outputs_are(op.gate_up, 2 * gated) && outputs_are(op.down, width) &&
                (!middle || outputs_are(op.middle, width)) && op.heads % kv_heads == 0 && inner % size == 0);
  require_kernels();
  feature_layer(op, torch::stable::get_num_threads(), on_threads);
  return {out, new_keys, new_values};
}

Tensor eight_bit_product_of(Tensor x, Tensor weight, Tensor scale) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be [rows, inputs]");
  const int64_t rows = x.size(0), inputs = x.size(1);
  const float* from = floats(x, {rows, inputs}, "x");
  const EightBits op = matrix(weight, scale, inputs);
  Tensor result = make(x, {rows, op.outputs}, aoti_torch_dtype_float32());
  require_kernels();
  eight_bit_product(op, from, rows, out<float>(result), torch::stable::get_num_threads(), on_threads);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(specdec, m) {
  m.def(
      "feature_layer(Tensor embeddings, Tensor features, Tensor[] weights, Tensor[] scales, Tensor norm, Tensor cos, "
      "Tensor sin, Tensor position, Tensor keys, Tensor values, Tensor? mask, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("eight_bit_product(Tensor x, Tensor weight, Tensor scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(specdec, CPU, m) {
  m.impl("feature_layer", TORCH_BOX(&feature_layer_of));
  m.impl("eight_bit_product", TORCH_BOX(&eight_bit_product_of));
}

}  // namespace specdec
