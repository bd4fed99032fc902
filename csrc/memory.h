// Controls what the C library's malloc does with freed memory; works on glibc only.
//
// Note [Keeping pages]
//   glibc maps each block of M_MMAP_THRESHOLD (32 MiB at most) or more separately, and unmaps it
//   when it is freed. So every large message is written to pages that the kernel must first find
//   and clear. Three settings together avoid that; docs/decisions/0007-the-allocator.md has the
//   effect of each.
//   - M_MMAP_MAX = 0: large blocks come from the heap.
//   - M_TRIM_THRESHOLD: the free end of the heap stays, up to a bound.
//   - M_ARENA_MAX = 1: threads share the main heap. The heaps of other arenas end at 64 MiB, and
//     what doesn't fit there is mapped whatever M_MMAP_MAX says (glibc's malloc/arena.c,
//     HEAP_MAX_SIZE, and sysmalloc in malloc/malloc.c).
//
// Note [Returning pages while models load]
//   To load a model takes large blocks of many sizes for a short time: copies of weights, and the
//   activations of a few passes. From one heap they leave gaps between small blocks that stay, and
//   glibc raises its threshold as they are freed, so that later ones come from the heap as well.
//   With a fixed, low threshold each has pages of its own, which are returned at once. See
//   docs/decisions/0007-the-allocator.md for what it saves and costs.
#pragma once

#include <cstdint>
#include <optional>

namespace layertap {

// Bytes of the heap and of mapped blocks.
struct MallocUsage {
  std::uint64_t used;
  std::uint64_t free;  // includes pages that were never touched or were returned to the system
};

// Makes malloc keep freed memory for the next block, up to `bound` bytes at the end of the heap.
// Returns false if malloc can't do that.
bool keep_memory(std::uint64_t bound);

// Makes malloc map each block of `least` bytes or more separately, and return it when it is freed,
// until `keep_memory` is called. Threads share the main heap from then on. Returns false if malloc
// can't do that.
bool map_large_blocks(std::uint64_t least);

// Returns every free page to the system. Returns false if malloc can't do that.
bool trim_memory();

// malloc's own figures; nothing if it has none.
std::optional<MallocUsage> malloc_usage();

}  // namespace layertap
