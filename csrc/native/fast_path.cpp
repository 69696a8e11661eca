#include "fast_path.h"

#include <ATen/dlpack.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>

#include "../common/arguments.h"
#include "../common/entries.h"

namespace py = pybind11;

namespace specdec {
namespace {

// An error that Python has been told of.
struct Raised {};

struct Decref {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Decref>;

Owned owned(PyObject* made) {
  if (made == nullptr) throw Raised{};
  return Owned(made);
}

// What is the same for all libraries.
const DLPackExchangeAPI* exchange = nullptr;
PyTypeObject* tensor_type = nullptr;
struct {
  PyTypeObject *verified, *verified_tree, *sample, *drawn_children;  // named tuples
} types;
struct {
  int64_t top_k;
  double top_p, min_p;
} off;  // what None means

// The elements of results, in the order of `Library::dtypes`.
enum Element { kInt64, kInt32, kBool, kFloat32 };
constexpr DLDataType kDLTypes[] = {{kDLInt, 64, 1}, {kDLInt, 32, 1}, {kDLBool, 8, 1}, {kDLFloat, 32, 1}};

// A library of operators.
struct Library {
  const Entries* entries;   // null: arguments are checked, results made, and nothing is run
  DLDeviceType device;      // where all tensors are
  PyObject* empty_strided;  // PyTorch's, which makes the results; null: they are made here, on a CPU
  std::array<PyObject*, 4> dtypes;
  std::map<int32_t, PyObject*> nothing;  // by device: log-probabilities that nobody asked for
};

// A tensor, with the accessors of torch::stable::Tensor.
class TensorView {
 public:
  TensorView(PyObject* object, DLDeviceType device) {
    if (!is_plain(object)) throw std::runtime_error("an argument is no plain tensor");
    if (exchange->dltensor_from_py_object_no_sync(object, &tensor_) != 0) throw Raised{};
    if (tensor_.device.device_type != device) throw std::runtime_error("an argument is on another device");
  }

  // Others, such as parameters and the tensors of tracers, may mean more than their data.
  static bool is_plain(PyObject* object) { return Py_TYPE(object) == tensor_type; }

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
    return Undefined;  // no operator accepts it
  }

 private:
  DLTensor tensor_{};
};

// The memory of a call's results on a CPU, freed with the last tensor in it.
class Block {
 public:
  explicit Block(size_t bytes) : memory_(std::malloc(bytes + (kMost + 1) * kAlign)) {
    if (memory_ == nullptr) throw std::bad_alloc();
    // Aligned here: to be asked for aligned memory, an allocator takes longer than for all else.
    end_ = reinterpret_cast<char*>(aligned(reinterpret_cast<size_t>(memory_)));
  }

  PyObject* add(Element element, int64_t rows, int64_t columns, void*& data) {
    Slot& slot = slots_[used_++];
    const DLDataType dtype = kDLTypes[element];
    slot.shape[0] = rows, slot.shape[1] = columns;
    slot.strides[0] = columns < 0 ? 1 : columns, slot.strides[1] = 1;
    slot.managed = {};
    slot.managed.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
    slot.managed.manager_ctx = this;
    slot.managed.deleter = [](DLManagedTensorVersioned* tensor) {
      static_cast<Block*>(tensor->manager_ctx)->release();
    };
    slot.managed.dl_tensor = {data = end_, {kDLCPU, 0}, columns < 0 ? 1 : 2, dtype, slot.shape, slot.strides, 0};
    end_ += aligned(size_t(rows * (columns < 0 ? 1 : columns)) * dtype.bits / 8);
    void* object = nullptr;
    owners_.fetch_add(1, std::memory_order_relaxed);  // whose tensor it is after a failure is not said: it stays
    if (exchange->managed_tensor_to_py_object_no_sync(&slot.managed, &object) != 0) throw Raised{};
    return static_cast<PyObject*>(object);
  }

