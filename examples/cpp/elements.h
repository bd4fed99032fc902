// A tensor's bytes as native numbers, and native numbers as a tensor's bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "layertap/v1/tensor.pb.h"

// The elements that stand in little-endian bytes; T is float or std::int64_t.
//
// They are a view of the bytes, without a copy, where this machine has the wire's byte order and
// the bytes begin at a multiple of alignof(T); the bytes must then outlive the view, unchanged.
// Otherwise they are decoded into memory of the view's own.
template <typename T>
class Elements {
 public:
  explicit Elements(std::string_view bytes);

  // A copy would look into the memory of the first.
  Elements(const Elements&) = delete;
  Elements& operator=(const Elements&) = delete;

  const T* data() const { return data_; }
  std::size_t size() const { return size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }

 private:
  std::vector<T> decoded_;
  const T* data_;
  std::size_t size_;
};

using Floats = Elements<float>;
using Integers = Elements<std::int64_t>;

// The elements of a float32 tensor in row-major order; see Elements for how long they live.
//
// Throws std::invalid_argument, with what was got and expected, if the type is another or the size
// is not the shape's.
Floats floats(const layertap::v1::Tensor& tensor);
Floats floats(const layertap::v1::Tensor&&) = delete;  // A temporary takes its bytes with it.

// The elements of an int64 tensor, likewise.
Integers integers(const layertap::v1::Tensor& tensor);
Integers integers(const layertap::v1::Tensor&&) = delete;

// Appends a float32 to a tensor's bytes, little-endian on every machine.
void append_float(std::string* bytes, float value);

// An element type's name as numpy has it, such as float32.
std::string dtype_name(layertap::v1::DataType dtype);

// A shape as text, such as 1x64x56x56.
std::string shape_text(const layertap::v1::Tensor& tensor);
