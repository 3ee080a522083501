// Tensors, read through PyTorch's stable C interface: without its headers, and without a Python
// call for every number.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace afd::tensors {

namespace py = pybind11;

// Functions of torch/csrc/inductor/aoti_torch/c/shim.h; each returns 0 where all is well. A handle
// is the address of an at::Tensor, which is one pointer: the one that `_cdata` holds.
struct Interface {
  template <class T>
  using Get = int32_t (*)(void* handle, T* result);

  Get<void*> data_ptr;
  Get<int64_t> dim;
  Get<int64_t*> sizes;
  Get<int64_t*> strides;
  Get<int32_t> dtype;
  Get<int32_t> device_type;
  Get<int32_t> device_index;
  Get<int32_t> layout;
};

// What Python hands over once. Python objects live as long as the process.
struct Torch {
  Interface get{};
  int32_t strided = 0;
  std::array<PyObject*, 2> types{};
  // Functions of one tensor; where one is true the tensor is more than its memory.
  std::vector<PyObject*> unusual;
};

inline Torch torch;

inline void check(int32_t error) {
  if (error != 0) {
    throw std::runtime_error("a tensor cannot be read");
  }
}

template <class T>
T read(Interface::Get<T> get, void* implementation) {
  if (get == nullptr) {
    throw std::runtime_error("connect() was not called");
  }
  T result{};
  check(get(&implementation, &result));
  return result;
}

// Whether x is a tensor and no object of a subclass, which may be anything.
inline bool is_exact(py::handle x) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(x.ptr()));
  return type == torch.types[0] || type == torch.types[1];
}

inline void* implementation(py::handle x) {
  static PyObject* const name = PyUnicode_InternFromString("_cdata");
  PyObject* found = PyObject_GetAttr(x.ptr(), name);
  void* address = found == nullptr ? nullptr : PyLong_AsVoidPtr(found);
  Py_XDECREF(found);
  if (address == nullptr) {
    throw py::error_already_set();
  }
  return address;
}

// The address of a tensor's first element, null for None.
inline void* address(py::handle x) {
  if (x.is_none()) {
    return nullptr;
  }
  if (is_exact(x)) {
    return read(torch.get.data_ptr, implementation(x));
  }
  return reinterpret_cast<void*>(x.attr("data_ptr")().cast<uintptr_t>());
}

// Shapes, strides, dtypes and devices of tensors (or None) as bytes; None where one of them is not
// a plain strided tensor.
inline py::object key(py::tuple tensors) {
  std::vector<int64_t> numbers;
  numbers.reserve(128);
  for (const py::handle x : tensors) {
    if (x.is_none()) {
      numbers.push_back(-1);
      continue;
    }
    if (!is_exact(x)) {
      return py::none();
    }
    void* const it = implementation(x);
    if (read(torch.get.layout, it) != torch.strided) {
      return py::none();
    }
    const int64_t dim = read(torch.get.dim, it);
    const int64_t dtype = read(torch.get.dtype, it);
    const int64_t device = read(torch.get.device_type, it);
    const int64_t index = read(torch.get.device_index, it) & 0xffff;
    numbers.push_back(dim | dtype << 16 | device << 32 | index << 40);
    const int64_t* const sizes = read(torch.get.sizes, it);
    numbers.insert(numbers.end(), sizes, sizes + dim);
    const int64_t* const strides = read(torch.get.strides, it);
    numbers.insert(numbers.end(), strides, strides + dim);
  }
  return py::bytes(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int64_t));
}

// Whether nothing but its memory belongs to any of the first `count` of `arguments`, exact tensors
// or None.
inline bool all_usual(py::tuple arguments, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    PyObject* const x = PyTuple_GET_ITEM(arguments.ptr(), i);
    for (PyObject* const is_unusual : torch.unusual) {
      if (x == Py_None) {
        break;
      }
      PyObject* const answer = PyObject_CallOneArg(is_unusual, x);
      if (answer == nullptr) {
        throw py::error_already_set();
      }
      Py_DECREF(answer);
      if (answer != Py_False) {
        return false;
      }
    }
  }
  return true;
}

