// The place of each byte of a message with tensors, which is known before the tensors' values.
//
// Note [Layout of a message]
//   head | tag len name dtype shape padding tag len payload | tag len name ... payload | ...
//
//   The head is the ordinary protobuf bytes of every other field. A tensor's payload comes last in
//   its submessage and starts at an offset of 16 modulo 64: CPython puts the data of a large bytes
//   object at 48 modulo 64, so the payload lands on a 64-byte boundary.
//
// Note [Payloads apart]
//   The payloads may instead be in a separate buffer, each at a multiple of 64. A tensor's
//   submessage then ends with a SharedSlice: size and offset, then region and generation, which are
//   only known once there is a buffer. All of these are fixed64, so their values don't change the
//   layout.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "dtype.h"

namespace layertap {

inline constexpr std::size_t kPayloadAlignment = 64;
inline constexpr std::size_t kPayloadResidue = 16;

struct TensorSpec {
  std::string name;  // UTF-8
  std::int64_t dtype;
  std::vector<std::int64_t> shape;
};

struct TensorSlot {
  const DType* dtype;
  std::vector<std::int64_t> shape;
  std::size_t header_offset;  // in the message; the header ends where the payload begins
  std::string header;
  std::size_t payload_offset;  // in the message, or in the separate buffer
  std::size_t payload_size;    // bytes
};

class Layout {
 public:
  // Throws std::invalid_argument for tensors that can't be laid out.
  Layout(const std::vector<TensorSpec>& tensors, std::int64_t field, std::int64_t head_size,
         bool apart = false);

  // For slots that were laid out elsewhere; see Note [Raw fields].
  Layout(std::size_t head_size, std::size_t nbytes, std::vector<TensorSlot> slots)
      : head_size_(head_size), nbytes_(nbytes), slots_(std::move(slots)) {}

  std::size_t head_size() const { return head_size_; }
  std::size_t nbytes() const { return nbytes_; }
  bool apart() const { return apart_; }
  // Bytes of the separate buffer for payloads; 0 if they are in the message.
  std::size_t payload_nbytes() const { return payload_nbytes_; }
  const std::vector<TensorSlot>& slots() const { return slots_; }

  // Writes everything but the head and the payloads into `message`, of nbytes().
  void write_headers(std::uint8_t* message) const;

  // Completes the references to payloads in a separate buffer.
  void write_region(std::uint8_t* message, std::uint64_t region, std::uint64_t generation) const;

 private:
  void add_slot(const TensorSpec& spec, std::uint32_t field);

  std::size_t head_size_;
  std::size_t nbytes_;
  bool apart_ = false;
  std::size_t payload_nbytes_ = 0;
  std::vector<TensorSlot> slots_;
};

}  // namespace layertap
