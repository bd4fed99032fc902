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
  float first;
  std::memcpy(&first, kBytes.data(), sizeof first);
  const bool same_byte_order = first == kValues[0];
  // The values are the same at each alignment, and a view of the bytes at that of a float.
  for (std::size_t offset = 0; offset < 4; ++offset) {
    alignas(float) char memory[16];
    std::copy(kBytes.begin(), kBytes.end(), memory + offset);
    const Floats got(std::string_view(memory + offset, kBytes.size()));
    expect(std::equal(got.begin(), got.end(), kValues.begin(), kValues.end()), "values are equal");
    const bool view = reinterpret_cast<const char*>(got.data()) == memory + offset;
    expect(view == (same_byte_order && offset == 0), "a view where one can be");
  }

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
}
