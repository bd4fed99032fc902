// See resample.h.
//
// Note [Two CPUs]
//   The build targets the baseline CPU, as in cast.cpp, and each pass is written a second time for
//   AVX2. In its horizontal pass the four channels of a pixel are one vector, and two rows share each
//   weight.
//
// Note [Products of 16 bits]
//   A weight has up to 24 bits, and AVX2 multiplies numbers of 32 bits slowly. It multiplies pairs of
//   16 bits and adds both products fast. So a weight is divided: w = high * 2^15 + low, where low has
//   15 bits and high at most 9. The products of two pixels with their low parts are summed, and so
//   are those with their high parts; the result is high * 2^15 + low again. Sums wrap around at 32
//   bits in both, so it is the same number as that of the plain loop, which is Pillow's.
#include "resample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define LAYERTAP_X86 1
#include <immintrin.h>
#define LAYERTAP_INLINE inline __attribute__((always_inline))
#else
#define LAYERTAP_INLINE inline
#endif

namespace layertap {

namespace {

constexpr int kBits = 22;  // of the fraction of a weight
constexpr std::int32_t kHalf = 1 << (kBits - 1);
constexpr int kLowBits = 15;  // of the lower part of a weight
constexpr std::int32_t kLow = (1 << kLowBits) - 1;
constexpr std::size_t kBlock = 32;  // bytes whose sums fit in registers
constexpr double kPi = 3.14159265358979323846;

double hamming(double x) {
  if (x == 0.0) return 1.0;
  if (x >= 1.0) return 0.0;
  x *= kPi;
  // Pillow's constants are single-precision numbers.
  return std::sin(x) / x * (0.54f + 0.46f * std::cos(x));
}

double bicubic(double x) {
  constexpr double a = -0.5;
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

double sinc(double x) {
  if (x == 0.0) return 1.0;
  x *= kPi;
  return std::sin(x) / x;
}

double weight(Filter filter, double x) {
  switch (filter) {
    case Filter::kBox:
      return x > -0.5 && x <= 0.5 ? 1.0 : 0.0;
    case Filter::kBilinear:
      return std::abs(x) < 1.0 ? 1.0 - std::abs(x) : 0.0;
    case Filter::kHamming:
      return hamming(std::abs(x));
    case Filter::kBicubic:
      return bicubic(std::abs(x));
    case Filter::kLanczos:
      return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0;
  }
  return 0.0;
}

// How far the filter reaches to each side, in pixels of the larger image's grid.
double reach(Filter filter) {
  switch (filter) {
    case Filter::kBox:
      return 0.5;
    case Filter::kBilinear:
    case Filter::kHamming:
      return 1.0;
    case Filter::kBicubic:
      return 2.0;
    case Filter::kLanczos:
      return 3.0;
  }
  return 0.0;
}

std::int32_t fixed_point(double value) {
  const double scaled = value * (1 << kBits);
  return static_cast<std::int32_t>(value < 0 ? scaled - 0.5 : scaled + 0.5);
}

// The source pixels that one pixel of the result is made of, in one direction.
struct Taps {
  std::int64_t first;
  std::int64_t count;
  const std::int32_t* weights;
  // The parts of two weights each, the first one in the lower 16 bits; see Note [Products of 16 bits].
  // Of an odd number of weights, the last pair has one and 0.
  const std::uint32_t* low;
  const std::uint32_t* high;
};

// The taps of the pixels of the result from `begin` to `begin + count`.
class Direction {
 public:
  Direction(std::int64_t from, std::int64_t to, std::int64_t begin, std::int64_t count,
            Filter filter)
      : scale_(static_cast<double>(from) / static_cast<double>(to)),
        stretch_(std::max(scale_, 1.0)),
        support_(reach(filter) * stretch_),
        most_(static_cast<std::int64_t>(std::ceil(support_)) * 2 + 1),
        pairs_((most_ + 1) / 2) {
    weights_.resize(static_cast<std::size_t>(count * most_));
    low_.resize(static_cast<std::size_t>(count * pairs_));
    high_.resize(static_cast<std::size_t>(count * pairs_));
    bounds_.reserve(static_cast<std::size_t>(count));
    std::vector<double> shares(static_cast<std::size_t>(most_));
    for (std::int64_t i = 0; i < count; ++i) weigh(begin + i, from, filter, shares);
  }

  Taps operator[](std::int64_t i) const {
    const Bounds& bounds = bounds_[static_cast<std::size_t>(i)];
    return {bounds.first, bounds.count, weights_.data() + i * most_, low_.data() + i * pairs_,
            high_.data() + i * pairs_};
  }

  std::int64_t size() const { return static_cast<std::int64_t>(bounds_.size()); }

  // The source pixels that any of them needs: from first() up to last().
  std::int64_t first() const { return bounds_.front().first; }
  std::int64_t last() const { return bounds_.back().first + bounds_.back().count; }

  // The same taps in a source that begins with first().
  Direction from_first() const {
    Direction moved = *this;
    for (Bounds& bounds : moved.bounds_) bounds.first -= first();
    return moved;
  }

 private:
  struct Bounds {
    std::int64_t first, count;
  };

  void weigh(std::int64_t at, std::int64_t from, Filter filter, std::vector<double>& shares) {
    const double center = (static_cast<double>(at) + 0.5) * scale_;
    const double inverse = 1.0 / stretch_;
    const auto first = std::max<std::int64_t>(static_cast<std::int64_t>(center - support_ + 0.5), 0);
    const auto last = std::min(static_cast<std::int64_t>(center + support_ + 0.5), from);
    const auto count = static_cast<std::size_t>(last - first);
    double sum = 0.0;
    for (std::size_t i = 0; i < count; ++i) {
      const double place = static_cast<double>(first) + static_cast<double>(i);
      shares[i] = weight(filter, (place - center + 0.5) * inverse);
      sum += shares[i];
    }
    const auto index = static_cast<std::int64_t>(bounds_.size());
    std::int32_t* weights = weights_.data() + index * most_;
    std::uint32_t* low = low_.data() + index * pairs_;
    std::uint32_t* high = high_.data() + index * pairs_;
    for (std::size_t i = 0; i < count; ++i) {
      weights[i] = fixed_point(sum == 0.0 ? shares[i] : shares[i] / sum);
      const std::uint32_t shift = i % 2 == 0 ? 0 : 16;
      low[i / 2] |= static_cast<std::uint32_t>(weights[i] & kLow) << shift;
      high[i / 2] |= static_cast<std::uint32_t>(weights[i] >> kLowBits & 0xffff) << shift;
    }
    bounds_.push_back({first, last - first});
  }

  double scale_;    // source pixels for one pixel of the result
  double stretch_;  // of the filter, which is wider where the image becomes smaller
  double support_;
  std::int64_t most_;   // weights of a pixel
  std::int64_t pairs_;  // of these weights
  std::vector<Bounds> bounds_;
  std::vector<std::int32_t> weights_;
  std::vector<std::uint32_t> low_, high_;
};

LAYERTAP_INLINE std::uint8_t to_byte(std::int32_t sum) {
  return static_cast<std::uint8_t>(std::clamp(sum >> kBits, 0, 255));
}

// Rows of pixels; a row's pixels are adjacent.
template <typename Byte>
struct Rows {
  Byte* data;
  std::size_t stride;  // bytes

  Byte* operator[](std::int64_t i) const { return data + static_cast<std::size_t>(i) * stride; }
};

using SourceRows = Rows<const std::uint8_t>;
using TargetRows = Rows<std::uint8_t>;

template <std::size_t kChannels>
void horizontal_row(const std::uint8_t* source, const Direction& across, std::uint8_t* target) {
  for (std::int64_t x = 0; x < across.size(); ++x) {
    const Taps taps = across[x];
    const std::uint8_t* pixel = source + static_cast<std::size_t>(taps.first) * kChannels;
    std::int32_t sums[kChannels];
    for (std::size_t c = 0; c < kChannels; ++c) sums[c] = kHalf;
    for (std::int64_t i = 0; i < taps.count; ++i, pixel += kChannels) {
      for (std::size_t c = 0; c < kChannels; ++c) sums[c] += taps.weights[i] * pixel[c];
    }
    for (std::size_t c = 0; c < kChannels; ++c, ++target) *target = to_byte(sums[c]);
  }
}

template <std::size_t kChannels>
void horizontal_base(const SourceRows& source, const Direction& across, std::int64_t rows,
                     const TargetRows& target) {
  for (std::int64_t y = 0; y < rows; ++y) horizontal_row<kChannels>(source[y], across, target[y]);
}

LAYERTAP_INLINE void vertical_block(const SourceRows& source, const Taps& taps, std::size_t begin,
                                    std::size_t bytes, std::uint8_t* target) {
  std::int32_t sums[kBlock];
  for (std::size_t b = 0; b < bytes; ++b) sums[b] = kHalf;
  for (std::int64_t i = 0; i < taps.count; ++i) {
    const std::uint8_t* line = source[taps.first + i] + begin;
    for (std::size_t b = 0; b < bytes; ++b) sums[b] += taps.weights[i] * line[b];
  }
  for (std::size_t b = 0; b < bytes; ++b) target[begin + b] = to_byte(sums[b]);
}

LAYERTAP_INLINE void vertical_loop(const SourceRows& source, const Direction& down, std::size_t bytes,
                                   const TargetRows& target) {
  for (std::int64_t y = 0; y < down.size(); ++y) {
    std::size_t begin = 0;
    for (; begin + kBlock <= bytes; begin += kBlock) {
      vertical_block(source, down[y], begin, kBlock, target[y]);  // unrolled: the size is constant
    }
    vertical_block(source, down[y], begin, bytes - begin, target[y]);
  }
}

void vertical_base(const SourceRows& source, const Direction& down, std::size_t bytes,
                   const TargetRows& target) {
  vertical_loop(source, down, bytes, target);
}

#ifdef LAYERTAP_X86

#define LAYERTAP_AVX2 __attribute__((target("avx2")))

// Sums of products with the low and the high parts of weights; see Note [Products of 16 bits].
struct Sums {
  __m256i low, high;
};

// Adds the products of pairs of bytes, of which each is 16 bits wide, with a pair of weights.
LAYERTAP_AVX2 inline void add_products(Sums& sums, const __m256i& bytes, const __m256i& low,
                                       const __m256i& high) {
  sums.low = _mm256_add_epi32(sums.low, _mm256_madd_epi16(bytes, low));
  sums.high = _mm256_add_epi32(sums.high, _mm256_madd_epi16(bytes, high));
}

LAYERTAP_AVX2 inline __m256i rounded(const Sums& sums) {
  const __m256i whole = _mm256_add_epi32(sums.low, _mm256_slli_epi32(sums.high, kLowBits));
  return _mm256_srai_epi32(_mm256_add_epi32(whole, _mm256_set1_epi32(kHalf)), kBits);
}

LAYERTAP_AVX2 inline __m256i both(std::uint32_t pair) {
  return _mm256_set1_epi32(static_cast<std::int32_t>(pair));
}

LAYERTAP_AVX2 inline __m128i load16(const std::uint8_t* data) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
}

// Adds the products of 16 columns of two rows.
LAYERTAP_AVX2 inline void add_columns(Sums& left, Sums& right, const __m128i& upper,
                                      const __m128i& lower, const __m256i& low,
                                      const __m256i& high) {
  add_products(left, _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(upper, lower)), low, high);
  add_products(right, _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(upper, lower)), low, high);
}

