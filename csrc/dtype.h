// The element types: one row for each value of layertap.v1.DataType.
//
// Numbers are the enum's. Elements are little-endian on the wire and are copied without conversion,
// so this can't be built on big-endian hosts, which use the plain-Python equivalent.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "layertap's wire format is little-endian; big-endian hosts use the Python fallback"
#endif

namespace layertap {

enum class Kind : std::uint8_t { kOpaque, kFloat32, kFloat16, kBfloat16, kFloat64 };

struct DType {
  std::int32_t number;   // value in layertap.v1.DataType
  const char* name;      // as in torch and numpy
  std::size_t itemsize;  // bytes per element
  Kind kind;             // kOpaque types can only be cast to themselves
};

inline constexpr DType kDTypes[] = {
    {1, "float32", 4, Kind::kFloat32},  {2, "float16", 2, Kind::kFloat16},
    {3, "bfloat16", 2, Kind::kBfloat16}, {4, "float64", 8, Kind::kFloat64},
    {5, "int8", 1, Kind::kOpaque},      {6, "uint8", 1, Kind::kOpaque},
    {7, "int16", 2, Kind::kOpaque},     {8, "int32", 4, Kind::kOpaque},
    {9, "int64", 8, Kind::kOpaque},     {10, "bool", 1, Kind::kOpaque},
};
inline constexpr std::int32_t kBool = 10;

// Returns the row for an enum value; nullptr if there is none.
constexpr const DType* find_dtype(std::int64_t number) {
  for (const DType& row : kDTypes) {
    if (row.number == number) return &row;
  }
  return nullptr;
}

}  // namespace layertap
