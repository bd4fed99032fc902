// Messages with tensors, split into spans of the received bytes: no payload is copied.
//
// Note [Agreement with upb]
//   Which messages are well-formed, and what they mean, is as in upb, the parser of Python's
//   protobuf: a known field with another wire type is unknown, shape may be packed or not, the last
//   value of a repeated scalar wins, enums are varints cut to 32 bits, names must be UTF-8 each
//   time they occur, and groups nest 100 deep, minus the messages around them.
//
//   After parsing, the decoder is stricter on purpose. The dtype must be known, the rank at most
//   32, no size negative, and nothing may overflow. There must be data or a shared slice, not both,
//   of exactly the size that follows. Bools must be 0 or 1 (in numpy and torch the meaning of any
//   other byte is undefined). There may be at most kMaxRestFields other fields, including those
//   inside a counted field, and the message may have at most 2**31 - 1 bytes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "shape.h"
#include "wire.h"

namespace layertap {

// layertap.v1.SharedSlice.
struct SharedSlice {
  std::uint64_t region = 0;
  std::uint64_t generation = 0;
  std::uint64_t offset = 0;
  std::uint64_t size = 0;
};

struct DecodedTensor {
  Span name{0, 0};  // UTF-8
  std::int32_t dtype = 0;
  std::size_t rank = 0;  // counts on beyond kMaxRank, but only the first kMaxRank sizes are kept
  std::array<std::int64_t, kMaxRank> shape;
  Span data{0, 0};
  bool shared = false;  // the elements are in `slice`, and `data` is empty
  SharedSlice slice;
};

struct Decoded {
  std::vector<Span> rest;  // in order, adjacent spans joined
  std::vector<DecodedTensor> tensors;
};

// Which fields to read as tensors.
struct DecodeOptions {
  std::uint32_t field;  // each submessage of this number is a tensor
  std::size_t most;     // more tensors than this are refused
  // Length-delimited fields that hold a list, such as a list of images. The ordinary parser makes
  // an object for each member, so members are counted like fields of the message.
  std::vector<std::uint32_t> counted;
};

// Throws std::invalid_argument. Never reads outside [message, message + size).
Decoded decode(const std::uint8_t* message, std::size_t size, const DecodeOptions& options);

}  // namespace layertap
