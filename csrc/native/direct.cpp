#include "direct.h"

#include <ATen/dlpack.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <span>
#include <stdexcept>
#include <utility>

#include "../common/arguments.h"
#include "../cpu/entries.h"

namespace py = pybind11;

namespace specdec {
namespace {

const Entries* entries = nullptr;
const DLPackExchangeAPI* exchange = nullptr;
PyTypeObject* tensor_type = nullptr;
PyObject* empty = nullptr;  // what stands for log-probabilities that nobody asked for
struct {
  PyTypeObject *verified, *verified_tree, *sample, *drawn_children;  // named tuples
} types;
struct {
  int64_t top_k;
  double top_p, min_p;
} off;  // what None means

// An error that Python has been told of.
struct Raised {};

// A tensor on a CPU, with the accessors of torch::stable::Tensor.
class View {
 public:
  explicit View(PyObject* object) {
    if (!is_plain(object)) throw std::runtime_error("an argument is no plain tensor");
    if (exchange->dltensor_from_py_object_no_sync(object, &tensor_) != 0) throw Raised{};
    if (!is_cpu()) throw std::runtime_error("an argument is not on a CPU");
  }

  // Others, such as parameters and the tensors of tracers, may mean more than their data.
  static bool is_plain(PyObject* object) { return Py_TYPE(object) == tensor_type; }

  static std::optional<View> unless_none(PyObject* object) {
    return object == Py_None ? std::nullopt : std::optional<View>(object);
  }

  bool is_cpu() const { return tensor_.device.device_type == kDLCPU; }
  int32_t get_device_index() const { return tensor_.device.device_id; }
  int64_t dim() const { return tensor_.ndim; }
  std::span<const int64_t> sizes() const { return {tensor_.shape, size_t(tensor_.ndim)}; }
  int64_t size(int64_t i) const { return i < dim() ? tensor_.shape[i] : -1; }
  int64_t stride(int64_t i) const { return tensor_.strides[i]; }
  void* mutable_data_ptr() const { return static_cast<char*>(tensor_.data) + tensor_.byte_offset; }
  const void* const_data_ptr() const { return mutable_data_ptr(); }

  bool is_contiguous() const {
    if (std::ranges::count(sizes(), 0) > 0) return true;
    int64_t expected = 1;
    for (int64_t i = dim(); i-- > 0; expected *= size(i))
      if (size(i) != 1 && stride(i) != expected) return false;
    return true;
  }

  torch::headeronly::ScalarType scalar_type() const {
    using enum torch::headeronly::ScalarType;
    const auto is = [&](uint8_t code, uint8_t bits) {
      return tensor_.dtype.code == code && tensor_.dtype.bits == bits;
    };
    if (is(kDLFloat, 32)) return Float;
    if (is(kDLBfloat, 16)) return BFloat16;
    if (is(kDLFloat, 16)) return Half;
    if (is(kDLInt, 64)) return Long;
    if (is(kDLInt, 32)) return Int;
    if (is(kDLUInt, 8)) return Byte;
    return Undefined;  // nothing that is taken
  }

 private:
  DLTensor tensor_{};
};

// The memory of a call's results, freed with the last tensor in it.
class Block {
 public:
  // Room for tensors of `bytes` in all.
  static Block* make(size_t bytes) {
    // Aligned here: to be asked for aligned memory, an allocator takes longer than for all else.
    void* memory = std::malloc(sizeof(Block) + bytes + (kMost + 1) * kAlign);
    if (memory == nullptr) throw std::bad_alloc();
    return new (memory) Block;
  }

  // A tensor of one or two sizes, its memory not set.
  template <class T>
  T* add(DLDataTypeCode code, int64_t rows, int64_t columns = -1) {
    Slot& slot = slots_[used_++];
    slot.managed = {};
    slot.shape[0] = rows, slot.shape[1] = columns;
    slot.strides[0] = columns < 0 ? 1 : columns, slot.strides[1] = 1;
    slot.managed.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
    slot.managed.manager_ctx = this;
    slot.managed.deleter = [](DLManagedTensorVersioned* tensor) {
      static_cast<Block*>(tensor->manager_ctx)->release();
    };
    const auto bits = uint8_t(8 * sizeof(T));
    slot.managed.dl_tensor = {
        end_, {kDLCPU, 0}, columns < 0 ? 1 : 2, {uint8_t(code), bits, 1}, slot.shape, slot.strides, 0};
    auto* data = reinterpret_cast<T*>(end_);
    const size_t bytes = size_t(rows * (columns < 0 ? 1 : columns)) * sizeof(T);
    end_ += aligned(bytes);
    return data;
  }

