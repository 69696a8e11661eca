// The floor of every verification on a CPU: read the rows that had to be read, do nothing with them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using torch::stable::Tensor;

constexpr int64_t kChunk = 128 << 10;  // long runs: 32 KiB took a tenth longer

struct Span {
  const char* data;
  int64_t bytes;
};

// The first rows[b] rows of each request, cut into chunks.
void add_rows(const Tensor& logits, const Tensor& rows, std::vector<Span>& spans) {
  const auto* count = static_cast<const int64_t*>(rows.const_data_ptr());
  const int64_t size = int64_t(logits.element_size()), bytes = logits.size(2) * size;
  for (int64_t b = 0; b < logits.size(0); ++b) {
    for (int64_t i = 0; i < count[b]; ++i) {
      const auto* row =
          static_cast<const char*>(logits.const_data_ptr()) + (b * logits.stride(0) + i * logits.stride(1)) * size;
      for (int64_t at = 0; at < bytes; at += kChunk) spans.push_back({row + at, std::min(kChunk, bytes - at)});
    }
  }
}

uint64_t read(const Span& span) {
  uint64_t sums[8] = {};
  int64_t at = 0;
  for (; at + 64 <= span.bytes; at += 64) {
    uint64_t words[8];
    std::memcpy(words, span.data + at, 64);
    for (int i = 0; i < 8; ++i) sums[i] += words[i];
    __builtin_prefetch(span.data + at + 4096, 0, 3);
  }
  for (int i = 1; i < 8; ++i) sums[0] += sums[i];
  return sums[0];
}

int64_t stream(Tensor target, Tensor target_rows, Tensor draft, Tensor draft_rows) {
  std::vector<Span> spans;
  add_rows(target, target_rows, spans);
  add_rows(draft, draft_rows, spans);
  std::atomic<uint64_t> total{0};
  std::atomic<size_t> next{0};
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    uint64_t sum = 0;
    for (size_t i; (i = next.fetch_add(1)) < spans.size();) sum += read(spans[i]);
    total += sum;
  });
  return int64_t(total.load() & 0x7FFFFFFF);
}

}  // namespace

STABLE_TORCH_LIBRARY(specdec_bench, m) {
  m.def("stream(Tensor target, Tensor target_rows, Tensor draft, Tensor draft_rows) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(specdec_bench, CPU, m) { m.impl("stream", TORCH_BOX(&stream)); }
