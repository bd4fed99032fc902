// Messages whose payloads are `repeated bytes` at their top level; see Note [Raw fields].
#include "raw_fields.h"

#include <stdexcept>
#include <string>
#include <utility>

namespace layertap {

namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

TensorSlot raw_slot(const TensorSpec& spec, std::uint32_t field, std::size_t offset) {
  // Lay it out by itself, which checks it and gives its size.
  const Layout alone({spec}, field, 0);
  TensorSlot slot = alone.slots()[0];
  slot.header_offset = offset;
  slot.header.clear();
  append_tag(slot.header, field, kLengthDelimited);
  append_varint(slot.header, slot.payload_size);
  slot.payload_offset = offset + slot.header.size();
  return slot;
}

void add_span(std::vector<Span>& spans, Span span) {
  if (!spans.empty() && spans.back().offset + spans.back().size == span.offset) {
    spans.back().size += span.size;
  } else {
    spans.push_back(span);
  }
}

}  // namespace

Layout raw_layout(const std::vector<TensorSpec>& tensors, std::int64_t field,
                  std::int64_t head_size) {
  // A layout without tensors checks the field and the head.
  Layout empty({}, field, head_size);
  std::size_t offset = empty.head_size();
  std::vector<TensorSlot> slots;
  slots.reserve(tensors.size());
  for (const TensorSpec& spec : tensors) {
    slots.push_back(raw_slot(spec, static_cast<std::uint32_t>(field), offset));
    offset = slots.back().payload_offset + slots.back().payload_size;
    if (offset > kMaxMessageBytes) refuse("message: larger than 2**31 - 1 bytes");
  }
  return Layout(empty.head_size(), offset, std::move(slots));
}

RawSplit split_raw(const std::uint8_t* message, std::size_t size, std::uint32_t field,
                   std::size_t most) {
  if (size > kMaxMessageBytes) refuse("message: larger than 2**31 - 1 bytes");
  RawSplit split;
  std::size_t others = 0;
  Reader reader(message, {0, size});
  while (!reader.done()) {
    const std::size_t begin = reader.offset();
    const std::uint32_t tag = reader.tag();
    if (tag >> 3 == 0) refuse("message: field number 0");
    if (tag == ((field << 3) | kLengthDelimited)) {
      // Checked before it is kept, so that a hostile list of empty payloads costs no memory.
      if (split.payloads.size() == most) {
        refuse("message: more than " + std::to_string(most) + " of field " +
               std::to_string(field));
      }
      split.payloads.push_back(reader.length_delimited());
    } else {
      if (++others > kMaxRestFields) {
        refuse("message: more than " + std::to_string(kMaxRestFields) + " fields");
      }
      reader.skip(tag, kMaxDepth);
      add_span(split.rest, {begin, reader.offset() - begin});
    }
  }
  return split;
}

}  // namespace layertap
