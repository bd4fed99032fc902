// Copies a strided tensor to a dense one and casts it, in one pass.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cast.h"

namespace layertap {

// A tensor in memory.
struct Source {
  const std::uint8_t* data;      // the element whose indices are all 0
  std::size_t rank;              // at most kMaxRank
  const std::int64_t* shape;     // [rank] elements, none negative
  const std::int64_t* strides;   // [rank] bytes; may be negative or 0
  std::size_t itemsize;          // bytes
};

// Writes the elements to `target` in C order, `target_itemsize` bytes each, through `run`.
void strided_copy(const Source& source, std::uint8_t* target, std::size_t target_itemsize, Run run);

}  // namespace layertap
