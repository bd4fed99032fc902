// Protobuf's wire format; see wire.h.
#include "wire.h"

#include <array>
#include <cstring>
#include <stdexcept>

namespace layertap {

namespace {

[[noreturn]] void malformed(const char* what) { throw std::invalid_argument(what); }

// The number of bytes after a lead byte, and the range of the first; 0 for an invalid lead byte.
struct Utf8Lead {
  std::size_t tail;
  std::uint8_t low;
  std::uint8_t high;
};

Utf8Lead utf8_lead(std::uint8_t lead) {
  if (lead >= 0xc2 && lead <= 0xdf) return {1, 0x80, 0xbf};
  if (lead == 0xe0) return {2, 0xa0, 0xbf};
  if (lead == 0xed) return {2, 0x80, 0x9f};
  if (lead >= 0xe1 && lead <= 0xef) return {2, 0x80, 0xbf};
  if (lead == 0xf0) return {3, 0x90, 0xbf};
  if (lead >= 0xf1 && lead <= 0xf3) return {3, 0x80, 0xbf};
  if (lead == 0xf4) return {3, 0x80, 0x8f};
  return {0, 0, 0};
}

}  // namespace

void append_varint(std::string& out, std::uint64_t value) {
  while (value >= 0x80) {
    out.push_back(static_cast<char>((value & 0x7f) | 0x80));
    value >>= 7;
  }
  out.push_back(static_cast<char>(value));
}

void append_tag(std::string& out, std::uint32_t field, WireType type) {
  append_varint(out, (static_cast<std::uint64_t>(field) << 3) | type);
}

bool is_utf8(const std::uint8_t* bytes, std::size_t size) {
  std::size_t at = 0;
  while (at < size) {
    if (bytes[at] < 0x80) {
      ++at;
      continue;
    }
    const Utf8Lead lead = utf8_lead(bytes[at]);
    if (lead.tail == 0 || lead.tail >= size - at) return false;
    if (bytes[at + 1] < lead.low || bytes[at + 1] > lead.high) return false;
    for (std::size_t i = 2; i <= lead.tail; ++i) {
      if ((bytes[at + i] & 0xc0) != 0x80) return false;
    }
    at += lead.tail + 1;
  }
  return true;
}

std::uint64_t Reader::varint_of(int max_bytes) {
  std::uint64_t value = 0;
  for (int i = 0; i < max_bytes; ++i) {
    if (remaining_ == 0) malformed("message: truncated in a varint");
    const std::uint64_t byte = message_[offset_];
    advance(1);
    value |= (byte & 0x7f) << (7 * i);  // the 10th byte is shifted by 63 and loses its upper bits
    if (byte < 0x80) return value;
  }
  malformed("message: varint with too many bytes");
}

std::uint32_t Reader::tag() {
  const std::uint64_t value = varint_of(5);
  if (value > 0xffffffffu) malformed("message: tag of more than 32 bits");
  return static_cast<std::uint32_t>(value);
}

std::uint64_t Reader::fixed64() {
  advance(8);
  std::uint64_t value = 0;
  for (int i = 0; i < 8; ++i) {
    value |= static_cast<std::uint64_t>(message_[offset_ - 8 + i]) << (8 * i);
  }
  return value;
}

Span Reader::length_delimited() {
  const std::uint64_t size = varint_of(5);
  if (size > kMaxMessageBytes || size > remaining_) malformed("message: length past the end");
  const Span span{offset_, static_cast<std::size_t>(size)};
  advance(span.size);
  return span;
}

void Reader::advance(std::size_t size) {
  if (size > remaining_) malformed("message: truncated");
  offset_ += size;
  remaining_ -= size;
}

void Reader::skip(std::uint32_t tag, int depth) {
  switch (tag & 7) {
    case kVarint:
      varint();
      return;
    case kFixed64:
      advance(8);
      return;
    case kLengthDelimited:
      length_delimited();
      return;
    case kStartGroup:
      skip_group(tag >> 3, depth);
      return;
    case kFixed32:
      advance(4);
      return;
    case kEndGroup:
      malformed("message: end of a group that was not begun");
    default:
      malformed("message: invalid wire type");
  }
}

// A loop with its own stack, so that nesting uses no call stack. Field number 0 is accepted inside
// a group, as in upb.
void Reader::skip_group(std::uint32_t field, int depth) {
  std::array<std::uint32_t, kMaxDepth> open;
  int level = 0;
  if (depth < 1) malformed("message: groups nested too deep");
  open[level++] = field;
  while (level > 0) {
    const std::uint32_t inner = tag();
    if ((inner & 7) == kStartGroup) {
      if (level >= depth || level >= kMaxDepth) malformed("message: groups nested too deep");
      open[level++] = inner >> 3;
    } else if ((inner & 7) == kEndGroup) {
      if (open[--level] != inner >> 3) malformed("message: group ended by another's end");
    } else {
      skip(inner, 0);
    }
  }
}

}  // namespace layertap
