// Which thread may write to which part of an unfinished message, and when it may be published.
//
// Note [Claims]
//   Copies run without the GIL, so the GIL does not order them. A write claims the builder (a count
//   of writes in flight) and its tensor (a flag). Publishing requires a count of 0 and that every
//   tensor was written. A claim that can't be granted at once is refused. So no call ever waits,
//   and memory that no write has filled is never published. A tensor may be written again after its
//   write has ended.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "layout.h"
#include "strided_copy.h"

namespace layertap {

class Builder {
 public:
  explicit Builder(std::shared_ptr<const Layout> layout);

  const Layout& layout() const { return *layout_; }

  // The right to write one tensor. It ends with its scope; the tensor counts as written after
  // done().
  class Claim {
   public:
    // Throws std::invalid_argument if the builder is finished or the tensor is being written.
    Claim(Builder& builder, std::size_t index);
    ~Claim();
    Claim(const Claim&) = delete;
    Claim& operator=(const Claim&) = delete;
    void done() { after_ = kWritten; }

   private:
    Builder& builder_;
    std::size_t index_;
    std::uint8_t after_;
  };

  // Returns the function that writes `source` of type `dtype` as tensor `index`. Throws
  // std::out_of_range for an index out of range, std::invalid_argument for a shape, item size or
  // cast that doesn't fit.
  Run check(std::int64_t index, const Source& source, std::int64_t dtype) const;

  // Ends all writing. Throws std::invalid_argument if a write is in flight, a tensor is not
  // written, or the builder is finished. In the first two cases it can still be used.
  void finish();

  // Throws std::invalid_argument if the builder is finished.
  void check_open() const;

 private:
  enum : std::uint8_t { kEmpty, kWriting, kWritten };
  static constexpr std::uint32_t kFinished = 1u << 31;

  std::shared_ptr<const Layout> layout_;
  std::atomic<std::uint32_t> in_flight_{0};  // or kFinished
  std::unique_ptr<std::atomic<std::uint8_t>[]> states_;
};

}  // namespace layertap
