#include "elements.h"

#include <cctype>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>

namespace v1 = layertap::v1;

static_assert(sizeof(float) == 4 && std::numeric_limits<float>::is_iec559);

namespace {

bool little_endian() {
  const std::uint16_t one = 1;
  unsigned char first;
  std::memcpy(&first, &one, 1);
  return first == 1;
}

template <typename T>
bool aligned(const char* bytes) {
  return reinterpret_cast<std::uintptr_t>(bytes) % alignof(T) == 0;
}

// Right on every machine and at every address; compilers make one load of it where they can.
template <typename T>
T decode(const char* bytes) {
  std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t> bits = 0;
  for (std::size_t i = 0; i < sizeof bits; ++i) {
    bits |= decltype(bits){static_cast<unsigned char>(bytes[i])} << 8 * i;
  }
  T value;
  static_assert(sizeof value == sizeof bits);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Sizes come from outside: a negative one, or a product that overflows, must not pass for another.
std::size_t bytes_of(const v1::Tensor& tensor, std::size_t item_bytes) {
  std::size_t bytes = item_bytes;
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

template <typename T>
Elements<T> elements(const v1::Tensor& tensor, v1::DataType dtype) {
  if (tensor.dtype() != dtype) {
    throw std::invalid_argument(tensor.name() + ": got " + v1::DataType_Name(tensor.dtype()) +
                                ", expected " + v1::DataType_Name(dtype));
  }
  const std::size_t expected = bytes_of(tensor, sizeof(T));
  if (tensor.data().size() != expected) {
    throw std::invalid_argument(tensor.name() + ": got " + std::to_string(tensor.data().size()) +
                                " bytes, expected " + std::to_string(expected) + " for " +
                                shape_text(tensor));
  }
  return Elements<T>(tensor.data());
}

}  // namespace

template <typename T>
Elements<T>::Elements(std::string_view bytes) : size_(bytes.size() / sizeof(T)) {
  if (little_endian() && aligned<T>(bytes.data())) {
    // The bytes were written as char, which may alias anything: compilers read what was written.
    data_ = reinterpret_cast<const T*>(bytes.data());
    return;
  }
  decoded_.reserve(size_);
  for (std::size_t i = 0; i < size_; ++i) decoded_.push_back(decode<T>(&bytes[i * sizeof(T)]));
  data_ = decoded_.data();
}

template class Elements<float>;
template class Elements<std::int64_t>;

Floats floats(const v1::Tensor& tensor) { return elements<float>(tensor, v1::DATA_TYPE_FLOAT32); }

Integers integers(const v1::Tensor& tensor) {
  return elements<std::int64_t>(tensor, v1::DATA_TYPE_INT64);
}

void append_float(std::string* bytes, float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  for (int i = 0; i < 4; ++i) bytes->push_back(static_cast<char>(bits >> 8 * i & 0xff));
}

std::string dtype_name(v1::DataType dtype) {
  constexpr std::string_view kPrefix = "DATA_TYPE_";
  std::string name = v1::DataType_Name(dtype);
  if (name.compare(0, kPrefix.size(), kPrefix) == 0) name.erase(0, kPrefix.size());
  for (char& letter : name) letter = static_cast<char>(std::tolower(letter));
  return name;
}

std::string shape_text(const v1::Tensor& tensor) {
  std::string text;
  for (std::int64_t size : tensor.shape()) {
    if (!text.empty()) text += 'x';
    text += std::to_string(size);
  }
  return text;
}