LAYERTAP_AVX2 void vertical_block_avx2(const SourceRows& source, const Taps& taps, std::size_t begin,
                                       std::uint8_t* target) {
  Sums sums[kBlock / 8] = {};
  for (std::int64_t i = 0; i < taps.count; i += 2) {
    const __m256i low = both(taps.low[i / 2]), high = both(taps.high[i / 2]);
    const std::uint8_t* upper = source[taps.first + i] + begin;
    // The last of an odd number of rows has no other one; the weight for that is 0.
    const std::uint8_t* lower = i + 1 < taps.count ? source[taps.first + i + 1] + begin : upper;
    add_columns(sums[0], sums[1], load16(upper), load16(lower), low, high);
    add_columns(sums[2], sums[3], load16(upper + 16), load16(lower + 16), low, high);
  }
  // Saturation to 16 bits, then to 8 without a sign, clips as to_byte does. Packing works on each
  // half of a register; the last step puts the groups of four bytes into their order.
  const __m256i first = _mm256_packs_epi32(rounded(sums[0]), rounded(sums[1]));
  const __m256i second = _mm256_packs_epi32(rounded(sums[2]), rounded(sums[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes =
      _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, second), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + begin), bytes);
}

LAYERTAP_AVX2 void vertical_avx2(const SourceRows& source, const Direction& down, std::size_t bytes,
                                 const TargetRows& target) {
  for (std::int64_t y = 0; y < down.size(); ++y) {
    const Taps taps = down[y];
    std::size_t begin = 0;
    for (; begin + kBlock <= bytes; begin += kBlock) {
      vertical_block_avx2(source, taps, begin, target[y]);
    }
    vertical_block(source, taps, begin, bytes - begin, target[y]);
  }
}

