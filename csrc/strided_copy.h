// One pass from a strided tensor to a dense one, cast on the way.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cast.h"

namespace layertap {

// A tensor as it stands in memory.
struct Source {
  const std::uint8_t* data;      // the element whose indices are all 0
  std::size_t rank;              // at most kMaxRank
  const std::int64_t* shape;     // [rank] elements, none negative
  const std::int64_t* strides;   // [rank] bytes; negative and 0 are fine
  std::size_t itemsize;          // bytes
};

// Writes the elements to `target` in C order, `target_itemsize` bytes each, through `run`.
void strided_copy(const Source& source, std::uint8_t* target, std::size_t target_itemsize, Run run);

}  // namespace layertap