  void release() {
    if (owners_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }

 private:
  static constexpr size_t kAlign = 64, kMost = 6;
  static constexpr size_t aligned(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

  struct Slot {
    DLManagedTensorVersioned managed;
    int64_t shape[2], strides[2];
  };

  ~Block() { std::free(memory_); }

  Slot slots_[kMost];
  size_t used_ = 0;
  std::atomic<int> owners_{1};  // whoever made it
  void* memory_;
  char* end_;
};

// The named tuple of a call's results.
class ResultTuple {
 public:
  // `like`: the tensor beside which they are made; `bytes`: of all of them, at most.
  ResultTuple(Library& library, PyTypeObject* type, Py_ssize_t count, PyObject* like, int32_t device, size_t bytes)
      : library_(library), device_index_(device), tuple_(owned(type->tp_alloc(type, count))) {
    if (library.empty_strided == nullptr)
      block_ = new Block(bytes);
    else
      device_ = owned(PyObject_GetAttrString(like, "device"));
  }
  ~ResultTuple() {
    if (block_ != nullptr) block_->release();
  }
  ResultTuple(const ResultTuple&) = delete;
  ResultTuple& operator=(const ResultTuple&) = delete;

  // The next result, of one or two sizes; its data is not set.
  template <class T>
  T* add(Element element, int64_t rows, int64_t columns = -1) {
    void* data = nullptr;
    PyTuple_SET_ITEM(tuple_.get(), count_++, make(element, rows, columns, data));
    return static_cast<T*>(data);
  }

  // One that nobody asked for.
  void add_nothing() {
    PyObject*& kept = library_.nothing[device_index_];
    void* data = nullptr;
    if (kept == nullptr) kept = make(kFloat32, 0, -1, data);
    PyTuple_SET_ITEM(tuple_.get(), count_++, Py_NewRef(kept));
  }

  PyObject* release() { return tuple_.release(); }

 private:
  // On a GPU by PyTorch's allocator, which is told of the streams that use what it gave.
  PyObject* make(Element element, int64_t rows, int64_t columns, void*& data) {
    if (block_ != nullptr) return block_->add(element, rows, columns, data);
    static PyObject* const names = Py_BuildValue("(ss)", "dtype", "device");
    const bool flat = columns < 0;
    const Owned sizes = owned(flat ? Py_BuildValue("(L)", rows) : Py_BuildValue("(LL)", rows, columns));
    const Owned strides = owned(flat ? Py_BuildValue("(i)", 1) : Py_BuildValue("(Li)", columns, 1));
    PyObject* const arguments[] = {sizes.get(), strides.get(), library_.dtypes[element], device_.get()};
    Owned made = owned(PyObject_Vectorcall(library_.empty_strided, arguments, 2, names));
    data = TensorView(made.get(), library_.device).mutable_data_ptr();
    return made.release();
  }

  Library& library_;
  int32_t device_index_;
  Owned tuple_, device_;
  Block* block_ = nullptr;
  Py_ssize_t count_ = 0;
};

// Positional arguments, one after the other.
class Arguments {
 public:
  Arguments(PyObject* const* at, DLDeviceType device) : at_(at), device_(device) {}
  TensorView tensor() { return TensorView(*at_++, device_); }
  std::optional<TensorView> optional() {
    PyObject* const object = *at_++;
    return object == Py_None ? std::nullopt : std::optional<TensorView>(std::in_place, object, device_);
  }
  int64_t integer() { return checked(PyLong_AsLongLong(*at_++)); }

  // Of drafts: a number, one a request, or none.
  DraftTemperature<TensorView> draft_temperature() {
    if (!PyFloat_CheckExact(*at_)) return {optional()};
    return {std::nullopt, PyFloat_AS_DOUBLE(*at_++)};
  }

  // Of what has no logit adjustments, temperature and filters one for all.
  DistributionArguments<TensorView> distribution() {
    DistributionArguments<TensorView> own{};
    own.temperature = PyFloat_AS_DOUBLE(*at_++);
    own.top_k = *at_ == Py_None ? off.top_k : checked(PyLong_AsLongLong(*at_)), ++at_;
    own.top_p = *at_ == Py_None ? off.top_p : PyFloat_AS_DOUBLE(*at_), ++at_;
    own.min_p = *at_ == Py_None ? off.min_p : PyFloat_AS_DOUBLE(*at_), ++at_;
    own.bitmask = optional();
    return own;
  }

  // Whether `distribution` may be called for the four numbers from `at` on.
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
  DLDeviceType device_;
};

// Work on so few logits is done in a tenth of a millisecond: other Python threads, which wait for five before they ask,
// may as well wait for that, and to let them in and come back would take a hundredth of it. On a GPU it is a launch.
constexpr int64_t kFew = int64_t(1) << 21;

template <class Op>
void run(void (*entry)(const Op&, int32_t), const Op& op, const TensorView& logits) {
  const auto sizes = logits.sizes();
  const int64_t count = std::accumulate(sizes.begin(), sizes.end(), int64_t(1), std::multiplies());
  if (!logits.is_cpu() || count <= kFew) return entry(op, logits.get_device_index());
  struct OthersRun {
    PyThreadState* state = PyEval_SaveThread();
    ~OthersRun() { PyEval_RestoreThread(state); }
  } others_run;
  entry(op, logits.get_device_index());
}

// Whether the keys of the noise are plain tensors, and the four numbers behind the tensors are of all requests. Often
// they are not, since Python spreads numbers over requests: no exception is thrown.
bool can_take(PyObject* const* objects, int tensors, int key, int keys) {
  return std::all_of(objects + key, objects + key + keys, TensorView::is_plain) &&
         Arguments::are_numbers(objects + tensors);
}

// The results of a chain or a tree, in the order of the operators: a tree's nodes come behind the tokens, a chain's
// counters behind the flags.
template <class Op, class Given>
PyObject* verified(Library& library, void (*Entries::*entry)(const Op&, int32_t), const Given& arguments, int64_t rows,
                   bool tree, PyObject* like) {
  arguments.require();
  const int64_t batch = arguments.batch();
  constexpr size_t kEachRow = sizeof(int64_t) + sizeof(int32_t) + 2 * sizeof(float), kEach = 4 * sizeof(int32_t);
  ResultTuple results(library, tree ? types.verified_tree : types.verified, 6, like,
                      arguments.target_logits.get_device_index(), size_t(batch) * (size_t(rows) * kEachRow + kEach));
  VerifyResults out{};
  int32_t* more = nullptr;
  out.tokens = results.add<int64_t>(kInt64, batch, rows);
  if (tree) more = results.add<int32_t>(kInt32, batch, rows);
  out.accepted = results.add<int32_t>(kInt32, batch);
  out.valid = results.add<bool>(kBool, batch);
  if (!tree) more = results.add<int32_t>(kInt32, batch, 2);
  if (arguments.logprobs) {
    out.logprobs = results.add<float>(kFloat32, batch, rows);
    out.raw_logprobs = results.add<float>(kFloat32, batch, rows);
  } else {
    results.add_nothing();
    results.add_nothing();
  }
  if (library.entries != nullptr) run(library.entries->*entry, arguments.op(out, more), arguments.target_logits);
  return results.release();
}

PyObject* verify_chain(Library& library, PyObject* const* objects) {
  if (!can_take(objects, 10, 6, 2)) return Py_NewRef(Py_None);
  Arguments next(objects, library.device);
  const ChainArguments<TensorView> arguments{next.tensor(),       next.tensor(),       next.optional(),
                                             next.optional(),     next.optional(),     next.draft_temperature(),
                                             next.tensor(),       next.tensor(),       next.optional(),
                                             next.optional(),     next.distribution(), Rule(next.integer()),
                                             next.integer() != 0, next.integer() != 0, next.optional()};
  return verified(library, &Entries::verify_chain, arguments, arguments.rows(), false, objects[0]);
}

PyObject* verify_tree(Library& library, PyObject* const* objects) {
  if (!can_take(objects, 9, 7, 2)) return Py_NewRef(Py_None);
  Arguments next(objects, library.device);
  const TreeArguments<TensorView> arguments{next.tensor(),
                                            next.tensor(),
                                            next.tensor(),
                                            next.optional(),
                                            next.optional(),
                                            next.optional(),
                                            next.draft_temperature(),
                                            next.tensor(),
                                            next.tensor(),
                                            next.distribution(),
                                            TreeRule(next.integer()),
                                            next.integer() != 0,
                                            next.integer() != 0};
  return verified(library, &Entries::verify_tree, arguments, arguments.nodes(), true, objects[0]);
}

// What is drawn from rows, `columns` tokens each, -1 for one without a dimension of its own; by run(op of `sample`).
template <class Run>
PyObject* drawn(Library& library, const SampleArguments<TensorView>& arguments, PyTypeObject* type, int64_t columns,
                PyObject* like, const Run& run_op) {
  arguments.require();
  const int64_t rows = arguments.logits.size(0);
  ResultTuple results(library, type, 3, like, arguments.logits.get_device_index(),
                      size_t(rows) * (3 + 3 * size_t(std::abs(columns))) * sizeof(float));
  DrawResults out{};
  out.tokens = results.add<int64_t>(kInt64, rows, columns);
  out.logprobs = results.add<float>(kFloat32, rows, columns);
  out.stats = results.add<float>(kFloat32, rows, 3);
  if (library.entries != nullptr) run_op(arguments.op(out));
  return results.release();
}

PyObject* sample(Library& library, PyObject* const* objects) {
  if (!can_take(objects, 5, 2, 3)) return Py_NewRef(Py_None);
  Arguments next(objects, library.device);
  const SampleArguments<TensorView> arguments{next.tensor(), next.optional(),     next.tensor(),      next.tensor(),
                                              next.tensor(), next.distribution(), next.integer() != 0};
  return drawn(library, arguments, types.sample, -1, objects[0],
               [&](const Sample& op) { run(library.entries->sample, op, arguments.logits); });
}

PyObject* sample_children(Library& library, PyObject* const* objects) {
  if (!can_take(objects, 5, 2, 3)) return Py_NewRef(Py_None);
  Arguments next(objects, library.device);
  const SampleArguments<TensorView> arguments{next.tensor(), next.optional(),     next.tensor(), next.tensor(),
                                              next.tensor(), next.distribution(), false};
  const int64_t count = next.integer();
  const auto method = Children(next.integer());
  return drawn(library, arguments, types.drawn_children, count, objects[0], [&](const Sample& op) {
    run(library.entries->sample_children, SampleChildren{op, count, method}, arguments.logits);
  });
}

// What Triton compiles a kernel apart for, of every argument: whether it is there, its type, whether an address or a
// number is a multiple of 16, whether a number is 1 and how wide it is. None where an argument is anything else.
PyObject* launch_key(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  std::string key;
  for (PyObject* object : std::span(objects, size_t(count))) {
    DLTensor tensor;
    int overflow = 0;
    if (object == Py_None) {
      key += 'n';
    } else if (PyFloat_CheckExact(object)) {
      key += 'f';
    } else if (PyBool_Check(object)) {
      key += object == Py_True ? 't' : 'u';
    } else if (PyLong_CheckExact(object)) {
      const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
      if (overflow != 0) return Py_NewRef(Py_None);
      key += {value == 1 ? '1' : value % 16 == 0 ? 'd' : 'i', value == int32_t(value) ? 'w' : 'l'};
    } else if (tensor_type != nullptr && TensorView::is_plain(object)) {
      if (exchange->dltensor_from_py_object_no_sync(object, &tensor) != 0) {
        PyErr_Clear();
        return Py_NewRef(Py_None);
      }
      const auto address = reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset;
      key += {address % 16 == 0 ? 'a' : 'p', char(tensor.dtype.code), char(tensor.dtype.bits)};
    } else {
      return Py_NewRef(Py_None);
    }
  }
  return PyBytes_FromStringAndSize(key.data(), Py_ssize_t(key.size()));
}

constexpr const char* kLibrary = "specdec library";

// A function of Python that takes `expected` arguments and returns None where one of them is not taken as it is.
template <PyObject* (*body)(Library&, PyObject* const*), Py_ssize_t expected>
py::object function(const char* name, const py::capsule& library) {
  constexpr auto call = [](PyObject* self, PyObject* const* objects, Py_ssize_t count) -> PyObject* {
    if (count != expected) return PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", expected, count);
    try {
      return body(*static_cast<Library*>(PyCapsule_GetPointer(self, kLibrary)), objects);
    } catch (const Raised&) {
      PyErr_Clear();
    } catch (const std::exception&) {
    }
    return Py_NewRef(Py_None);
  };
  static PyObject* (*const entry)(PyObject*, PyObject* const*, Py_ssize_t) = call;
  static PyMethodDef method{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(entry)), METH_FASTCALL,
                            "See specdec_kernels/ops/fast_path.py."};
  return py::reinterpret_steal<py::object>(PyCFunction_New(&method, library.ptr()));
}

py::tuple connect(const py::type& tensor, const py::capsule& api, uintptr_t address, bool on_cuda,
                  const std::tuple<double, int64_t, double, double>& neutral, const std::array<py::type, 4>& results,
                  const py::object& empty_strided, const std::array<py::object, 4>& dtypes) {
  const auto* table = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(api.ptr(), "dlpack_exchange_api"));
  if (table == nullptr) throw py::error_already_set();
  while (table != nullptr && table->header.version.major != DLPACK_MAJOR_VERSION)
    table = reinterpret_cast<const DLPackExchangeAPI*>(table->header.prev_api);
  if (table == nullptr || table->dltensor_from_py_object_no_sync == nullptr)
    throw std::runtime_error("this PyTorch speaks another DLPack");
  const auto* entries = reinterpret_cast<const Entries*>(address);
  const Entries ours{};
  if (entries != nullptr && !std::equal(entries->sizes, std::end(entries->sizes), ours.sizes))
    throw std::runtime_error("the library is of another build");
  const auto type_of = [](const py::type& type) { return reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr()); };
  exchange = table;
  off = {std::get<1>(neutral), std::get<2>(neutral), std::get<3>(neutral)};
  tensor_type = type_of(tensor);
  types = {type_of(results[0]), type_of(results[1]), type_of(results[2]), type_of(results[3])};
  auto* const library = new Library{entries, on_cuda ? kDLCUDA : kDLCPU, nullptr, {}, {}};  // as long as Python runs
  if (!empty_strided.is_none()) library->empty_strided = empty_strided.inc_ref().ptr();
  for (size_t i = 0; i < dtypes.size(); ++i) library->dtypes[i] = dtypes[i].inc_ref().ptr();
  const py::capsule capsule(library, kLibrary);
  return py::make_tuple(function<verify_chain, 19>("verify_chain", capsule),
                        function<verify_tree, 17>("verify_tree", capsule), function<sample, 11>("sample", capsule),
                        function<sample_children, 12>("sample_children", capsule));
}

}  // namespace

void add_fast_path(py::module_& m) {
  static PyMethodDef methods[] = {
      {"launch_key", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(launch_key)), METH_FASTCALL,
       "What Triton compiles a kernel apart for, of these arguments; None where one is neither None nor a number nor a "
       "plain tensor."},
      {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
  m.def("connect", connect, py::arg("tensor"), py::arg("exchange"), py::arg("entries"), py::arg("on_cuda"),
        py::arg("off"), py::arg("results"), py::arg("empty_strided"), py::arg("dtypes"),
        "The functions `verify_chain`, `verify_tree`, `sample` and `sample_children` of a library: by torch.Tensor, its"
        " DLPack interface, the library's entries (0: what would be run is left to whoever calls), whether its tensors "
        "are on a GPU, a"
        " temperature with filters that are off, the classes of results, what makes results (None: they are made here,"
        " on a CPU) and their dtypes.");
}

}  // namespace specdec
