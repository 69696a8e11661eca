// What is native and made for Python: facts of the build, and operators without PyTorch's dispatcher, which takes
// longer to start than a row takes to read. Tensors are viewed through DLPack's C interface, and every argument is
// checked once, in C++.
#include <ATen/dlpack.h>
#include <pybind11/pybind11.h>
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
template <class Arguments>
PyTypeObject* results_of = nullptr;  // a named tuple

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
    // As those of zeros that are nowhere, or that functionalisation follows.
    if (tensor_.data == nullptr && std::ranges::count(sizes(), 0) == 0) throw std::runtime_error("no data");
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

// A result of one or two sizes on a CPU, with its memory, which is freed with the last tensor in it.
PyObject* make_on_cpu(Element element, int64_t rows, int64_t columns, void*& data) {
  struct Result {
    DLManagedTensorVersioned managed;
    int64_t shape[2], strides[2];
  };
  // Aligned here: to be asked for aligned memory, an allocator takes longer than for all else.
  constexpr size_t kAlign = 64;
  const DLDataType dtype = kDLTypes[element];
  const bool flat = columns < 0;
  const size_t bytes = size_t(flat ? rows : rows * columns) * dtype.bits / 8;
  void* const memory = std::malloc(sizeof(Result) + kAlign + bytes);
  if (memory == nullptr) throw std::bad_alloc();
  auto* const result = new (memory) Result{{}, {rows, columns}, {flat ? 1 : columns, 1}};
  data = reinterpret_cast<void*>((reinterpret_cast<size_t>(result + 1) + kAlign - 1) / kAlign * kAlign);
  result->managed.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
  result->managed.manager_ctx = memory;
  result->managed.deleter = [](DLManagedTensorVersioned* tensor) { std::free(tensor->manager_ctx); };
  result->managed.dl_tensor = {data, {kDLCPU, 0}, flat ? 1 : 2, dtype, result->shape, result->strides, 0};
  void* object = nullptr;  // whose the memory is after a failure is not said: it stays
  if (exchange->managed_tensor_to_py_object_no_sync(&result->managed, &object) != 0) throw Raised{};
  return static_cast<PyObject*>(object);
}

// The named tuple of a call's results.
class ResultTuple {
 public:
  // Beside the tensor `like`.
  ResultTuple(Library& library, PyTypeObject* type, Py_ssize_t count, PyObject* like, int32_t device)
      : library_(library), device_index_(device), tuple_(owned(type->tp_alloc(type, count))) {
    if (library.empty_strided != nullptr) device_ = owned(PyObject_GetAttrString(like, "device"));
  }