// Returns two pixels of one row and two of another, each byte in 16 bits, the same channels of a row
// side by side.
LAYERTAP_AVX2 inline __m256i two_of_each(const std::uint8_t* upper, const std::uint8_t* lower) {
  std::int64_t first, second;
  std::memcpy(&first, upper, sizeof first);
  std::memcpy(&second, lower, sizeof second);
  const __m256i pixels =
      _mm256_blend_epi32(_mm256_set1_epi64x(first), _mm256_set1_epi64x(second), 0xf0);
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1));
  return _mm256_shuffle_epi8(pixels, order);
}

// Returns the same for one pixel of each row, with 0 in place of the others.
LAYERTAP_AVX2 inline __m256i one_of_each(const std::uint8_t* upper, const std::uint8_t* lower) {
  return _mm256_cvtepu8_epi32(_mm_unpacklo_epi32(_mm_loadu_si32(upper), _mm_loadu_si32(lower)));
}

// Calculates `kPairs` pairs of rows.
template <int kPairs>
LAYERTAP_AVX2 void horizontal_rows(const SourceRows& source, const Direction& across, std::int64_t y,
                                   const TargetRows& target) {
  for (std::int64_t x = 0; x < across.size(); ++x) {
    const Taps taps = across[x];
    const std::uint8_t* rows[2 * kPairs];
    for (int row = 0; row < 2 * kPairs; ++row) rows[row] = source[y + row] + taps.first * 4;
    Sums sums[kPairs] = {};
    std::int64_t i = 0;
    for (; i + 2 <= taps.count; i += 2) {
      const __m256i low = both(taps.low[i / 2]), high = both(taps.high[i / 2]);
      for (int pair = 0; pair < kPairs; ++pair) {
        const std::uint8_t* const* two = rows + 2 * pair;
        add_products(sums[pair], two_of_each(two[0] + i * 4, two[1] + i * 4), low, high);
      }
    }
    if (i < taps.count) {
      const __m256i low = both(taps.low[i / 2]), high = both(taps.high[i / 2]);
      for (int pair = 0; pair < kPairs; ++pair) {
        const std::uint8_t* const* two = rows + 2 * pair;
        add_products(sums[pair], one_of_each(two[0] + i * 4, two[1] + i * 4), low, high);
      }
    }
    for (int pair = 0; pair < kPairs; ++pair) {
      const __m256i whole = rounded(sums[pair]);
      const __m128i words =
          _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
      const __m128i bytes = _mm_packus_epi16(words, words);
      _mm_storeu_si32(target[y + 2 * pair] + x * 4, bytes);
      _mm_storeu_si32(target[y + 2 * pair + 1] + x * 4, _mm_srli_si128(bytes, 4));
    }
  }
}

