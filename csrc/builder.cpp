// Which thread may write to which part of an unfinished message; see Note [Claims].
#include "builder.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace layertap {

namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

std::string text(const std::int64_t* shape, std::size_t rank) {
  std::string out = "[";
  for (std::size_t i = 0; i < rank; ++i) {
    if (i > 0) out += ", ";
    out += std::to_string(shape[i]);
  }
  return out + "]";
}

}  // namespace

Builder::Builder(std::shared_ptr<const Layout> layout)
    : layout_(std::move(layout)),
      states_(new std::atomic<std::uint8_t>[layout_->slots().size()]) {
  for (std::size_t i = 0; i < layout_->slots().size(); ++i) states_[i].store(kEmpty);
}

Builder::Claim::Claim(Builder& builder, std::size_t index) : builder_(builder), index_(index) {
  std::uint32_t writes = builder_.in_flight_.load();
  do {
    if (writes == kFinished) refuse("builder: finished already");
  } while (!builder_.in_flight_.compare_exchange_weak(writes, writes + 1));
  after_ = builder_.states_[index_].exchange(kWriting);
  if (after_ == kWriting) {
    builder_.in_flight_.fetch_sub(1);
    refuse("tensor " + std::to_string(index_) + ": being written by another thread");
  }
}

Builder::Claim::~Claim() {
  builder_.states_[index_].store(after_);
  builder_.in_flight_.fetch_sub(1);
}

Run Builder::check(std::int64_t index, const Source& source, std::int64_t dtype) const {
  const auto& slots = layout_->slots();
  if (index < 0 || static_cast<std::uint64_t>(index) >= slots.size()) {
    throw std::out_of_range("tensor " + std::to_string(index) + ": expected 0 to " +
                            std::to_string(slots.size()) + " less 1");
  }
  const TensorSlot& slot = slots[static_cast<std::size_t>(index)];
  const std::string who = "tensor " + std::to_string(index) + ": ";
  const DType* from = find_dtype(dtype);
  if (from == nullptr) refuse(who + "dtype: got " + std::to_string(dtype) + ", not a DataType");
  if (source.itemsize != from->itemsize) {
    refuse(who + "item size: got " + std::to_string(source.itemsize) + ", expected " +
           std::to_string(from->itemsize) + " for " + from->name);
  }
  if (source.rank != slot.shape.size() ||
      !std::equal(slot.shape.begin(), slot.shape.end(), source.shape)) {
    refuse(who + "shape: got " + text(source.shape, source.rank) + ", expected " +
           text(slot.shape.data(), slot.shape.size()));
  }
  const Run run = find_run(*from, *slot.dtype);
  if (run == nullptr) refuse(who + "no cast from " + from->name + " to " + slot.dtype->name);
  return run;
}

void Builder::check_open() const {
  if (in_flight_.load() == kFinished) refuse("builder: finished already");
}

void Builder::finish() {
  std::uint32_t idle = 0;
  if (!in_flight_.compare_exchange_strong(idle, kFinished)) {
    refuse(idle == kFinished ? "builder: finished already" : "builder: a write is in flight");
  }
  for (std::size_t i = 0; i < layout_->slots().size(); ++i) {
    if (states_[i].load() != kWritten) {
      in_flight_.store(0);
      refuse("tensor " + std::to_string(i) + ": never written");
    }
  }
}

}  // namespace layertap
