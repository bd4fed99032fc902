// What the C library's malloc does with freed memory; see Note [Keeping pages].
#include "memory.h"

#include <climits>

#if defined(__GLIBC__)
#if __GLIBC_PREREQ(2, 33)  // for mallinfo2; the older mallinfo has sizes of type int
#define LAYERTAP_GLIBC_MALLOC
#include <malloc.h>
#endif
#endif

namespace layertap {

#ifdef LAYERTAP_GLIBC_MALLOC

bool keep_memory(std::uint64_t bound) {
  // mallopt takes an int; -1 is "never trim" (mallopt(3)).
  const int threshold = bound > INT_MAX ? -1 : static_cast<int>(bound);
  return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, threshold) == 1 &&
         mallopt(M_ARENA_MAX, 1) == 1;
}

bool map_large_blocks(std::uint64_t least) {
  // mallopt takes an int.
  return least <= INT_MAX && mallopt(M_MMAP_THRESHOLD, static_cast<int>(least)) == 1 &&
         mallopt(M_ARENA_MAX, 1) == 1;
}

bool trim_memory() {
  malloc_trim(0);
  return true;
}

std::optional<MallocUsage> malloc_usage() {
  const struct mallinfo2 info = mallinfo2();
  return MallocUsage{info.uordblks + info.hblkhd, info.fordblks};
}

#else

bool keep_memory(std::uint64_t) { return false; }

bool map_large_blocks(std::uint64_t) { return false; }

bool trim_memory() { return false; }

std::optional<MallocUsage> malloc_usage() { return std::nullopt; }

#endif

}  // namespace layertap
