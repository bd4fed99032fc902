// Casts and copies of contiguous runs; see cast.h and float_bits.h.
//
// Note [Dispatch at run time]
//   The build targets the baseline CPU, so that a wheel runs everywhere. On x86-64 each cast is
//   compiled a second time for AVX2 and F16C; this version is used if the CPU has both. On other
//   CPUs the compiler vectorises the portable loop (NEON is part of aarch64's baseline).
#include "cast.h"

#include <algorithm>
#include <cstring>

#include "float_bits.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define LAYERTAP_X86 1
#include <immintrin.h>
#endif

namespace layertap {

namespace {

template <std::size_t kItemsize>
void copy_run(const std::uint8_t* source, std::uint8_t* target, std::size_t n) {
  std::memcpy(target, source, n * kItemsize);
}

template <Kind kFrom, Kind kTo>
LAYERTAP_INLINE void cast_loop(const std::uint8_t* __restrict source,
                               std::uint8_t* __restrict target, std::size_t n) {
  using From = typename Element<kFrom>::Bits;
  using To = typename Element<kTo>::Bits;
  for (std::size_t i = 0; i < n; ++i) {
    From from;
    std::memcpy(&from, source + i * sizeof(From), sizeof(From));
    const To to = Element<kTo>::store(Element<kFrom>::load(from));
    std::memcpy(target + i * sizeof(To), &to, sizeof(To));
  }
}

template <Kind kFrom, Kind kTo>
void portable_run(const std::uint8_t* source, std::uint8_t* target, std::size_t n) {
  cast_loop<kFrom, kTo>(source, target, n);
}

#ifdef LAYERTAP_X86

#define LAYERTAP_AVX2 __attribute__((target("avx2,f16c")))

template <Kind kFrom, Kind kTo>
LAYERTAP_AVX2 void avx2_run(const std::uint8_t* source, std::uint8_t* target, std::size_t n) {
  cast_loop<kFrom, kTo>(source, target, n);
}

template <>
LAYERTAP_AVX2 void avx2_run<Kind::kFloat32, Kind::kFloat16>(const std::uint8_t* source,
                                                            std::uint8_t* target, std::size_t n) {
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 single = _mm256_loadu_ps(reinterpret_cast<const float*>(source + i * 4));
    const __m128i half = _mm256_cvtps_ph(single, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i * 2), half);
  }
  cast_loop<Kind::kFloat32, Kind::kFloat16>(source + i * 4, target + i * 2, n - i);
}

template <>
LAYERTAP_AVX2 void avx2_run<Kind::kFloat16, Kind::kFloat32>(const std::uint8_t* source,
                                                            std::uint8_t* target, std::size_t n) {
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i * 2));
    _mm256_storeu_ps(reinterpret_cast<float*>(target + i * 4), _mm256_cvtph_ps(half));
  }
  cast_loop<Kind::kFloat16, Kind::kFloat32>(source + i * 2, target + i * 4, n - i);
}

LAYERTAP_INLINE void odd_loop(const std::uint8_t* source, float* target, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    double value;
    std::memcpy(&value, source + i * sizeof(value), sizeof(value));
    target[i] = single_to_odd(value);
  }
}

// float64 -> float16, float16 -> float64 and bfloat16 <-> float16 through float32, using F16C.
template <Kind kFrom, Kind kTo>
LAYERTAP_AVX2 void avx2_run_by_single(const std::uint8_t* source, std::uint8_t* target,
                                      std::size_t n) {
  constexpr std::size_t kChunk = 256;
  float single[kChunk];
  auto* bytes = reinterpret_cast<std::uint8_t*>(single);
  for (std::size_t at = 0; at < n; at += kChunk) {
    const std::size_t count = std::min(kChunk, n - at);
    const std::uint8_t* from = source + at * sizeof(typename Element<kFrom>::Bits);
    if constexpr (kFrom == Kind::kFloat64) {
      odd_loop(from, single, count);  // see Note [Rounding to odd]
    } else {
      avx2_run<kFrom, Kind::kFloat32>(from, bytes, count);
    }
    avx2_run<Kind::kFloat32, kTo>(bytes, target + at * sizeof(typename Element<kTo>::Bits), count);
  }
}

template <Kind kFrom, Kind kTo>
Run best_avx2_run() {
  constexpr bool kHalf = kFrom == Kind::kFloat16 || kTo == Kind::kFloat16;
  constexpr bool kSingle = kFrom == Kind::kFloat32 || kTo == Kind::kFloat32;
  if constexpr (kHalf && !kSingle && kFrom != kTo) return avx2_run_by_single<kFrom, kTo>;
  return avx2_run<kFrom, kTo>;
}

bool has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  return has;
}

#endif  // LAYERTAP_X86

template <Kind kFrom, Kind kTo>
Run cast_run() {
#ifdef LAYERTAP_X86
  if (has_avx2()) return best_avx2_run<kFrom, kTo>();
#endif
  return portable_run<kFrom, kTo>;
}

template <Kind kFrom>
Run cast_from(Kind to) {
  switch (to) {
    case Kind::kFloat32:
      return cast_run<kFrom, Kind::kFloat32>();
    case Kind::kFloat16:
      return cast_run<kFrom, Kind::kFloat16>();
    case Kind::kBfloat16:
      return cast_run<kFrom, Kind::kBfloat16>();
    case Kind::kFloat64:
      return cast_run<kFrom, Kind::kFloat64>();
    case Kind::kOpaque:
      break;
  }
  return nullptr;
}

Run find_copy(std::size_t itemsize) {
  switch (itemsize) {
    case 1:
      return copy_run<1>;
    case 2:
      return copy_run<2>;
    case 4:
      return copy_run<4>;
    default:
      return copy_run<8>;
  }
}

}  // namespace

Run find_run(const DType& from, const DType& to) {
  if (from.number == to.number) return find_copy(from.itemsize);
  switch (from.kind) {
    case Kind::kFloat32:
      return cast_from<Kind::kFloat32>(to.kind);
    case Kind::kFloat16:
      return cast_from<Kind::kFloat16>(to.kind);
    case Kind::kBfloat16:
      return cast_from<Kind::kBfloat16>(to.kind);
    case Kind::kFloat64:
      return cast_from<Kind::kFloat64>(to.kind);
    case Kind::kOpaque:
      break;
  }
  return nullptr;
}

}  // namespace layertap