  // The tensors as they were added, in the first places of a tuple of `count`, of a type of its own.
  PyObject* tuple(PyTypeObject* type, Py_ssize_t count) {
    PyObject* result = type->tp_alloc(type, count);
    if (result == nullptr) throw Raised{};
    for (int i = 0; i < used_; ++i) {
      void* object = nullptr;
      owners_.fetch_add(1, std::memory_order_relaxed);  // whose tensor it is after a failure is not said: it stays
      if (exchange->managed_tensor_to_py_object_no_sync(&slots_[i].managed, &object) != 0) {
        Py_DECREF(result);
        throw Raised{};
      }
      PyTuple_SET_ITEM(result, i, static_cast<PyObject*>(object));
    }
    return result;
  }

  void release() {
    if (owners_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    this->~Block();
    std::free(this);
  }

 private:
  static constexpr size_t kAlign = 64, kMost = 6;
  static constexpr size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

  struct Slot {
    DLManagedTensorVersioned managed;
    int64_t shape[2], strides[2];
  };

  Block() : end_(reinterpret_cast<char*>(aligned(reinterpret_cast<size_t>(this + 1)))) {}

  Slot slots_[kMost];
  int used_ = 0;
  std::atomic<int> owners_{1};  // whoever made it
  char* end_;
};

// Holds a block for as long as it is filled.
struct Filling {
  Block* block;
  explicit Filling(size_t bytes) : block(Block::make(bytes)) {}
  ~Filling() { block->release(); }
  Filling(const Filling&) = delete;
  Filling& operator=(const Filling&) = delete;
};

// Positional arguments, one after the other.
class Arguments {
 public:
  explicit Arguments(PyObject* const* at) : at_(at) {}
  View tensor() { return View(*at_++); }
  std::optional<View> optional() { return View::unless_none(*at_++); }
  int64_t integer() { return checked(PyLong_AsLongLong(*at_++)); }

  // Of drafts: a number, one a request, or none.
  DraftTemperature<View> draft_temperature() {
    PyObject* const given = *at_++;
    if (PyFloat_CheckExact(given)) return {std::nullopt, PyFloat_AS_DOUBLE(given)};
    return {View::unless_none(given)};
  }

  // Of what has no edits, temperature and filters one for all.
  LawArguments<View> law() {
    LawArguments<View> law{};
    law.temperature = PyFloat_AS_DOUBLE(*at_++);
    law.top_k = *at_ == Py_None ? off.top_k : checked(PyLong_AsLongLong(*at_)), ++at_;
    law.top_p = *at_ == Py_None ? off.top_p : PyFloat_AS_DOUBLE(*at_), ++at_;
    law.min_p = *at_ == Py_None ? off.min_p : PyFloat_AS_DOUBLE(*at_), ++at_;
    law.bitmask = optional();
    return law;
  }

  // Whether `law` may be asked for the four numbers from `at` on.
  static bool are_numbers(PyObject* const* at) {
    const auto real_or_none = [](PyObject* x) { return x == Py_None || PyFloat_CheckExact(x); };
    return PyFloat_CheckExact(at[0]) && (at[1] == Py_None || PyLong_CheckExact(at[1])) && real_or_none(at[2]) &&
           real_or_none(at[3]);
  }

 private:
  static int64_t checked(int64_t value) {
    if (value == -1 && PyErr_Occurred()) throw Raised{};
    return value;
  }

