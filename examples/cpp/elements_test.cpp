// What elements.h promises, as far as one machine can show it.
#include "elements.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <stdexcept>

namespace v1 = layertap::v1;

namespace {

const std::vector<float> kValues = {1.0f, -2.0f, 0.5f};
const std::string kBytes("\0\0\x80\x3f\0\0\0\xc0\0\0\0\x3f", 12);

const std::vector<std::int64_t> kLong = {-2, std::int64_t{1} << 40};
const std::string kLongBytes("\xfe\xff\xff\xff\xff\xff\xff\xff\0\0\0\0\0\1\0\0", 16);

void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::cerr << "not so: " << what << '\n';
  std::exit(1);
}

v1::Tensor tensor_of(v1::DataType dtype, const std::vector<std::int64_t>& shape) {
  v1::Tensor tensor;
  tensor.set_name("t");
  tensor.set_dtype(dtype);
  tensor.mutable_shape()->Assign(shape.begin(), shape.end());
  tensor.set_data(kBytes);
  return tensor;
}

// The values are the same at each alignment, and a view of the bytes at that of an element.
template <typename T>
void expect_at_each_alignment(const std::string& bytes, const std::vector<T>& values) {
  T first;
  std::memcpy(&first, bytes.data(), sizeof first);
  const bool same_byte_order = first == values[0];
  for (std::size_t offset = 0; offset < sizeof(T); ++offset) {
    alignas(T) char memory[32];
    std::copy(bytes.begin(), bytes.end(), memory + offset);
    const Elements<T> got(std::string_view(memory + offset, bytes.size()));
    expect(std::equal(got.begin(), got.end(), values.begin(), values.end()), "values are equal");
    const bool view = reinterpret_cast<const char*>(got.data()) == memory + offset;
    expect(view == (same_byte_order && offset % alignof(T) == 0), "a view where one can be");
  }
}

void expect_refused(const v1::Tensor& tensor, const std::string& text) {
  std::string got = "nothing";
  try {
    floats(tensor);
  } catch (const std::invalid_argument& error) {
    got = error.what();
  }
  expect(got == text, "the error is \"" + text + "\", got \"" + got + '"');
}

}  // namespace

int main() {
  expect_at_each_alignment(kBytes, kValues);
  expect_at_each_alignment(kLongBytes, kLong);

  std::string written;
  for (float value : kValues) append_float(&written, value);
  expect(written == kBytes, "floats are written little-endian");

  const v1::Tensor good = tensor_of(v1::DATA_TYPE_FLOAT32, {1, 3});
  expect(floats(good).size() == 3, "a tensor has its elements");
  expect_refused(tensor_of(v1::DATA_TYPE_FLOAT32, {2, 2}), "t: got 12 bytes, expected 16 for 2x2");
  expect_refused(tensor_of(v1::DATA_TYPE_FLOAT16, {6}),
                 "t: got DATA_TYPE_FLOAT16, expected DATA_TYPE_FLOAT32");
  expect_refused(tensor_of(v1::DATA_TYPE_FLOAT32, {-3, -1}), "t: no tensor has the shape -3x-1");
  const std::int64_t huge = std::int64_t{1} << 62;
  expect_refused(tensor_of(v1::DATA_TYPE_FLOAT32, {huge, 16}),
                 "t: no tensor has the shape " + std::to_string(huge) + "x16");

  v1::Tensor whole = tensor_of(v1::DATA_TYPE_INT64, {2});
  whole.set_data(kLongBytes);
  expect(integers(whole).size() == 2, "a tensor of whole numbers has its elements");
  expect(dtype_name(whole.dtype()) == "int64", "an element type has its name");
}
