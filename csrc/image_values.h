// Looks the bytes of an image up in tables: what a model is given for each of the 256 values.
#pragma once

#include <cstdint>

namespace layertap {

// Writes `target`, [tables, pixels] contiguous: for each table, the entries for one channel of
// `bytes`, [pixels, channels] contiguous. With one channel, every table reads it; otherwise the
// table's own channel, so there may not be more tables than channels. `tables` is [tables, 256].
void look_up(const std::uint8_t* bytes, std::int64_t pixels, std::int64_t channels,
             const float* tables, std::int64_t count, float* target);

}  // namespace layertap