  PyObject* const* at_;
};

// Work on so few logits is done in a tenth of a millisecond: other Python threads, which wait for five before they ask,
// may as well wait for that, and to let them in and come back would take a hundredth of it.
constexpr int64_t kFew = int64_t(1) << 21;

bool are_few(const View& logits) {
  const auto sizes = logits.sizes();
  return std::accumulate(sizes.begin(), sizes.end(), int64_t(1), std::multiplies()) <= kFew;
}

template <class Op>
void run(void (*entry)(const Op&), const Op& op, bool keeps_lock) {
  if (keeps_lock) return entry(op);
  struct OthersRun {
    PyThreadState* state = PyEval_SaveThread();
    ~OthersRun() { PyEval_RestoreThread(state); }
  } others_run;
  entry(op);
}

// Whether the tensors from `key` on are plain, and the four numbers behind the tensors are of all requests. Often they
// are not, since Python spreads numbers over requests: no exception is thrown.
bool taken(PyObject* const* objects, size_t tensors, int key, int keys) {
  return std::all_of(objects + key, objects + key + keys, View::is_plain) && Arguments::are_numbers(objects + tensors);
}

// The results of a chain or a tree, in the order of the operators, `nodes` behind the first or `counters` behind the
// flags.
class Outputs {
 public:
  Outputs(int64_t batch, int64_t rows, bool tree, bool logprobs)
      : filling_(bytes(batch, rows)), tree_(tree), logprobs_(logprobs) {
    Block& block = *filling_.block;
    results_.tokens = block.add<int64_t>(kDLInt, batch, rows);
    if (tree) more_ = block.add<int32_t>(kDLInt, batch, rows);
    results_.accepted = block.add<int32_t>(kDLInt, batch);
    results_.valid = block.add<bool>(kDLBool, batch);
    if (!tree) more_ = block.add<int32_t>(kDLInt, batch, 2);
    if (!logprobs) return;
    results_.logprobs = block.add<float>(kDLFloat, batch, rows);
    results_.raw_logprobs = block.add<float>(kDLFloat, batch, rows);
  }

  const Results& results() const { return results_; }
  int32_t* more() const { return more_; }  // nodes or counters

  PyObject* tuple() const {
    PyObject* tuple = filling_.block->tuple(tree_ ? types.verified_tree : types.verified, 6);
    if (!logprobs_)
      for (const Py_ssize_t place : {4, 5}) PyTuple_SET_ITEM(tuple, place, Py_NewRef(empty));
    return tuple;
  }

 private:
  static size_t bytes(int64_t batch, int64_t rows) {
    constexpr size_t kEachRow = sizeof(int64_t) + sizeof(int32_t) + 2 * sizeof(float), kEach = 4 * sizeof(int32_t);
    return size_t(batch) * (size_t(rows) * kEachRow + kEach);
  }

  Filling filling_;
  bool tree_, logprobs_;
  Results results_{};
  int32_t* more_ = nullptr;
};

template <class Op, class Given>
PyObject* verified(void (*entry)(const Op&), const Given& arguments, int64_t rows, bool tree) {
  arguments.require();
  Outputs outputs(arguments.batch(), rows, tree, arguments.logprobs);
  const Op op = arguments.op(outputs.results(), outputs.more());
  const bool keeps_lock = are_few(arguments.target_logits);
  run(entry, op, keeps_lock);
  return outputs.tuple();
}

// What is drawn from rows, `columns` tokens each, -1 for one without a dimension of its own.
class Draws {
 public:
  Draws(int64_t rows, int64_t columns) : filling_(size_t(rows) * (3 + 3 * size_t(std::abs(columns))) * sizeof(float)) {
    results_.tokens = filling_.block->add<int64_t>(kDLInt, rows, columns);
    results_.logprobs = filling_.block->add<float>(kDLFloat, rows, columns);
    results_.stats = filling_.block->add<float>(kDLFloat, rows, 3);
  }

  const DrawResults& results() const { return results_; }
  PyObject* tuple(PyTypeObject* type) const { return filling_.block->tuple(type, 3); }

