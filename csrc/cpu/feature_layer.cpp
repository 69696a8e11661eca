// The decoder layer of the feature drafter over a few new tokens, with weights of eight bits. A draft takes as long as
// these weights take to read and as its operators take to start: so all of it is one operator. What it computes is
// normative in specdec_kernels/decode/drafters/feature_model.py; everything but the cache is float32 here.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#include "../common/operators.h"
#include "kernels.h"
#include "pool.h"
#include "request.h"

namespace specdec {
namespace {

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

// Outputs of a matrix that a thread takes at a time: few enough that their weights stay close while one input after the
// other is multiplied with them, and that threads finish together.
constexpr int64_t kOutputs = 32;

class Products {
 public:
  Products(const Kernels& kernels, SharedPass& pass) : kernels_(kernels), pass_(pass) {}

  // Calls body(begin, end) for all outputs, on all threads.
  template <class F>
  void each(int64_t outputs, const F& body) const {
    pass_.run(uint32_t((outputs + kOutputs - 1) / kOutputs), [&](uint32_t piece) {
      const int64_t begin = piece * kOutputs;
      body(begin, std::min(begin + kOutputs, outputs));
    });
  }

  void some(const EightBits& weight, const float* x, int64_t begin, int64_t end, float* out) const {
    kernels_.eight_bit_products(weight.rows + begin * weight.inputs, weight.inputs, end - begin, x, out);
    for (int64_t o = begin; o < end; ++o) out[o - begin] *= weight.scale[o];
  }

  void all(const EightBits& weight, const float* x, int64_t rows, float* out) const {
    each(weight.outputs, [&](int64_t begin, int64_t end) {
      for (int64_t n = 0; n < rows; ++n)
        some(weight, x + n * weight.inputs, begin, end, out + n * weight.outputs + begin);
    });
  }

 private:
  const Kernels& kernels_;
  SharedPass& pass_;
};

class Layer {
 public:
  Layer(const FeatureLayer& op, const Kernels& kernels, SharedPass& pass)
      : op_(op), kernels_(kernels), pass_(pass), product_(kernels, pass), tokens_(op.batch * op.rows) {}

  void run() {
    const int64_t width = op_.width, inner = op_.heads * op_.head_size;
    std::vector<float> x(size_t(tokens_ * width)), normed(x.size()), added(x.size());
    std::vector<float> heads(size_t(tokens_ * op_.qkv.outputs)), attended(size_t(tokens_ * inner));
    const std::vector<float> inputs = fused_inputs();
    product_.all(op_.fuse, inputs.data(), tokens_, x.data());
    norm_all(x, normed);
    product_.all(op_.qkv, normed.data(), tokens_, heads.data());
    rotate(heads);
    keep_new(heads);
    pass_.run(uint32_t(op_.batch * op_.heads),
              [&](uint32_t piece) { attend(piece / op_.heads, piece % op_.heads, heads, attended); });
    product_.all(op_.output, attended.data(), tokens_, added.data());
    for (size_t i = 0; i < x.size(); ++i) x[i] += added[i];
    norm_all(x, normed);
    const std::vector<float> gated = gate(normed);
    product_.all(op_.down, gated.data(), tokens_, added.data());
    for (size_t i = 0; i < x.size(); ++i) x[i] += added[i];
    for (int64_t n = 0; n < tokens_; ++n) {
      norm(x.data() + n * width, width, op_.out + n * width);
      for (int64_t i = 0; i < width; ++i) op_.out[n * width + i] *= op_.norm[i];
    }
  }

 private:
  // Embeddings beside features; of the target's, the middle layers are normed and added to the last through a matrix.
  std::vector<float> fused_inputs() const {
    const int64_t width = op_.width, middle = op_.features_width - width;
    std::vector<float> normed(size_t(tokens_ * middle)), added(size_t(tokens_ * width));
    for (int64_t n = 0; n < tokens_; ++n)
      for (int64_t i = 0; i < middle; i += width)
        norm(op_.features + n * op_.features_width + i, width, normed.data() + n * middle + i);
    if (middle > 0) product_.all(op_.middle, normed.data(), tokens_, added.data());
    std::vector<float> inputs(size_t(tokens_ * 2 * width));
    for (int64_t n = 0; n < tokens_; ++n) {
      float* out = inputs.data() + n * 2 * width;
      const float* last = op_.features + n * op_.features_width + middle;
      for (int64_t i = 0; i < width; ++i) {
        out[i] = op_.embeddings[n * width + i];
        out[width + i] = last[i] + added[size_t(n * width + i)];
      }
    }
    return inputs;
  }

  void norm(const float* x, int64_t size, float* out) const {
    float squares = 0.0f;
    for (int64_t i = 0; i < size; ++i) squares += x[i] * x[i];
    const float factor = 1.0f / std::sqrt(squares / float(size) + op_.eps);
    for (int64_t i = 0; i < size; ++i) out[i] = x[i] * factor;
  }

  void norm_all(const std::vector<float>& x, std::vector<float>& out) const {
    for (int64_t n = 0; n < tokens_; ++n) norm(x.data() + n * op_.width, op_.width, out.data() + n * op_.width);
  }

