// The place of each byte of a message with tensors; see Note [Layout of a message].
#include "layout.h"

#include <cstring>
#include <stdexcept>

#include "shape.h"
#include "wire.h"

namespace layertap {

namespace {

// Field numbers of layertap.v1.Tensor.
enum : std::uint32_t { kName = 1, kDtype = 2, kShape = 3, kPadding = 4, kData = 5, kShared = 6 };

// Field numbers of layertap.v1.SharedSlice, and the bytes of its four fields.
enum : std::uint32_t { kRegion = 1, kGeneration = 2, kOffset = 3, kSize = 4 };
constexpr std::size_t kFixed64Field = 9;
constexpr std::size_t kSliceSize = 4 * kFixed64Field;

// Maximum size of the padding field: its tag, a length of one byte, and 127 zeros.
constexpr std::size_t kMaxPaddingField = 129;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

std::string small_fields(const TensorSpec& spec) {
  std::string out;
  if (!spec.name.empty()) {
    append_tag(out, kName, kLengthDelimited);
    append_varint(out, spec.name.size());
    out += spec.name;
  }
  append_tag(out, kDtype, kVarint);
  append_varint(out, static_cast<std::uint64_t>(spec.dtype));
  if (!spec.shape.empty()) {
    std::string sizes;
    for (std::int64_t size : spec.shape) append_varint(sizes, static_cast<std::uint64_t>(size));
    append_tag(out, kShape, kLengthDelimited);
    append_varint(out, sizes.size());
    out += sizes;
  }
  return out;
}

void append_padding(std::string& out, std::size_t size) {
  if (size == 0) return;
  append_tag(out, kPadding, kLengthDelimited);
  append_varint(out, size - 2);
  out.append(size - 2, '\0');
}

// Returns the size of the padding field that aligns the payload. The submessage's length grows with
// the padding and may itself take one more byte, so sizes are tried: any 64 in a row give all
// residues but at most one, and there are 128 to try. A field can't have a size of 1.
std::size_t padding_field(std::size_t begin, std::size_t fixed, std::size_t body) {
  for (std::size_t size = 0; size <= kMaxPaddingField; ++size) {
    if (size == 1) continue;
    const std::size_t payload = begin + varint_size(body + size) + fixed + size;
    if (payload % kPayloadAlignment == kPayloadResidue) return size;
  }
  refuse("layout: no padding aligns the payload");
}

void append_fixed64(std::string& out, std::uint32_t field, std::uint64_t value) {
  append_tag(out, field, kFixed64);
  for (int i = 0; i < 8; ++i) out.push_back(static_cast<char>(value >> (8 * i)));
}

std::size_t checked_payload(const TensorSpec& spec, const DType*& dtype) {
  dtype = find_dtype(spec.dtype);
  if (dtype == nullptr) refuse("dtype: got " + std::to_string(spec.dtype) + ", not a DataType");
  if (spec.shape.size() > kMaxRank) {
    refuse("shape: got rank " + std::to_string(spec.shape.size()) + ", expected at most 32");
  }
  const std::int64_t bytes = payload_bytes(spec.shape.data(), spec.shape.size(), dtype->itemsize);
  if (bytes < 0) refuse("shape: got a negative size or one that overflows");
  if (static_cast<std::uint64_t>(bytes) > kMaxMessageBytes || spec.name.size() > kMaxMessageBytes) {
    refuse("message: larger than 2**31 - 1 bytes");
  }
  return static_cast<std::size_t>(bytes);
}

TensorSlot make_slot(const TensorSpec& spec, std::uint32_t field, std::size_t offset) {
  TensorSlot slot;
  slot.payload_size = checked_payload(spec, slot.dtype);
  slot.shape = spec.shape;
  slot.header_offset = offset;
  append_tag(slot.header, field, kLengthDelimited);
  const std::string small = small_fields(spec);
  const std::size_t fixed = small.size() + 1 + varint_size(slot.payload_size);
  const std::size_t body = fixed + slot.payload_size;
  const std::size_t padding = padding_field(offset + slot.header.size(), fixed, body);
  append_varint(slot.header, body + padding);
  slot.header += small;
  append_padding(slot.header, padding);
  append_tag(slot.header, kData, kLengthDelimited);
  append_varint(slot.header, slot.payload_size);
  slot.payload_offset = offset + slot.header.size();
  return slot;
}

// Region and generation come last, so that write_region can find them.
TensorSlot make_slot_apart(const TensorSpec& spec, std::uint32_t field, std::size_t offset,
                           std::size_t payload_offset) {
  TensorSlot slot;
  slot.payload_size = checked_payload(spec, slot.dtype);
  slot.payload_offset = payload_offset;
  slot.shape = spec.shape;
  slot.header_offset = offset;
  std::string body = small_fields(spec);
  append_tag(body, kShared, kLengthDelimited);
  append_varint(body, kSliceSize);
  append_fixed64(body, kSize, slot.payload_size);
  append_fixed64(body, kOffset, payload_offset);
  append_fixed64(body, kRegion, 0);
  append_fixed64(body, kGeneration, 0);
  append_tag(slot.header, field, kLengthDelimited);
  append_varint(slot.header, body.size());
  slot.header += body;
  return slot;
}

}  // namespace

Layout::Layout(const std::vector<TensorSpec>& tensors, std::int64_t field, std::int64_t head_size,
               bool apart)
    : apart_(apart) {
  if (field < 1 || field > kMaxFieldNumber) {
    refuse("field: got " + std::to_string(field) + ", expected 1 to 2**29 - 1");
  }
  if (head_size < 0 || static_cast<std::uint64_t>(head_size) > kMaxMessageBytes) {
    refuse("head_size: got " + std::to_string(head_size) + ", expected 0 to 2**31 - 1");
  }
  head_size_ = static_cast<std::size_t>(head_size);
  nbytes_ = head_size_;
  slots_.reserve(tensors.size());
  for (const TensorSpec& spec : tensors) {
    add_slot(spec, static_cast<std::uint32_t>(field));
    if (nbytes_ + payload_nbytes_ > kMaxMessageBytes) {
      refuse("message: larger than 2**31 - 1 bytes");
    }
  }
}

void Layout::add_slot(const TensorSpec& spec, std::uint32_t field) {
  if (!apart_) {
    slots_.push_back(make_slot(spec, field, nbytes_));
    nbytes_ = slots_.back().payload_offset + slots_.back().payload_size;
    return;
  }
  const std::size_t begin =
      (payload_nbytes_ + kPayloadAlignment - 1) / kPayloadAlignment * kPayloadAlignment;
  slots_.push_back(make_slot_apart(spec, field, nbytes_, begin));
  nbytes_ += slots_.back().header.size();
  payload_nbytes_ = begin + slots_.back().payload_size;
}

void Layout::write_headers(std::uint8_t* message) const {
  for (const TensorSlot& slot : slots_) {
    std::memcpy(message + slot.header_offset, slot.header.data(), slot.header.size());
  }
}

void Layout::write_region(std::uint8_t* message, std::uint64_t region,
                          std::uint64_t generation) const {
  std::string fields;
  append_fixed64(fields, kRegion, region);
  append_fixed64(fields, kGeneration, generation);
  for (const TensorSlot& slot : slots_) {
    std::memcpy(message + slot.header_offset + slot.header.size() - fields.size(), fields.data(),
                fields.size());
  }
}

}  // namespace layertap