 private:
  Filling filling_;
  DrawResults results_{};
};

PyObject* verify_chain(PyObject* const* objects) {
  if (!taken(objects, 9, 5, 2)) return Py_NewRef(Py_None);
  Arguments next(objects);
  const ChainArguments<View> arguments{next.tensor(),
                                       next.tensor(),
                                       next.optional(),
                                       next.optional(),
                                       next.draft_temperature(),
                                       next.tensor(),
                                       next.tensor(),
                                       next.optional(),
                                       next.optional(),
                                       next.law(),
                                       Rule(next.integer()),
                                       next.integer() != 0,
                                       next.integer() != 0,
                                       {}};
  return verified(entries->verify_chain, arguments, arguments.rows(), false);
}

PyObject* verify_tree(PyObject* const* objects) {
  if (!taken(objects, 8, 6, 2)) return Py_NewRef(Py_None);
  Arguments next(objects);
  const TreeArguments<View> arguments{next.tensor(),       next.tensor(),
                                      next.tensor(),       next.optional(),
                                      next.optional(),     next.draft_temperature(),
                                      next.tensor(),       next.tensor(),
                                      next.law(),          TreeRule(next.integer()),
                                      next.integer() != 0, next.integer() != 0};
  return verified(entries->verify_tree, arguments, arguments.nodes(), true);
}

PyObject* sample(PyObject* const* objects) {
  if (!taken(objects, 4, 1, 3)) return Py_NewRef(Py_None);
  Arguments next(objects);
  const SampleArguments<View> arguments{next.tensor(), next.tensor(), next.tensor(),
                                        next.tensor(), next.law(),    next.integer() != 0};
  arguments.require();
  const Draws draws(arguments.logits.size(0), -1);
  run(entries->sample, arguments.op(draws.results()), are_few(arguments.logits));
  return draws.tuple(types.sample);
}

PyObject* sample_children(PyObject* const* objects) {
  if (!taken(objects, 4, 1, 3)) return Py_NewRef(Py_None);
  Arguments next(objects);
  const SampleArguments<View> arguments{next.tensor(), next.tensor(), next.tensor(), next.tensor(), next.law(), false};
  const int64_t children = next.integer();
  const auto how = Children(next.integer());
  arguments.require();
  const Draws draws(arguments.logits.size(0), children);
  run(entries->sample_children, SampleChildren{arguments.op(draws.results()), children, how},
      are_few(arguments.logits));
  return draws.tuple(types.drawn_children);
}

void connect(const py::type& tensor, const py::capsule& api, uintptr_t address,
             const std::tuple<double, int64_t, double, double>& neutral, const std::array<py::type, 4>& results) {
  const auto* table = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(api.ptr(), "dlpack_exchange_api"));
  if (table == nullptr) throw py::error_already_set();
  while (table != nullptr && table->header.version.major != DLPACK_MAJOR_VERSION)
    table = reinterpret_cast<const DLPackExchangeAPI*>(table->header.prev_api);
  if (table == nullptr || table->dltensor_from_py_object_no_sync == nullptr)
    throw std::runtime_error("this PyTorch speaks another DLPack");
  const auto* found = reinterpret_cast<const Entries*>(address);
  const Entries ours{};
  if (!std::equal(found->sizes, std::end(found->sizes), ours.sizes))
    throw std::runtime_error("the library is of another build");
  const auto type_of = [](const py::type& type) { return reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr()); };
  exchange = table;
  off = {std::get<1>(neutral), std::get<2>(neutral), std::get<3>(neutral)};
  tensor_type = type_of(tensor);
  types = {type_of(results[0]), type_of(results[1]), type_of(results[2]), type_of(results[3])};
  const Filling filling(0);
  filling.block->add<float>(kDLFloat, 0);
  const auto one = py::reinterpret_steal<py::tuple>(filling.block->tuple(&PyTuple_Type, 1));
  empty = Py_NewRef(PyTuple_GET_ITEM(one.ptr(), 0));
  entries = found;
}

// A method of Python that takes `wanted` arguments and returns None where one of them is not taken as it is.
template <PyObject* (*body)(PyObject* const*), Py_ssize_t wanted>
PyMethodDef method(const char* name) {
  constexpr auto call = [](PyObject*, PyObject* const* objects, Py_ssize_t count) -> PyObject* {
    if (entries == nullptr || count != wanted)
      return PyErr_Format(PyExc_TypeError, "expected %zd arguments, once connected, got %zd", wanted, count);
    try {
      return body(objects);
    } catch (const Raised&) {
      PyErr_Clear();
    } catch (const std::exception&) {
    }
    return Py_NewRef(Py_None);
  };
  PyObject* (*const function)(PyObject*, PyObject* const*, Py_ssize_t) = call;
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL,
          "See specdec_kernels/ops/straight.py."};
}

PyMethodDef functions[] = {method<verify_chain, 17>("verify_chain"),
                           method<verify_tree, 16>("verify_tree"),
                           method<sample, 10>("sample"),
                           method<sample_children, 11>("sample_children"),
                           {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_direct(py::module_& m) {
  m.def("connect", connect, py::arg("tensor"), py::arg("exchange"), py::arg("entries"), py::arg("off"),
        py::arg("results"),
        "Makes the functions beside it run: by torch.Tensor, its DLPack interface, the library's entries, a temperature"
        " with filters that are off, and the classes of their results.");
  if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
}

}  // namespace specdec
