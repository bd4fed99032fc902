// Conversions of Python's buffers and integers for the core.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "strided_copy.h"

namespace layertap {

// A read-only view of an array, held while this object lives. Create and destroy it under the GIL.
//
// The format is ignored: arrays are passed as bit patterns, and only the item size is checked.
class PythonBuffer {
 public:
  explicit PythonBuffer(pybind11::handle array) {
    if (PyObject_GetBuffer(array.ptr(), &view_, PyBUF_STRIDES) != 0) {
      throw pybind11::error_already_set();
    }
    const auto rank = static_cast<std::size_t>(view_.ndim);
    // A copy, as Py_ssize_t and int64_t are different types on some platforms.
    shape_.assign(view_.shape, view_.shape + (view_.shape == nullptr ? 0 : rank));
    strides_.assign(view_.strides, view_.strides + (view_.strides == nullptr ? 0 : rank));
  }
  ~PythonBuffer() { PyBuffer_Release(&view_); }
  PythonBuffer(const PythonBuffer&) = delete;
  PythonBuffer& operator=(const PythonBuffer&) = delete;

  const std::vector<std::int64_t>& shape() const { return shape_; }

  Source source() const {
    return {static_cast<const std::uint8_t*>(view_.buf), shape_.size(), shape_.data(),
            strides_.data(), static_cast<std::size_t>(view_.itemsize)};
  }

 private:
  Py_buffer view_;
  std::vector<std::int64_t> shape_;    // elements
  std::vector<std::int64_t> strides_;  // bytes
};

// A contiguous buffer to write to, held while this object lives. Destroy it under the GIL.
class WritableBuffer {
 public:
  explicit WritableBuffer(pybind11::handle array) {
    if (PyObject_GetBuffer(array.ptr(), &view_, PyBUF_WRITABLE) != 0) {
      throw pybind11::error_already_set();
    }
  }
  ~WritableBuffer() { PyBuffer_Release(&view_); }
  WritableBuffer(const WritableBuffer&) = delete;
  WritableBuffer& operator=(const WritableBuffer&) = delete;

  std::uint8_t* data() const { return static_cast<std::uint8_t*>(view_.buf); }
  std::size_t size() const { return static_cast<std::size_t>(view_.len); }

 private:
  Py_buffer view_;
};

// Converts an int or an object with __index__. Raises ValueError for more than 64 bits, TypeError
// for other objects.
inline std::int64_t to_int64(pybind11::handle value) {
  const auto number = pybind11::reinterpret_steal<pybind11::object>(PyNumber_Index(value.ptr()));
  if (!number) throw pybind11::error_already_set();
  int overflow = 0;
  const long long out = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (overflow != 0) throw std::invalid_argument("integer of more than 64 bits");
  if (out == -1 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
  return out;
}

}  // namespace layertap
