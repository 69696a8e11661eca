// From PyTorch's arguments to the structs of ops.h, for every backend in C++. The schemas are in
// specdec_kernels/reference/schema.py. Stable ABI: one build serves torch 2.10 and later.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <vector>

#include "arguments.h"

// Of a call into torch: before 2.13 there is only the one that does not repeat torch's message.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace specdec {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T>
T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Beside `like`. By the allocator itself: the stable `new_empty` looks its operator up by name, a microsecond each
// time.
inline Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes, int32_t dtype) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = std::max<int64_t>(1, sizes.begin()[1]);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides, dtype,
                                                         int32_t(like.device().type()), like.get_device_index(),
                                                         &handle));
  return Tensor(handle);
}

// Arguments as PyTorch's dispatcher has them.
class StackArguments {
 public:
  explicit StackArguments(const StableIValue* at) : at_(at) {}

  Tensor tensor() { return next<Tensor>(); }
  OptionalTensor optional() { return next<OptionalTensor>(); }
  int64_t integer() { return next<int64_t>(); }
  double number() { return next<double>(); }
  bool flag() { return next<bool>(); }

 private:
  template <class T>
  T next() {
    return torch::stable::detail::to<T>(*at_++);
  }

  const StableIValue* at_;
};

// Results as PyTorch's dispatcher takes them, in place of the arguments, once there are all.
class StackResults {
 public:
  explicit StackResults(const Tensor& like) : like_(like) {}

  template <class T, class... Sizes>
  T* add(Sizes... sizes) {
    made_.push_back(make(like_, {sizes...}, dtype_of(static_cast<T*>(nullptr))));
    return out<T>(made_.back());
  }

  void add_nothing() { add<float>(0); }

  void release(StableIValue* stack) const {
    for (const Tensor& made : made_) *stack++ = torch::stable::detail::from(made);
  }

 private:
  static int32_t dtype_of(const int64_t*) { return aoti_torch_dtype_int64(); }
  static int32_t dtype_of(const int32_t*) { return aoti_torch_dtype_int32(); }
  static int32_t dtype_of(const bool*) { return aoti_torch_dtype_bool(); }
  static int32_t dtype_of(const float*) { return aoti_torch_dtype_float32(); }

  const Tensor& like_;
  std::vector<Tensor> made_;
};

// An operator with such arguments, by run(op, a tensor beside which to work).
template <class Arguments, auto run>
void boxed(StableIValue* stack, uint64_t count, uint64_t) {
  ArgumentChecker<Tensor>::require(count == Arguments::kCount);
  StackArguments next(stack);
  const Arguments arguments = Arguments::read(next);
  arguments.require();
  StackResults results(arguments.first());
  run(arguments.op(results), arguments.first());
  results.release(stack);
}

// `noise_words`, by run(op, a tensor beside which to work).
template <auto run>
Tensor noise_words_of(Tensor seed, Tensor position, int64_t tag, int64_t first, int64_t counters) {
  Tensor words = make(seed, {seed.size(0), 4 * counters}, aoti_torch_dtype_int64());
  const NoiseWords op{.rows = seed.size(0),
                      .first = first,
                      .counters = counters,
                      .tag = uint32_t(tag),
                      .seed = data_of<int64_t>(seed),
                      .position = data_of<int64_t>(position),
                      .out = out<int64_t>(words)};
  run(op, seed);
  return words;
}

// All operators that take part in drafting and verifying, by run(op, a tensor beside which to work).
template <auto run, class Library>
void implement(Library& m) {
  m.impl("verify_chain", &boxed<ChainArguments<Tensor>, run>);
  m.impl("verify_tree", &boxed<TreeArguments<Tensor>, run>);
  m.impl("sample", &boxed<SampleArguments<Tensor>, run>);
  m.impl("sample_children", &boxed<ChildrenArguments<Tensor>, run>);
  m.impl("noise_words", TORCH_BOX(&noise_words_of<run>));
}

}  // namespace specdec
