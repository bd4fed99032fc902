// Fuzzes the decoder for memory safety: any bytes, as a request and as a reply.
//
// An input is a message in the wire format, so inputs can be exchanged with the other fuzzer, which
// compares with upb (tests/fuzz). tools/fuzz.py builds this with the sanitizers for addresses and
// undefined behaviour. Like the decoder, it needs no Python.
//
// It checks what the sanitizers can't see: that spans are inside the message, in order and without
// overlap, and that tensors satisfy the rules of the decoder.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "../decoder.h"
#include "../dtype.h"
#include "../shape.h"
#include "../wire.h"

namespace {

using namespace layertap;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "the decoder broke its promise: %s\n", what);
  std::abort();
}

bool inside(Span span, std::size_t size) {
  return span.offset <= size && span.size <= size - span.offset;
}

void check_rest(const Decoded& decoded, std::size_t size) {
  std::size_t end = 0;
  for (const Span& span : decoded.rest) {
    require(inside(span, size), "rest lies in the message");
    require(span.offset >= end, "rest is in order");
    end = span.offset + span.size;
  }
}

// Reads every byte of the spans, so that the sanitizer finds a wrong span.
void check_tensor(const DecodedTensor& tensor, const std::uint8_t* message, std::size_t size) {
  require(inside(tensor.name, size), "name lies in the message");
  require(inside(tensor.data, size), "data lies in the message");
  require(is_utf8(message + tensor.name.offset, tensor.name.size), "name is UTF-8");
  const DType* dtype = find_dtype(tensor.dtype);
  require(dtype != nullptr, "dtype has a row");
  require(tensor.rank <= kMaxRank, "rank is capped");
  const std::int64_t bytes = payload_bytes(tensor.shape.data(), tensor.rank, dtype->itemsize);
  const std::uint64_t got = tensor.shared ? tensor.slice.size : tensor.data.size;
  require(bytes >= 0 && static_cast<std::uint64_t>(bytes) == got, "elements fill the shape");
  require(!tensor.shared || tensor.data.size == 0, "elements stand in one place");
  std::uint8_t seen = 0;
  for (std::size_t i = 0; i < tensor.data.size; ++i) seen |= message[tensor.data.offset + i];
  require(dtype->number != kBool || seen <= 1, "bools are 0 or 1");
}

void run(const std::uint8_t* message, std::size_t size, const DecodeOptions& options) {
  try {
    const Decoded decoded = decode(message, size, options);
    require(decoded.tensors.size() <= options.most, "no more tensors than allowed");
    check_rest(decoded, size);
    for (const DecodedTensor& tensor : decoded.tensors) check_tensor(tensor, message, size);
  } catch (const std::invalid_argument&) {
    // A refusal is allowed. Any other exception is not caught, and so is a finding.
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* message, std::size_t size) {
  static const DecodeOptions request{2, 256, {3}};  // ExtractRequest.inputs, counted images
  static const DecodeOptions reply{1, kMaxMessageBytes, {}};  // ExtractResponse.tensors
  run(message, size, request);
  run(message, size, reply);
  return 0;
}