// Bit i of the result: whether 16 divides the address of tensor i.
inline uint64_t alignment(py::tuple tensors) {
  uint64_t bits = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    bits |= static_cast<uint64_t>(reinterpret_cast<uintptr_t>(address(tensors[i])) % 16 == 0) << i;
  }
  return bits;
}

// Whether none of the numbers of a float32 tensor is 0, infinite or NaN; false where they do not
// fill their memory, in whatever order.
inline bool all_finite_nonzero(py::handle x) {
  void* const it = implementation(x);
  const int64_t dim = read(torch.get.dim, it);
  const int64_t* const sizes = read(torch.get.sizes, it);
  const int64_t* const strides = read(torch.get.strides, it);
  int64_t count = 1;
  int64_t extent = 1;
  for (int64_t i = 0; i < dim; ++i) {
    count *= sizes[i];
    extent += (sizes[i] - 1) * strides[i];
  }
  if (count == 0 || extent != count) {
    return count == 0;
  }
  const auto* const bits = static_cast<const uint32_t*>(read(torch.get.data_ptr, it));
  const py::gil_scoped_release released;
  bool all = true;
  for (int64_t i = 0; i < count; ++i) {
    // Without the sign: 0 wraps around, infinities and NaN are the largest.
    all &= (bits[i] & 0x7fffffffu) - 1u < 0x7f800000u - 1u;
  }
  return all;
}

// Whether no tensor at `written` shares an address with another; tensor i is extents[i] bytes long.
inline bool apart(py::tuple tensors, const std::vector<uintptr_t>& extents,
                  const std::vector<size_t>& written) {
  std::vector<uintptr_t> starts;
  for (const py::handle x : tensors) {
    if (!is_exact(x)) {
      return false;
    }
    starts.push_back(reinterpret_cast<uintptr_t>(address(x)));
  }
  for (const size_t i : written) {
    for (size_t j = 0; j < starts.size(); ++j) {
      if (i != j && starts[j] < starts[i] + extents.at(i) &&
          starts[i] < starts[j] + extents.at(j)) {
        return false;
      }
    }
  }
  return true;
}

template <class T>
void point(T*& field, void* to) {
  field = static_cast<T*>(to);
}

// A field that is an array with strides; the strides stay.
template <class Strided>
auto point(Strided& field, void* to) -> decltype(field.data, void()) {
  field.data = to;
}

template <class>
using Argument = py::handle;

// `place(tensors...)`: sets the addresses of `fields`, in this order; None is no address.
template <class Problem, class... T>
void define_place(py::class_<Problem>& type, const char* name, T Problem::*... fields) {
  type.def(name, [fields...](Problem& p, Argument<T>... tensors) {
    (point(p.*fields, address(tensors)), ...);
  });
}

inline void connect(py::dict functions, int32_t strided, py::object tensor, py::object parameter,
                    py::list unusual) {
  const auto set = [&](auto& get, const char* name) {
    get = reinterpret_cast<std::remove_reference_t<decltype(get)>>(
        functions[name].template cast<uintptr_t>());
  };
  set(torch.get.data_ptr, "data_ptr");
  set(torch.get.dim, "dim");
  set(torch.get.sizes, "sizes");
  set(torch.get.strides, "strides");
  set(torch.get.dtype, "dtype");
  set(torch.get.device_type, "device_type");
  set(torch.get.device_index, "device_index");
  set(torch.get.layout, "layout");
  torch.strided = strided;
  torch.types = {tensor.release().ptr(), parameter.release().ptr()};
  torch.unusual.clear();
  for (const py::handle function : unusual) {
    torch.unusual.push_back(function.inc_ref().ptr());
  }
}

inline void define(py::module_& m) {
  m.def("connect", connect, "PyTorch's C interface, its types, and what makes a tensor unusual.");
  m.def("key", key, "Shapes, strides, dtypes and devices as bytes, or None.");
  m.def("all_usual", all_usual, "Whether nothing but its memory belongs to any tensor.");
  m.def("alignment", alignment, "Bit i: whether 16 divides the address of tensor i.");
  m.def("all_finite_nonzero", all_finite_nonzero,
        "Whether none of the numbers of a float32 tensor is 0, infinite or NaN.");
  m.def("apart", apart, "Whether no written tensor shares an address with another.");
}

}  // namespace afd::tensors