LAYERTAP_AVX2 void horizontal_avx2(const SourceRows& source, const Direction& across, std::int64_t rows,
                                   const TargetRows& target) {
  std::int64_t y = 0;
  for (; y + 8 <= rows; y += 8) horizontal_rows<4>(source, across, y, target);
  for (; y + 2 <= rows; y += 2) horizontal_rows<1>(source, across, y, target);
  if (y < rows) horizontal_row<4>(source[y], across, target[y]);
}

bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2");
  return has;
}

#endif  // LAYERTAP_X86

void vertical(const SourceRows& source, const Direction& down, std::size_t bytes,
              const TargetRows& target) {
#ifdef LAYERTAP_X86
  if (has_avx2()) return vertical_avx2(source, down, bytes, target);
#endif
  vertical_base(source, down, bytes, target);
}

void horizontal(const SourceRows& source, std::size_t channels, const Direction& across,
                std::int64_t rows, const TargetRows& target) {
  if (channels == 1) return horizontal_base<1>(source, across, rows, target);
#ifdef LAYERTAP_X86
  if (has_avx2()) return horizontal_avx2(source, across, rows, target);
#endif
  horizontal_base<4>(source, across, rows, target);
}

void copy_window(const Pixels& source, const Resizing& resizing, std::uint8_t* target) {
  const auto channels = static_cast<std::size_t>(source.channels);
  const std::size_t bytes = static_cast<std::size_t>(resizing.columns) * channels;
  for (std::int64_t y = 0; y < resizing.rows; ++y, target += bytes) {
    const std::int64_t pixel = (resizing.top + y) * source.width + resizing.left;
    std::memcpy(target, source.data + static_cast<std::size_t>(pixel) * channels, bytes);
  }
}

}  // namespace

