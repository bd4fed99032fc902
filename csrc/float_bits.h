// Conversions of one floating-point element, as bit patterns, in code that compilers vectorise.
//
// Every cast rounds once, to nearest even. NaN stays NaN, keeps its sign and the upper bits of its
// payload, and becomes quiet. x86's own instructions do the same, so all paths agree bit for bit.
//
// Note [Rounding to odd]
//   Converting from 64 to 16 bits through 32 bits would round twice. So if the first step is
//   inexact, it takes the neighbour whose last bit is 1 instead of the nearest. That bit represents
//   everything that was cut off, and the second step rounds as if it saw all 64 bits (Boldo and
//   Melquiond, 2008: this needs two more bits of precision than the target, and 24 > 11 + 2).
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"

#if defined(__GNUC__)
#define LAYERTAP_INLINE inline __attribute__((always_inline))
#else
#define LAYERTAP_INLINE inline
#endif

namespace layertap {

template <class To, class From>
LAYERTAP_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

LAYERTAP_INLINE std::uint16_t half_from_single(float value) {
  const std::uint32_t bits = bits_as<std::uint32_t>(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // Move the exponent from bias 127 to 15, then round. A carry out of the mantissa is correct.
  const std::uint32_t normal = (magnitude - 0x37fff001u + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2**-14 the addition rounds: the last bit of 0.5 is where a subnormal half has its last
  // bit.
  const float shifted = bits_as<float>(magnitude) + 0.5f;
  const std::uint32_t subnormal = bits_as<std::uint32_t>(shifted) - 0x3f000000u;
  const std::uint32_t nan = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  std::uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? nan : half;
  return static_cast<std::uint16_t>(half | sign);
}

LAYERTAP_INLINE float single_from_half(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
  const std::uint32_t shifted = static_cast<std::uint32_t>(half & 0x7fffu) << 13;
  const std::uint32_t normal = shifted + 0x38000000u;
  const std::uint32_t special = shifted + 0x70000000u;
  const std::uint32_t nan = special | 0x00400000u;
  // The mantissa of a subnormal with an exponent of 2**-14, minus 2**-14, is its value.
  const float scaled = bits_as<float>(shifted + 0x38800000u) - bits_as<float>(0x38800000u);
  std::uint32_t bits = shifted < 0x00800000u ? bits_as<std::uint32_t>(scaled) : normal;
  bits = shifted >= 0x0f800000u ? special : bits;
  bits = shifted > 0x0f800000u ? nan : bits;
  return bits_as<float>(bits | sign);
}

LAYERTAP_INLINE std::uint16_t brain_from_single(float value) {
  const std::uint32_t bits = bits_as<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t nan = (bits >> 16) | 0x40u;
  return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

LAYERTAP_INLINE float single_from_brain(std::uint16_t brain) {
  const std::uint32_t bits = static_cast<std::uint32_t>(brain) << 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return bits_as<float>(nan ? bits | 0x00400000u : bits);
}

LAYERTAP_INLINE float single_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  const std::uint32_t bits = bits_as<std::uint32_t>(nearest);
  const double back = static_cast<double>(nearest);
  // NaN is unequal to itself, but neither below nor above, so it is not changed.
  const double wanted = value < 0 ? -value : value;
  const double got = back < 0 ? -back : back;
  const std::uint32_t up = got < wanted ? 1u : 0u;
  const std::uint32_t down = got > wanted ? 1u : 0u;
  const std::uint32_t even = ~bits & 1u;
  return bits_as<float>(bits + (up & even) - (down & even));
}

// Load<kind> widens an element to float (float64 stays double); Store<kind> rounds to an element.
template <Kind kind>
struct Element;

template <>
struct Element<Kind::kFloat32> {
  using Bits = float;
  LAYERTAP_INLINE static float load(float value) { return value; }
  LAYERTAP_INLINE static float store(float value) { return value; }
  LAYERTAP_INLINE static float store(double value) { return static_cast<float>(value); }
};

template <>
struct Element<Kind::kFloat16> {
  using Bits = std::uint16_t;
  LAYERTAP_INLINE static float load(Bits bits) { return single_from_half(bits); }
  LAYERTAP_INLINE static Bits store(float value) { return half_from_single(value); }
  LAYERTAP_INLINE static Bits store(double value) { return store(single_to_odd(value)); }
};

template <>
struct Element<Kind::kBfloat16> {
  using Bits = std::uint16_t;
  LAYERTAP_INLINE static float load(Bits bits) { return single_from_brain(bits); }
  LAYERTAP_INLINE static Bits store(float value) { return brain_from_single(value); }
  LAYERTAP_INLINE static Bits store(double value) { return store(single_to_odd(value)); }
};

template <>
struct Element<Kind::kFloat64> {
  using Bits = double;
  LAYERTAP_INLINE static double load(double value) { return value; }
  LAYERTAP_INLINE static double store(float value) { return static_cast<double>(value); }
  LAYERTAP_INLINE static double store(double value) { return value; }
};

}  // namespace layertap
