// Shapes: sizes outermost first, elements in C (row-major) order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

namespace layertap {

inline constexpr std::size_t kMaxRank = 32;

// Returns the bytes of a dense tensor, or -1 if a size is negative or sizes x itemsize overflow an
// int64.
//
// Sizes of zero are ignored for the overflow, so [0, 2**62, 4] is refused. numpy and torch refuse
// such a shape, too.
inline std::int64_t payload_bytes(const std::int64_t* shape, std::size_t rank,
                                  std::size_t itemsize) {
  constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
  std::int64_t bytes = static_cast<std::int64_t>(itemsize);
  bool empty = false;
  for (std::size_t i = 0; i < rank; ++i) {
    if (shape[i] < 0) return -1;
    if (shape[i] == 0) {
      empty = true;
    } else {
      if (bytes > kMax / shape[i]) return -1;
      bytes *= shape[i];
    }
  }
  return empty ? 0 : bytes;
}

}  // namespace layertap
