// Protobuf's wire format: tags, varints and a bounded reader.
//
// Note [Total on hostile bytes]
//   A Reader is a cursor and a count of bytes that remain. Lengths are compared with what remains
//   before anything moves, and no pointer past the end is ever formed. Limits are upb's: a tag
//   takes at most 5 bytes and 32 bits, a length at most 5 bytes and 31 bits, any other varint at
//   most 10 bytes, of which bits over 64 are dropped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace layertap {

inline constexpr std::uint64_t kMaxMessageBytes = 0x7fffffff;
inline constexpr std::uint32_t kMaxFieldNumber = (1u << 29) - 1;

// Fields of a message that are left to an ordinary parser. It takes about a hundred bytes of memory
// for an empty submessage of two, so that a list of them would cost it forty times the message.
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

// Whether bytes are UTF-8 as protobuf wants it: no surrogates, no overlong forms, <= U+10FFFF.
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

  // Passes the value of a field whose tag was just read; a group is passed with everything in it.
  // `depth` is how many groups may nest here.
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
