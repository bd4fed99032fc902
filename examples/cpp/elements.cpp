#include "elements.h"

#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace v1 = layertap::v1;

static_assert(sizeof(float) == 4 && std::numeric_limits<float>::is_iec559);

namespace {

bool little_endian() {
  const std::uint16_t one = 1;
  unsigned char first;
  std::memcpy(&first, &one, 1);
  return first == 1;
}

bool aligned(const char* bytes) {
  return reinterpret_cast<std::uintptr_t>(bytes) % alignof(float) == 0;
}

// Right on every machine and at every address; compilers make one load of it where they can.
float decode(const char* bytes) {
  std::uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) bits |= std::uint32_t{static_cast<unsigned char>(bytes[i])} << 8 * i;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Sizes come from outside: a negative one, or a product that overflows, must not pass for another.
std::size_t bytes_of(const v1::Tensor& tensor) {
  std::size_t bytes = sizeof(float);
  for (std::int64_t size : tensor.shape()) {
    const auto factor = static_cast<std::uint64_t>(size);
    if (size < 0 || (size > 0 && bytes > std::numeric_limits<std::size_t>::max() / factor)) {
      throw std::invalid_argument(tensor.name() + ": no tensor has the shape " +
                                  shape_text(tensor));
    }
    bytes *= factor;
  }
  return bytes;
}

}  // namespace

Floats::Floats(std::string_view bytes) : size_(bytes.size() / sizeof(float)) {
  if (little_endian() && aligned(bytes.data())) {
    // The bytes were written as char, which may alias anything: compilers read what was written.
    data_ = reinterpret_cast<const float*>(bytes.data());
    return;
  }
  decoded_.reserve(size_);
  for (std::size_t i = 0; i < size_; ++i) decoded_.push_back(decode(&bytes[i * sizeof(float)]));
  data_ = decoded_.data();
}

Floats floats(const v1::Tensor& tensor) {
  if (tensor.dtype() != v1::DATA_TYPE_FLOAT32) {
    throw std::invalid_argument(tensor.name() + ": got " + v1::DataType_Name(tensor.dtype()) +
                                ", expected DATA_TYPE_FLOAT32");
  }
  const std::size_t expected = bytes_of(tensor);
  if (tensor.data().size() != expected) {
    throw std::invalid_argument(tensor.name() + ": got " + std::to_string(tensor.data().size()) +
                                " bytes, expected " + std::to_string(expected) + " for " +
                                shape_text(tensor));
  }
  return Floats(tensor.data());
}

void append_float(std::string* bytes, float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  for (int i = 0; i < 4; ++i) bytes->push_back(static_cast<char>(bits >> 8 * i & 0xff));
}

std::string shape_text(const v1::Tensor& tensor) {
  std::string text;
  for (std::int64_t size : tensor.shape()) {
    if (!text.empty()) text += 'x';
    text += std::to_string(size);
  }
  return text;
}
