// Protobuf's wire format: tags, varints and a bounded reader.
//
// Note [Total on hostile bytes]
//   A Reader is a cursor and the number of remaining bytes. Lengths are compared with that number
//   before the cursor moves, and no pointer past the end is ever formed. The limits are upb's: a
//   tag has at most 5 bytes and 32 bits, a length at most 5 bytes and 31 bits, any other varint at
//   most 10 bytes, and bits above 64 are dropped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace layertap {

inline constexpr std::uint64_t kMaxMessageBytes = 0x7fffffff;
inline constexpr std::uint32_t kMaxFieldNumber = (1u << 29) - 1;

// Maximum number of fields that are left to an ordinary parser. The parser takes about a hundred
// bytes of memory for an empty submessage of two bytes, so a list of them would cost forty times
// the message.
inline constexpr std::size_t kMaxRestFields = 1 << 16;

inline constexpr int kMaxDepth = 100;  // nested messages and groups, the top level's limit in upb

enum WireType : std::uint32_t {
  kVarint = 0,
  kFixed64 = 1,
  kLengthDelimited = 2,
  kStartGroup = 3,
  kEndGroup = 4,
  kFixed32 = 5,
};

constexpr std::size_t varint_size(std::uint64_t value) {
  std::size_t size = 1;
  while (value >= 0x80) {
    value >>= 7;
    ++size;
  }
  return size;
}

void append_varint(std::string& out, std::uint64_t value);
void append_tag(std::string& out, std::uint32_t field, WireType type);

// Returns whether bytes are UTF-8 by protobuf's rules: no surrogates or overlong forms, <=
// U+10FFFF.
bool is_utf8(const std::uint8_t* bytes, std::size_t size);

struct Span {
  std::size_t offset;  // from the start of the message
  std::size_t size;
};

// A cursor over [offset, offset + size) of one message. Every method throws std::invalid_argument
// on malformed bytes.
class Reader {
 public:
  Reader(const std::uint8_t* message, Span span)
      : message_(message), offset_(span.offset), remaining_(span.size) {}

  bool done() const { return remaining_ == 0; }
  std::size_t offset() const { return offset_; }

  std::uint32_t tag();
  std::uint64_t varint() { return varint_of(10); }
  std::uint64_t fixed64();
  Span length_delimited();

  // Skips the value of a field whose tag was just read; a group is skipped as a whole. `depth` is
  // how deep groups may be nested here.
  void skip(std::uint32_t tag, int depth);

 private:
  std::uint64_t varint_of(int max_bytes);
  void advance(std::size_t size);
  void skip_group(std::uint32_t field, int depth);

  const std::uint8_t* message_;
  std::size_t offset_;
  std::size_t remaining_;
};

}  // namespace layertap
