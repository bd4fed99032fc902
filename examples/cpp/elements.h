// A tensor's bytes as native numbers, and native numbers as a tensor's bytes.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "layertap/v1/tensor.pb.h"

// The float32s that stand in little-endian bytes.
//
// They are a view of the bytes, without a copy, where this machine has the wire's byte order and
// the bytes begin at a multiple of alignof(float); the bytes must then outlive the view, unchanged.
// Otherwise they are decoded into memory of the view's own.
class Floats {
 public:
  explicit Floats(std::string_view bytes);

  // A copy would look into the memory of the first.
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;

  const float* data() const { return data_; }
  std::size_t size() const { return size_; }
  const float* begin() const { return data_; }
  const float* end() const { return data_ + size_; }

 private:
  std::vector<float> decoded_;
  const float* data_;
  std::size_t size_;
};

// The elements of a float32 tensor in row-major order; see Floats for how long they live.
//
// Throws std::invalid_argument, with what was got and expected, if the type is another or the size
// is not the shape's.
Floats floats(const layertap::v1::Tensor& tensor);
Floats floats(const layertap::v1::Tensor&&) = delete;  // A temporary takes its bytes with it.

// Appends a float32 to a tensor's bytes, little-endian on every machine.
void append_float(std::string* bytes, float value);

// A shape as text, such as 1x64x56x56.
std::string shape_text(const layertap::v1::Tensor& tensor);
