// Casts and copies of contiguous runs of elements: [n] of one type to [n] of another.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace layertap {

// Reads n elements at `source` and writes n at `target`. No alignment needed; no overlap allowed.
using Run = void (*)(const std::uint8_t* source, std::uint8_t* target, std::size_t n);

// Returns the fastest cast from one type to another on this CPU; nullptr if there is none. There is
// one for every pair of floating-point types, and for every type to itself.
Run find_run(const DType& from, const DType& to);

}  // namespace layertap
