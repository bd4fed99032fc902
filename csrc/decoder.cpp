// Messages with tensors, split into spans; see Note [Agreement with upb].
#include "decoder.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "dtype.h"

namespace layertap {

namespace {

// The tags of layertap.v1.Tensor's fields; with another wire type, a field is unknown.
constexpr std::uint32_t kNameTag = (1 << 3) | kLengthDelimited;
constexpr std::uint32_t kDtypeTag = (2 << 3) | kVarint;
constexpr std::uint32_t kShapeTag = (3 << 3) | kVarint;
constexpr std::uint32_t kPackedShapeTag = (3 << 3) | kLengthDelimited;
constexpr std::uint32_t kDataTag = (5 << 3) | kLengthDelimited;
constexpr std::uint32_t kSharedTag = (6 << 3) | kLengthDelimited;

[[noreturn]] void malformed(const std::string& what) { throw std::invalid_argument(what); }

void add_size(DecodedTensor& tensor, std::uint64_t size) {
  if (tensor.rank < kMaxRank) tensor.shape[tensor.rank] = static_cast<std::int64_t>(size);
  ++tensor.rank;
}

void check_field_number(std::uint32_t tag) {
  if (tag >> 3 == 0) malformed("message: field number 0");
}

void merge_slice(const std::uint8_t* message, Span span, SharedSlice& slice) {
  std::uint64_t* const fields[] = {&slice.region, &slice.generation, &slice.offset, &slice.size};
  Reader reader(message, span);
  while (!reader.done()) {
    const std::uint32_t tag = reader.tag();
    check_field_number(tag);
    if ((tag & 7) == kFixed64 && tag >> 3 <= 4) {
      *fields[(tag >> 3) - 1] = reader.fixed64();
    } else {
      reader.skip(tag, kMaxDepth - 2);
    }
  }
}

void merge_tensor(const std::uint8_t* message, Span span, DecodedTensor& tensor) {
  Reader reader(message, span);
  while (!reader.done()) {
    const std::uint32_t tag = reader.tag();
    check_field_number(tag);
    if (tag == kNameTag) {
      tensor.name = reader.length_delimited();
      if (!is_utf8(message + tensor.name.offset, tensor.name.size)) {
        malformed("tensor: name is not UTF-8");
      }
    } else if (tag == kDtypeTag) {
      tensor.dtype = static_cast<std::int32_t>(static_cast<std::uint32_t>(reader.varint()));
    } else if (tag == kShapeTag) {
      add_size(tensor, reader.varint());
    } else if (tag == kPackedShapeTag) {
      Reader sizes(message, reader.length_delimited());
      while (!sizes.done()) add_size(tensor, sizes.varint());
    } else if (tag == kDataTag) {
      tensor.data = reader.length_delimited();
    } else if (tag == kSharedTag) {
      tensor.shared = true;
      merge_slice(message, reader.length_delimited(), tensor.slice);
    } else {
      reader.skip(tag, kMaxDepth - 1);
    }
  }
}

// Returns the position of the first byte above 1, or `size`. The bytes of a block are or-ed and
// then tested at once, so that the loop over them has no early exit and can be vectorised.
std::size_t find_no_bool(const std::uint8_t* bytes, std::size_t size) {
  constexpr std::size_t kBlock = 4096;
  std::size_t at = 0;
  while (at < size) {
    const std::size_t end = at + std::min(kBlock, size - at);
    std::uint8_t seen = 0;
    for (std::size_t i = at; i < end; ++i) seen |= bytes[i];
    if (seen > 1) break;
    at = end;
  }
  while (at < size && bytes[at] <= 1) ++at;
  return at;
}

void check_bools(const std::uint8_t* bytes, std::size_t size) {
  const std::size_t at = find_no_bool(bytes, size);
  if (at == size) return;
  malformed("tensor: data: got byte " + std::to_string(bytes[at]) + " at position " +
            std::to_string(at) + " of a bool tensor, expected 0 or 1");
}

void check_meaning(const std::uint8_t* message, const DecodedTensor& tensor) {
  const DType* dtype = find_dtype(tensor.dtype);
  if (dtype == nullptr) {
    malformed("tensor: dtype: got " + std::to_string(tensor.dtype) + ", not a DataType");
  }
  if (tensor.rank > kMaxRank) {
    malformed("tensor: shape: got rank " + std::to_string(tensor.rank) + ", expected at most 32");
  }
  const std::int64_t bytes = payload_bytes(tensor.shape.data(), tensor.rank, dtype->itemsize);
  if (bytes < 0) malformed("tensor: shape: got a negative size or one that overflows");
  if (tensor.shared && tensor.data.size > 0) malformed("tensor: got both data and shared");
  const std::uint64_t got = tensor.shared ? tensor.slice.size : tensor.data.size;
  if (got != static_cast<std::uint64_t>(bytes)) {
    malformed(std::string("tensor: ") + (tensor.shared ? "shared" : "data") + ": got " +
              std::to_string(got) + " bytes, expected " + std::to_string(bytes));
  }
  if (tensor.shared) return;
  if (dtype->number == kBool) check_bools(message + tensor.data.offset, tensor.data.size);
}

class Splitter {
 public:
  Splitter(const std::uint8_t* message, const DecodeOptions& options)
      : message_(message), options_(options) {}

  void field(Reader& reader) {
    const std::size_t begin = reader.offset();
    const std::uint32_t tag = reader.tag();
    check_field_number(tag);
    if (tag == ((options_.field << 3) | kLengthDelimited)) {
      add_tensor(reader.length_delimited());
      return;
    }
    count_other();
    if (is_counted(tag)) {
      count_fields(reader.length_delimited());
    } else {
      reader.skip(tag, kMaxDepth);
    }
    add_rest({begin, reader.offset() - begin});
  }

  Decoded finish() { return std::move(decoded_); }

 private:
  bool is_counted(std::uint32_t tag) const {
    const auto& counted = options_.counted;
    return (tag & 7) == kLengthDelimited &&
           std::find(counted.begin(), counted.end(), tag >> 3) != counted.end();
  }

  void count_other() {
    if (++others_ > kMaxRestFields) {
      malformed("message: more than " + std::to_string(kMaxRestFields) + " fields");
    }
  }

  void count_fields(Span span) {
    Reader reader(message_, span);
    while (!reader.done()) {
      const std::uint32_t tag = reader.tag();
      check_field_number(tag);
      count_other();
      reader.skip(tag, kMaxDepth - 1);
    }
  }

  // Each tensor is checked at once, so that a hostile list of empty tensors costs no memory.
  void add_tensor(Span span) {
    if (decoded_.tensors.size() == options_.most) {
      malformed("message: more than " + std::to_string(options_.most) + " tensors");
    }
    decoded_.tensors.emplace_back();
    merge_tensor(message_, span, decoded_.tensors.back());
    check_meaning(message_, decoded_.tensors.back());
  }

  void add_rest(Span span) {
    auto& rest = decoded_.rest;
    if (!rest.empty() && rest.back().offset + rest.back().size == span.offset) {
      rest.back().size += span.size;
    } else {
      rest.push_back(span);
    }
  }

  const std::uint8_t* message_;
  const DecodeOptions& options_;
  Decoded decoded_;
  std::size_t others_ = 0;
};

}  // namespace

Decoded decode(const std::uint8_t* message, std::size_t size, const DecodeOptions& options) {
  if (size > kMaxMessageBytes) malformed("message: larger than 2**31 - 1 bytes");
  Splitter splitter(message, options);
  Reader reader(message, {0, size});
  while (!reader.done()) splitter.field(reader);
  return splitter.finish();
}

}  // namespace layertap
