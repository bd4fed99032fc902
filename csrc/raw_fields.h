// Messages whose payloads are `repeated bytes` at their top level: laid out, and split.
//
// Note [Raw fields]
//   head | tag len payload | tag len payload | ...
//
//   The messages of the Open Inference Protocol have this form. The head describes the payloads,
//   and ordinary protobuf code writes and reads it; only the payloads bypass that code. They are
//   not aligned, because that protocol has no field for padding.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "layout.h"
#include "wire.h"

namespace layertap {

// Lays tensors out as fields `field`, in order; their names are not used. Throws
// std::invalid_argument for tensors that can't be laid out.
Layout raw_layout(const std::vector<TensorSpec>& tensors, std::int64_t field,
                  std::int64_t head_size);

struct RawSplit {
  std::vector<Span> rest;      // in order, adjacent spans joined
  std::vector<Span> payloads;  // in order
};

// Splits a message into its length-delimited fields `field`, at most `most` of them, and all
// others. It agrees with upb on which messages are well-formed (Note [Agreement with upb]), except
// for the two limits. Throws std::invalid_argument. Never reads outside [message, message + size).
RawSplit split_raw(const std::uint8_t* message, std::size_t size, std::uint32_t field,
                   std::size_t most);

}  // namespace layertap