void resample(const Pixels& source, const Resizing& resizing, std::uint8_t* target) {
  if (resizing.height == source.height && resizing.width == source.width) {
    return copy_window(source, resizing, target);
  }
  const Direction across(source.width, resizing.width, resizing.left, resizing.columns,
                         resizing.filter);
  const Direction down(source.height, resizing.height, resizing.top, resizing.rows,
                       resizing.filter);
  const auto channels = static_cast<std::size_t>(source.channels);
  const std::size_t from = static_cast<std::size_t>(source.width) * channels;
  const std::size_t to = static_cast<std::size_t>(resizing.columns) * channels;
  if (resizing.vertical_first) {
    // All rows of the window, with the source columns that are needed.
    const std::size_t bytes = static_cast<std::size_t>(across.last() - across.first()) * channels;
    std::vector<std::uint8_t> between(static_cast<std::size_t>(resizing.rows) * bytes);
    const auto skipped = static_cast<std::size_t>(across.first()) * channels;
    vertical({source.data + skipped, from}, down, bytes, {between.data(), bytes});
    horizontal({between.data(), bytes}, channels, across.from_first(), resizing.rows, {target, to});
  } else {
    // All columns of the window, in the source rows that are needed.
    const std::int64_t rows = down.last() - down.first();
    std::vector<std::uint8_t> between(static_cast<std::size_t>(rows) * to);
    horizontal({source.data + static_cast<std::size_t>(down.first()) * from, from}, channels,
               across, rows, {between.data(), to});
    vertical({between.data(), to}, down.from_first(), to, {target, to});
  }
}

}  // namespace layertap