  // Rotary positions, of queries and keys.
  void rotate(std::vector<float>& heads) const {
    const int64_t half = op_.head_size / 2;
    for (int64_t n = 0; n < tokens_; ++n) {
      const float *cos = op_.cos + op_.position[n] * half, *sin = op_.sin + op_.position[n] * half;
      for (int64_t h = 0; h < op_.heads + op_.kv_heads; ++h) {
        float *a = heads.data() + n * op_.qkv.outputs + h * op_.head_size, *b = a + half;
        for (int64_t i = 0; i < half; ++i) {
          const float left = a[i] * cos[i] - b[i] * sin[i];
          b[i] = b[i] * cos[i] + a[i] * sin[i];
          a[i] = left;
        }
      }
    }
  }

  void keep_new(const std::vector<float>& heads) const {
    for (int64_t n = 0; n < tokens_; ++n) {
      const int64_t request = n / op_.rows, row = n % op_.rows;
      for (int64_t h = 0; h < op_.kv_heads; ++h) {
        const float* key = heads.data() + n * op_.qkv.outputs + (op_.heads + h) * op_.head_size;
        const int64_t at = ((request * op_.kv_heads + h) * op_.rows + row) * op_.head_size;
        std::copy_n(key, op_.head_size, op_.new_keys + at);
        std::copy_n(key + op_.kv_heads * op_.head_size, op_.head_size, op_.new_values + at);
      }
    }
  }

  // One head of one request, over the cache and the new tokens.
  void attend(int64_t request, int64_t head, const std::vector<float>& heads, std::vector<float>& attended) const {
    const int64_t kv = head / (op_.heads / op_.kv_heads), size = op_.head_size, cached = op_.cached;
    const int64_t fresh = (request * op_.kv_heads + kv) * op_.rows * size;
    const auto old = [&](const Cached& from) {
      const int64_t at = request * from.request_stride + kv * from.head_stride;
      return Rows{address({.data = from.data, .dtype = op_.dtype}, at), op_.dtype, from.token_stride, size};
    };
    const Rows new_keys{op_.new_keys + fresh, DType::f32, size, size};
    const Rows new_values{op_.new_values + fresh, DType::f32, size, size};
    std::vector<float> weights(size_t(cached + op_.rows));
    for (int64_t row = 0; row < op_.rows; ++row) {
      const int64_t n = request * op_.rows + row;
      const float* query = heads.data() + n * op_.qkv.outputs + head * size;
      kernels_.products(old(op_.keys), cached, query, weights.data());
      kernels_.products(new_keys, op_.rows, query, weights.data() + cached);
      softmax(n, weights);
      float* out = attended.data() + (n * op_.heads + head) * size;
      std::fill_n(out, size, 0.0f);
      kernels_.mix(old(op_.values), cached, weights.data(), out);
      kernels_.mix(new_values, op_.rows, weights.data() + cached, out);
    }
  }

  // Over the tokens that new token n attends to; 0 elsewhere.
  void softmax(int64_t n, std::vector<float>& weights) const {
    const int64_t length = int64_t(weights.size()), row = n % op_.rows;
    const float scale = 1.0f / std::sqrt(float(op_.head_size));
    const auto seen = [&](int64_t i) { return op_.mask != nullptr ? op_.mask[n * length + i] : i <= op_.cached + row; };
    float most = -INFINITY, total = 0.0f;
    for (int64_t i = 0; i < length; ++i)
      if (seen(i)) most = std::max(most, weights[size_t(i)]);
    for (int64_t i = 0; i < length; ++i) {
      float& weight = weights[size_t(i)];
      weight = seen(i) ? std::exp(scale * (weight - most)) : 0.0f;
      total += weight;
    }
    if (total > 0.0f)
      for (float& weight : weights) weight /= total;
  }

  // silu(gate) * up.
  std::vector<float> gate(const std::vector<float>& normed) const {
    const int64_t inner = op_.down.inputs;
    std::vector<float> out(size_t(tokens_ * inner));
    product_.each(inner, [&](int64_t begin, int64_t end) {
      float up[kOutputs];
      for (int64_t n = 0; n < tokens_; ++n) {
        const float* x = normed.data() + n * op_.width;
        float* gates = out.data() + n * inner + begin;
        product_.some(op_.gate_up, x, begin, end, gates);
        product_.some(op_.gate_up, x, inner + begin, inner + end, up);
        for (int64_t i = 0; i < end - begin; ++i) gates[i] *= up[i] / (1.0f + std::exp(-gates[i]));
      }
    });
    return out;
  }

  const FeatureLayer& op_;
  const Kernels& kernels_;
  SharedPass& pass_;
  const Products product_;
  const int64_t tokens_;
};

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
  const Kernels& table = require_kernels();
  each_request(1, op.fuse.outputs * op.fuse.inputs, torch::stable::get_num_threads(), on_threads,
               [&](int64_t, SharedPass& pass) { Layer(op, table, pass).run(); });
  return {out, new_keys, new_values};
}

Tensor eight_bit_product_of(Tensor x, Tensor weight, Tensor scale) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be [rows, inputs]");
  const int64_t rows = x.size(0), inputs = x.size(1);
  const float* from = floats(x, {rows, inputs}, "x");
  const EightBits op = matrix(weight, scale, inputs);
  Tensor result = make(x, {rows, op.outputs}, aoti_torch_dtype_float32());
  const Kernels& table = require_kernels();
  each_request(1, op.outputs * op.inputs, torch::stable::get_num_threads(), on_threads,
               [&](int64_t, SharedPass& pass) { Products(table, pass).all(op, from, rows, out<float>(result)); });
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
