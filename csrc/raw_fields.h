// Messages whose payloads are `repeated bytes` at their top level: laid out, and split.
//
// Note [Raw fields]
//   head | tag len payload | tag len payload | ...
//
//   So are the messages of the Open Inference Protocol: what each payload is stands in the head,
//   which the ordinary protobuf code writes and reads; only the payloads are kept out of it. There
//   is no padding, since nothing in that protocol could carry it: payloads may stand anywhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "layout.h"
#include "wire.h"

namespace layertap {

// Lays tensors out as fields `field`, in their order; their names are not used. Throws
// std::invalid_argument for what can't be laid out.
Layout raw_layout(const std::vector<TensorSpec>& tensors, std::int64_t field,
                  std::int64_t head_size);

struct RawSplit {
  std::vector<Span> rest;      // in order, adjacent spans joined
  std::vector<Span> payloads;  // in order
};

// Splits a message into its length-delimited fields `field`, at most `most` of them, and all else.
// Agrees with upb on what is well-formed (Note [Agreement with upb]), but for the two limits. Throws
// std::invalid_argument; never reads outside [message, message + size).
RawSplit split_raw(const std::uint8_t* message, std::size_t size, std::uint32_t field,
                   std::size_t most);

}  // namespace layertap
