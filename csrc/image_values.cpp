// See image_values.h.
#include "image_values.h"

namespace layertap {

void look_up(const std::uint8_t* bytes, std::int64_t pixels, std::int64_t channels,
             const float* tables, std::int64_t count, float* target) {
  for (std::int64_t table = 0; table < count; ++table) {
    const float* entries = tables + table * 256;
    const std::uint8_t* byte = bytes + (channels == 1 ? 0 : table);
    for (std::int64_t i = 0; i < pixels; ++i) *target++ = entries[byte[i * channels]];
  }
}

}  // namespace layertap