  // The next result, of one or two sizes; its data is not set.
  template <class T>
  T* add(int64_t rows, int64_t columns = -1) {
    void* data = nullptr;
    PyTuple_SET_ITEM(tuple_.get(), count_++, make(element_of(static_cast<T*>(nullptr)), rows, columns, data));
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
  static Element element_of(const int64_t*) { return kInt64; }
  static Element element_of(const int32_t*) { return kInt32; }
  static Element element_of(const bool*) { return kBool; }
  static Element element_of(const float*) { return kFloat32; }

  // On a GPU by PyTorch's allocator, which is told of the streams that use what it gave.
  PyObject* make(Element element, int64_t rows, int64_t columns, void*& data) {
    if (library_.empty_strided == nullptr) return make_on_cpu(element, rows, columns, data);
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
  Py_ssize_t count_ = 0;
};

// Positional arguments, one after the other.
class PythonArguments {
 public:
  PythonArguments(PyObject* const* at, DLDeviceType device) : at_(at), device_(device) {}

  TensorView tensor() { return TensorView(*at_++, device_); }
  std::optional<TensorView> optional() {
    PyObject* const object = *at_++;
    return object == Py_None ? std::nullopt : std::optional<TensorView>(std::in_place, object, device_);
  }
  int64_t integer() {
    const int64_t value = PyLong_AsLongLong(*at_++);
    if (value == -1 && PyErr_Occurred()) throw Raised{};
    return value;
  }
  double number() {
    if (!PyFloat_CheckExact(*at_)) throw std::runtime_error("an argument is no float");
    return PyFloat_AS_DOUBLE(*at_++);
  }
  bool flag() {
    if (!PyBool_Check(*at_)) throw std::runtime_error("an argument is no bool");
    return *at_++ == Py_True;
  }

 private:
  PyObject* const* at_;
  DLDeviceType device_;
};

// Work on so few logits is done in a tenth of a millisecond: other Python threads, which wait for five before they ask,
// may as well wait for that, and to let them in and come back would take a hundredth of it. A launch waits where many
// are under way, perhaps for what another thread is to launch.
constexpr int64_t kFew = int64_t(1) << 21;

template <class Op>
void run(void (*entry)(const Op&, int32_t), const Op& op, const TensorView& logits) {
  const auto sizes = logits.sizes();
  const int64_t count = std::accumulate(sizes.begin(), sizes.end(), int64_t(1), std::multiplies());
  if (logits.is_cpu() && count <= kFew) return entry(op, logits.get_device_index());
  struct OthersRun {
    PyThreadState* state = PyEval_SaveThread();
    ~OthersRun() { PyEval_RestoreThread(state); }
  } others_run;
  entry(op, logits.get_device_index());
}

// Whether the keys of the noise are plain tensors, and temperature and top-k are of all requests. Often they are not,
// since Python spreads numbers over requests: no exception is thrown.
template <class Arguments>
bool can_take(PyObject* const* objects) {
  return std::all_of(objects + Arguments::kKeys, objects + Arguments::kKeysEnd, TensorView::is_plain) &&
         PyFloat_CheckExact(objects[Arguments::kTemperature]) &&
         PyLong_CheckExact(objects[Arguments::kTemperature + 1]);
}

// An operator with such arguments.
template <class Arguments, auto entry>
PyObject* call(Library& library, PyObject* const* objects) {
  if (!can_take<Arguments>(objects)) return Py_NewRef(Py_None);
  PythonArguments next(objects, library.device);
  const Arguments arguments = Arguments::read(next);
  arguments.require();
  ResultTuple results(library, results_of<Arguments>, Arguments::kResults, objects[0],
                      arguments.first().get_device_index());
  const auto op = arguments.op(results);
  if (library.entries != nullptr) run(library.entries->*entry, op, arguments.first());
  return results.release();
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

PyTypeObject* type_of(const py::type& type) { return reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr()); }

// A function of Python that takes an operator's arguments and returns None where one of them is not taken as it is.
template <class Arguments, auto entry>
py::object function(const char* name, const py::capsule& library, const py::type& results) {
  constexpr auto called = [](PyObject* self, PyObject* const* objects, Py_ssize_t count) -> PyObject* {
    constexpr Py_ssize_t kExpected = Arguments::kCount;
    if (count != kExpected) return PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", kExpected, count);
    try {
      return call<Arguments, entry>(*static_cast<Library*>(PyCapsule_GetPointer(self, kLibrary)), objects);
    } catch (const Raised&) {
      PyErr_Clear();
    } catch (const std::exception&) {
    }
    return Py_NewRef(Py_None);
  };
  static PyObject* (*const function)(PyObject*, PyObject* const*, Py_ssize_t) = called;
  static PyMethodDef method{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL,
                            "See specdec_kernels/ops/backends.py."};
  results_of<Arguments> = type_of(results);
  return py::reinterpret_steal<py::object>(PyCFunction_New(&method, library.ptr()));
}

py::tuple connect(uintptr_t address, bool on_cuda, bool results_by_torch, const std::array<py::type, 4>& results) {
  const py::module_ torch = py::module_::import("torch");
  const py::type tensor = torch.attr("Tensor");
  const py::capsule api = tensor.attr("__dlpack_c_exchange_api__");
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
  exchange = table;
  tensor_type = type_of(tensor);
  auto* const library = new Library{entries, on_cuda ? kDLCUDA : kDLCPU, nullptr, {}, {}};  // as long as Python runs
  const auto kept = [&](const char* name) { return py::object(torch.attr(name)).release().ptr(); };
  if (results_by_torch) library->empty_strided = kept("empty_strided");
  library->dtypes = {kept("int64"), kept("int32"), kept("bool"), kept("float32")};
  const py::capsule capsule(library, kLibrary);
  return py::make_tuple(
      function<ChainArguments<TensorView>, &Entries::verify_chain>("verify_chain", capsule, results[0]),
      function<TreeArguments<TensorView>, &Entries::verify_tree>("verify_tree", capsule, results[1]),
      function<SampleArguments<TensorView>, &Entries::sample>("sample", capsule, results[2]),
      function<ChildrenArguments<TensorView>, &Entries::sample_children>("sample_children", capsule, results[3]));
}

}  // namespace
}  // namespace specdec

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native code made for Python.";
  m.def(
      "build_facts",
      [] {
        py::dict facts;
        facts["compiler"] = SPECDEC_COMPILER;
        facts["torch"] = SPECDEC_TORCH;
        facts["sanitized"] = bool(SPECDEC_SANITIZED);
        return facts;
      },
      "What the native libraries were built with: compiler, torch, whether with sanitizers.");
  static PyMethodDef methods[] = {
      {"launch_key", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(specdec::launch_key)), METH_FASTCALL,
       "What Triton compiles a kernel apart for, of these arguments; None where one is neither None nor a number nor a "
       "plain tensor."},
      {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
  m.def("connect", specdec::connect, py::arg("entries"), py::arg("on_cuda"), py::arg("results_by_torch"),
        py::arg("results"),
        "The functions `verify_chain`, `verify_tree`, `sample` and `sample_children` of a library: by its entries (0: "
        "what would be run is left to whoever calls), whether its tensors are on a GPU, whether PyTorch makes the "
        "results (else they are made here, on a CPU), and their classes.");
}
