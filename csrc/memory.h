// What the C library's malloc does with freed memory; works on glibc only.
//
// Note [Keeping pages]
//   glibc maps a block of M_MMAP_THRESHOLD (32 MiB at most) or more anew each time and unmaps it
//   when it is freed, so that every large message is written into pages that the kernel must first
//   find and clear. Three settings together end that; docs/decisions/0007-the-allocator.md has what
//   each is worth.
//   - M_MMAP_MAX = 0: large blocks come from the heap.
//   - M_TRIM_THRESHOLD: the free end of the heap stays, up to a bound.
//   - M_ARENA_MAX = 1: threads share the main heap. The heaps of other arenas end at 64 MiB, and
//     what doesn't fit there is mapped whatever M_MMAP_MAX says (glibc's malloc/arena.c,
//     HEAP_MAX_SIZE, and sysmalloc in malloc/malloc.c).
#pragma once

#include <cstdint>
#include <optional>

namespace layertap {

// Bytes of the heap and of mapped blocks.
struct MallocUsage {
  std::uint64_t used;
  std::uint64_t free;  // pages that were never touched or were given back count as well
};

// Has freed memory kept for the next block, up to `bound` bytes at the heap's end. False where
// malloc can't be told to.
bool keep_memory(std::uint64_t bound);

// Gives every free page back to the system. False where malloc can't be told to.
bool trim_memory();

// What malloc says of itself; nothing where it doesn't.
std::optional<MallocUsage> malloc_usage();

}  // namespace layertap
