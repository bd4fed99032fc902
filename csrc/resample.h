// Resizes 8-bit images and keeps a window of the result, with the pixels of Pillow's resize.
//
// Note [Pillow's arithmetic]
//   Each pixel of the result is a weighted sum of the source pixels around its place, in one
//   direction first, then in the other. Pillow calculates the weights in double precision, scales
//   them by 2^22, rounds them to integers, and rounds to 8 bits after each direction (Pillow's
//   src/libImaging/Resample.c, the functions for 8 bits per channel). The same steps in the same
//   order give the same pixels. A compiler may contract a multiplication and an addition on some
//   CPUs, so layertap compares images with Pillow before it relies on it (models/exact_images.py).
//
// Note [Only what is kept]
//   Pillow resizes the whole image, and a crop discards much of it: of 256 x 341 pixels of a 4:3
//   photograph 224 x 224 remain. Here pixels that the window doesn't need are never calculated.
#pragma once

#include <cstdint>

namespace layertap {

enum class Filter { kBox, kBilinear, kHamming, kBicubic, kLanczos };

// An image in memory, [height, width, channels] contiguous.
struct Pixels {
  const std::uint8_t* data;
  std::int64_t height;    // from 1
  std::int64_t width;     // from 1
  std::int64_t channels;  // 1 or 4
};

// What becomes of an image: it is resized, and a rectangle of the result is kept.
struct Resizing {
  std::int64_t height, width;  // of the whole resized image, from 1
  std::int64_t top, left;      // of the window in it
  std::int64_t rows, columns;  // of the window, from 1
  Filter filter;
  bool vertical_first;  // the order of the two directions
};

// Writes the window to `target`, [rows, columns, channels] contiguous.
void resample(const Pixels& source, const Resizing& resizing, std::uint8_t* target);

}  // namespace layertap
