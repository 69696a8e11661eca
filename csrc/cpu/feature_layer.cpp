#include "feature_layer.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"
#include "request.h"

namespace specdec {
namespace {

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

}  // namespace

void feature_layer(const FeatureLayer& op, int64_t threads, RunOnThreads run) {
  each_request(1, op.fuse.outputs * op.fuse.inputs, threads, run,
               [&](int64_t, SharedPass& pass) { Layer(op, *kernels(), pass).run(); });
}

void eight_bit_product(const EightBits& weight, const float* x, int64_t rows, float* out, int64_t threads,
                       RunOnThreads run) {
  each_request(1, weight.outputs * weight.inputs, threads, run,
               [&](int64_t, SharedPass& pass) { Products(*kernels(), pass).all(weight, x, rows, out); });
}

}  // namespace specdec
