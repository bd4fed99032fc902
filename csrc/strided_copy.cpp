// One pass from a strided tensor to a dense one; see strided_copy.h.
//
// Note [Three ways through memory]
//   Dimensions that are evenly spaced together are joined first, so most tensors are left with one
//   or two. Then there are three cases:
//   1. The innermost dimension is dense (batch slices, padded rows): its runs are cast directly to
//      the target.
//   2. Another dimension is dense (channels_last read as [N, C, H, W], transposes): both dimensions
//      are processed in tiles that fit the L1 cache, so that each source line is read once and not
//      once per element.
//   3. No dimension is dense: elements are gathered into a tile, which is then cast to the target.
#include "strided_copy.h"

#include <algorithm>
#include <cstring>

#include "shape.h"
#include "transpose.h"

namespace layertap {

namespace {

// A tile has kTileRows x kTileColumns elements of at most 8 bytes, which is 16 KiB of the 32 KiB L1
// cache. 16 rows of 4 bytes are one cache line of the source.
constexpr std::size_t kTileRows = 16;
constexpr std::size_t kTileColumns = 128;

struct Dim {
  std::size_t size;             // elements
  std::ptrdiff_t source_stride; // bytes
  std::size_t target_stride;    // bytes
};

struct Dims {
  std::size_t rank = 0;
  Dim dim[kMaxRank];  // outermost first

  Dim& inner() { return dim[rank - 1]; }
  Dim take(std::size_t index) {
    const Dim taken = dim[index];
    std::copy(dim + index + 1, dim + rank, dim + index);
    --rank;
    return taken;
  }
};

// Drops dimensions of size 1 and joins evenly spaced ones; the rank is 0 for a single element.
Dims coalesce(const Source& source, std::size_t target_itemsize) {
  Dims dims;
  for (std::size_t i = 0; i < source.rank; ++i) {
    const auto size = static_cast<std::size_t>(source.shape[i]);
    const auto stride = static_cast<std::ptrdiff_t>(source.strides[i]);
    if (size == 1) continue;
    const bool joins = dims.rank > 0 &&
                       dims.inner().source_stride == stride * static_cast<std::ptrdiff_t>(size);
    if (joins) {
      dims.inner().size *= size;
      dims.inner().source_stride = stride;
    } else {
      dims.dim[dims.rank++] = {size, stride, 0};
    }
  }
  std::size_t target_stride = target_itemsize;
  for (std::size_t i = dims.rank; i-- > 0;) {
    dims.dim[i].target_stride = target_stride;
    target_stride *= dims.dim[i].size;
  }
  return dims;
}

// Calls body(source, target) for each index of `dims`.
template <class Body>
void for_each(const Dims& dims, const std::uint8_t* source, std::uint8_t* target, Body body) {
  std::size_t index[kMaxRank] = {};
  while (true) {
    body(source, target);
    std::size_t i = dims.rank;
    for (; i > 0; --i) {
      const Dim& dim = dims.dim[i - 1];
      if (++index[i - 1] < dim.size) {
        source += dim.source_stride;
        target += dim.target_stride;
        break;
      }
      index[i - 1] = 0;
      source -= dim.source_stride * static_cast<std::ptrdiff_t>(dim.size - 1);
      target -= dim.target_stride * (dim.size - 1);
    }
    if (i == 0) return;
  }
}

template <std::size_t kItemsize>
void gather(const std::uint8_t* source, std::ptrdiff_t stride, std::uint8_t* tile, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    std::memcpy(tile + i * kItemsize, source + static_cast<std::ptrdiff_t>(i) * stride, kItemsize);
  }
}

template <std::size_t kItemsize>
void gather_line(const Dim& line, const std::uint8_t* source, std::uint8_t* target, Run run) {
  std::uint8_t tile[kTileColumns * kItemsize];
  for (std::size_t at = 0; at < line.size; at += kTileColumns) {
    const std::size_t n = std::min(kTileColumns, line.size - at);
    gather<kItemsize>(source + static_cast<std::ptrdiff_t>(at) * line.source_stride,
                      line.source_stride, tile, n);
    run(tile, target + at * line.target_stride, n);
  }
}

// Copies a plane [row, column], where row is the dimension that is dense in the source.
template <std::size_t kItemsize>
void transpose_plane(const Dim& row, const Dim& column, const std::uint8_t* source,
                     std::uint8_t* target, Run run) {
  std::uint8_t tile[kTileRows * kTileColumns * kItemsize];
  for (std::size_t r = 0; r < row.size; r += kTileRows) {
    const std::size_t rows = std::min(kTileRows, row.size - r);
    for (std::size_t c = 0; c < column.size; c += kTileColumns) {
      const std::size_t columns = std::min(kTileColumns, column.size - c);
      transpose_tile<kItemsize>(
          source + r * kItemsize + static_cast<std::ptrdiff_t>(c) * column.source_stride,
          column.source_stride, tile, kTileColumns * kItemsize, rows, columns);
      std::uint8_t* corner = target + r * row.target_stride + c * column.target_stride;
      for (std::size_t i = 0; i < rows; ++i) {
        run(tile + i * kTileColumns * kItemsize, corner + i * row.target_stride, columns);
      }
    }
  }
}

template <std::size_t kItemsize>
void copy_dims(Dims dims, const std::uint8_t* source, std::uint8_t* target, Run run) {
  const Dim inner = dims.take(dims.rank - 1);
  constexpr auto kDense = static_cast<std::ptrdiff_t>(kItemsize);
  if (inner.source_stride == kDense) {
    for_each(dims, source, target,
             [&](const std::uint8_t* from, std::uint8_t* to) { run(from, to, inner.size); });
    return;
  }
  for (std::size_t i = 0; i < dims.rank; ++i) {
    if (dims.dim[i].source_stride == kDense) {
      const Dim row = dims.take(i);
      for_each(dims, source, target, [&](const std::uint8_t* from, std::uint8_t* to) {
        transpose_plane<kItemsize>(row, inner, from, to, run);
      });
      return;
    }
  }
  for_each(dims, source, target, [&](const std::uint8_t* from, std::uint8_t* to) {
    gather_line<kItemsize>(inner, from, to, run);
  });
}

}  // namespace

void strided_copy(const Source& source, std::uint8_t* target, std::size_t target_itemsize,
                  Run run) {
  for (std::size_t i = 0; i < source.rank; ++i) {
    if (source.shape[i] == 0) return;
  }
  Dims dims = coalesce(source, target_itemsize);
  if (dims.rank == 0) {
    run(source.data, target, 1);
    return;
  }
  switch (source.itemsize) {
    case 1:
      return copy_dims<1>(dims, source.data, target, run);
    case 2:
      return copy_dims<2>(dims, source.data, target, run);
    case 4:
      return copy_dims<4>(dims, source.data, target, run);
    default:
      return copy_dims<8>(dims, source.data, target, run);
  }
}

}  // namespace layertap
