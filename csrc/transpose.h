// Transposes of small tiles between a strided source and a tile in the L1 cache.
//
// Note [In registers]
//   A transpose element by element takes one load and one store for each. SSE2, which every x86-64
//   CPU has, can transpose 4 x 4 elements of 4 bytes or 8 x 8 of 2 bytes in registers. The edges of
//   a tile, other element sizes and other CPUs are handled element by element.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace layertap {

// Elements [rows, columns] of a tile. Source: rows are adjacent, columns `source_stride` bytes
// apart. Tile: columns are adjacent, rows `tile_stride` bytes apart.
template <std::size_t kItemsize>
inline void transpose_elements(const std::uint8_t* source, std::ptrdiff_t source_stride,
                               std::uint8_t* tile, std::size_t tile_stride, std::size_t rows,
                               std::size_t columns) {
  for (std::size_t c = 0; c < columns; ++c) {
    const std::uint8_t* line = source + static_cast<std::ptrdiff_t>(c) * source_stride;
    for (std::size_t r = 0; r < rows; ++r) {
      std::memcpy(tile + r * tile_stride + c * kItemsize, line + r * kItemsize, kItemsize);
    }
  }
}

// The side of the squares that transpose_square handles; 1 if it handles none.
template <std::size_t kItemsize>
inline constexpr std::size_t kSquare = 1;

template <std::size_t kItemsize>
inline void transpose_square(const std::uint8_t* source, std::ptrdiff_t source_stride,
                             std::uint8_t* tile, std::size_t) {
  std::memcpy(tile, source, kItemsize);
  static_cast<void>(source_stride);
}

#if defined(__SSE2__)

inline __m128i load_line(const std::uint8_t* source, std::ptrdiff_t stride, int line) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + line * stride));
}

inline void store_line(std::uint8_t* tile, std::size_t stride, std::size_t line, __m128i value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(tile + line * stride), value);
}

template <>
inline constexpr std::size_t kSquare<4> = 4;

template <>
inline void transpose_square<4>(const std::uint8_t* source, std::ptrdiff_t source_stride,
                                std::uint8_t* tile, std::size_t tile_stride) {
  __m128i line[4];
  for (int i = 0; i < 4; ++i) line[i] = load_line(source, source_stride, i);
  const __m128i low01 = _mm_unpacklo_epi32(line[0], line[1]);
  const __m128i low23 = _mm_unpacklo_epi32(line[2], line[3]);
  const __m128i high01 = _mm_unpackhi_epi32(line[0], line[1]);
  const __m128i high23 = _mm_unpackhi_epi32(line[2], line[3]);
  store_line(tile, tile_stride, 0, _mm_unpacklo_epi64(low01, low23));
  store_line(tile, tile_stride, 1, _mm_unpackhi_epi64(low01, low23));
  store_line(tile, tile_stride, 2, _mm_unpacklo_epi64(high01, high23));
  store_line(tile, tile_stride, 3, _mm_unpackhi_epi64(high01, high23));
}

template <>
inline constexpr std::size_t kSquare<2> = 8;

template <>
inline void transpose_square<2>(const std::uint8_t* source, std::ptrdiff_t source_stride,
                                std::uint8_t* tile, std::size_t tile_stride) {
  __m128i line[8];
  __m128i pair[8];
  for (int i = 0; i < 8; ++i) line[i] = load_line(source, source_stride, i);
  for (int i = 0; i < 4; ++i) {
    pair[i] = _mm_unpacklo_epi16(line[2 * i], line[2 * i + 1]);
    pair[i + 4] = _mm_unpackhi_epi16(line[2 * i], line[2 * i + 1]);
  }
  for (int half = 0; half < 2; ++half) {
    const __m128i* p = pair + 4 * half;
    std::uint8_t* to = tile + static_cast<std::size_t>(4 * half) * tile_stride;
    const __m128i low03 = _mm_unpacklo_epi32(p[0], p[1]);
    const __m128i low47 = _mm_unpacklo_epi32(p[2], p[3]);
    const __m128i high03 = _mm_unpackhi_epi32(p[0], p[1]);
    const __m128i high47 = _mm_unpackhi_epi32(p[2], p[3]);
    store_line(to, tile_stride, 0, _mm_unpacklo_epi64(low03, low47));
    store_line(to, tile_stride, 1, _mm_unpackhi_epi64(low03, low47));
    store_line(to, tile_stride, 2, _mm_unpacklo_epi64(high03, high47));
    store_line(to, tile_stride, 3, _mm_unpackhi_epi64(high03, high47));
  }
}

#endif  // __SSE2__

template <std::size_t kItemsize>
inline void transpose_tile(const std::uint8_t* source, std::ptrdiff_t source_stride,
                           std::uint8_t* tile, std::size_t tile_stride, std::size_t rows,
                           std::size_t columns) {
  constexpr std::size_t kSide = kSquare<kItemsize>;
  const std::size_t square_rows = kSide > 1 ? rows - rows % kSide : 0;
  const std::size_t square_columns = kSide > 1 ? columns - columns % kSide : 0;
  for (std::size_t c = 0; c < square_columns; c += kSide) {
    const std::uint8_t* line = source + static_cast<std::ptrdiff_t>(c) * source_stride;
    for (std::size_t r = 0; r < square_rows; r += kSide) {
      transpose_square<kItemsize>(line + r * kItemsize, source_stride,
                                  tile + r * tile_stride + c * kItemsize, tile_stride);
    }
  }
  transpose_elements<kItemsize>(
      source + static_cast<std::ptrdiff_t>(square_columns) * source_stride, source_stride,
      tile + square_columns * kItemsize, tile_stride, square_rows, columns - square_columns);
  transpose_elements<kItemsize>(source + square_rows * kItemsize, source_stride,
                                tile + square_rows * tile_stride, tile_stride, rows - square_rows,
                                columns);
}

}  // namespace layertap
