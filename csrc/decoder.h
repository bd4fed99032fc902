// Messages with tensors, split into spans of the received bytes: no payload is copied.
//
// Note [Agreement with upb]
//   Well-formedness and meaning are those of upb, the parser behind Python's protobuf: a known
//   field of another wire type is unknown, shape may be packed or not, the last of a repeated
//   scalar wins, enums are varints cut to 32 bits, names are UTF-8 each time they occur, groups
//   nest 100 deep less the messages around them. Stricter on purpose, after the parse: dtype has a
//   row, rank <= 32, no negative size, no overflow, data or a shared slice of exactly the size that
//   follows, not both, bools of 0 and 1 only (numpy and torch leave undefined what another byte
//   means), at most kMaxRestFields other fields, those inside a counted field included, and a message of
//   at most 2**31 - 1 bytes.
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
  std::size_t rank = 0;  // counts on past the cap; only the first kMaxRank sizes are kept
  std::array<std::int64_t, kMaxRank> shape;
  Span data{0, 0};
  bool shared = false;  // the elements stand in `slice`, and `data` is empty
  SharedSlice slice;
};

struct Decoded {
  std::vector<Span> rest;  // in order, adjacent spans joined
  std::vector<DecodedTensor> tensors;
};

// What to read as tensors.
struct DecodeOptions {
  std::uint32_t field;  // each submessage of this number is a tensor
  std::size_t most;     // more tensors than this are refused
  // Length-delimited fields that hold a list, such as one of images: the ordinary parser makes an
  // object of each of its members too, so these count as fields of the message do.
  std::vector<std::uint32_t> counted;
};

// Throws std::invalid_argument; never reads outside [message, message + size).
Decoded decode(const std::uint8_t* message, std::size_t size, const DecodeOptions& options);

}  // namespace layertap
