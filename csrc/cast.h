// Casts and copies of contiguous runs of elements: [n] of one type to [n] of another.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace layertap {

// Reads n elements at `source`, writes n at `target`; neither needs alignment, no overlap.
using Run = void (*)(const std::uint8_t* source, std::uint8_t* target, std::size_t n);

// The run from one type to another, the fastest that this CPU has; nullptr for a cast that is not
// offered (every pair of floating-point types is, and every type to itself).
Run find_run(const DType& from, const DType& to);

}  // namespace layertap
