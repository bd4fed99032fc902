// layertap._core: the core's classes and functions for Python; see server/layertap/_core.pyi.
//
// Note [When the GIL is released]
//   It is released for copies of kReleaseBytes or more. A smaller copy takes a microsecond or two,
//   while getting the GIL back from a busy interpreter may take its switch interval of 5 ms.
//
// Note [Unpublished bytes]
//   The message is a bytes object of uninitialised memory that no Python code can reach (bytes are
//   not tracked by the garbage collector) until finish() has found every byte written.
#include <pybind11/pybind11.h>

#include <cstring>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "builder.h"
#include "decoder.h"
#include "image_values.h"
#include "layout.h"
#include "memory.h"
#include "python_buffer.h"
#include "raw_fields.h"
#include "resample.h"
#include "stream_copy.h"

namespace py = pybind11;

namespace {

using namespace layertap;

constexpr std::size_t kReleaseBytes = 32 * 1024;

std::string to_utf8(py::handle name) {
  if (!PyUnicode_Check(name.ptr())) throw py::type_error("name: expected str");
  Py_ssize_t size = 0;
  const char* text = PyUnicode_AsUTF8AndSize(name.ptr(), &size);
  if (text == nullptr) throw py::error_already_set();
  return {text, static_cast<std::size_t>(size)};
}

std::vector<std::int64_t> to_shape(py::handle sizes) {
  std::vector<std::int64_t> shape;
  for (py::handle size : sizes) shape.push_back(to_int64(size));
  return shape;
}

py::tuple to_triple(py::handle item) {
  auto triple = py::reinterpret_steal<py::tuple>(PySequence_Tuple(item.ptr()));
  if (!triple) throw py::error_already_set();
  if (triple.size() != 3) throw py::value_error("tensors: expected tuples of three");
  return triple;
}

std::shared_ptr<Layout> make_layout(const py::iterable& tensors, const py::object& field,
                                    const py::object& head_size, bool apart) {
  std::vector<TensorSpec> specs;
  for (py::handle item : tensors) {
    const py::tuple triple = to_triple(item);
    specs.push_back({to_utf8(triple[0]), to_int64(triple[1]), to_shape(triple[2])});
  }
  return std::make_shared<Layout>(specs, to_int64(field), to_int64(head_size), apart);
}

class ReplyBuilder {
 public:
  explicit ReplyBuilder(std::shared_ptr<const Layout> layout)
      : builder_(std::move(layout)), message_(allocate(builder_.layout().nbytes())) {
    builder_.layout().write_headers(bytes());
  }

  // With a separate buffer for the payloads; see Note [Payloads apart].
  ReplyBuilder(std::shared_ptr<const Layout> layout, py::handle payloads, std::uint64_t region,
               std::uint64_t generation)
      : ReplyBuilder(std::move(layout)) {
    payloads_ = std::make_unique<WritableBuffer>(payloads);
    const std::size_t needed = builder_.layout().payload_nbytes();
    if (payloads_->size() < needed) {
      throw py::value_error("payloads: got " + std::to_string(payloads_->size()) +
                            " bytes, expected " + std::to_string(needed));
    }
    builder_.layout().write_region(bytes(), region, generation);
  }

  void write(const py::object& index, py::handle array, const py::object& dtype) {
    write_buffer(to_int64(index), PythonBuffer(array), to_int64(dtype));
  }

  void write_buffer(std::int64_t index, const PythonBuffer& buffer, std::int64_t dtype) {
    const Source source = buffer.source();
    builder_.check_open();
    const Run run = builder_.check(index, source, dtype);
    const TensorSlot& slot = builder_.layout().slots()[static_cast<std::size_t>(index)];
    Builder::Claim claim(builder_, static_cast<std::size_t>(index));
    std::uint8_t* target = (payloads_ ? payloads_->data() : bytes()) + slot.payload_offset;
    {
      std::optional<py::gil_scoped_release> released;
      if (slot.payload_size >= kReleaseBytes) released.emplace();
      if (payloads_ && slot.payload_size >= kStreamBytes && dtype == slot.dtype->number &&
          is_dense(source)) {
        stream_copy(source.data, target, slot.payload_size);
      } else {
        strided_copy(source, target, slot.dtype->itemsize, run);
      }
    }
    claim.done();
  }

  py::bytes finish(const py::bytes& head) {
    builder_.check_open();
    const auto size = static_cast<std::size_t>(PyBytes_GET_SIZE(head.ptr()));
    if (size != builder_.layout().head_size()) {
      throw py::value_error("head: got " + std::to_string(size) + " bytes, expected " +
                            std::to_string(builder_.layout().head_size()));
    }
    builder_.finish();
    // An empty message is Python's shared empty bytes object, so nothing may be written to it.
    if (size > 0) std::memcpy(bytes(), PyBytes_AS_STRING(head.ptr()), size);
    payloads_.reset();
    return std::move(message_);
  }

 private:
  static py::bytes allocate(std::size_t size) {
    PyObject* message = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size));
    if (message == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::bytes>(message);
  }

  std::uint8_t* bytes() {
    return reinterpret_cast<std::uint8_t*>(PyBytes_AS_STRING(message_.ptr()));
  }

  Builder builder_;
  py::bytes message_;  // empty handle once finished
  std::unique_ptr<WritableBuffer> payloads_;  // null if they are in the message
};

std::unique_ptr<ReplyBuilder> make_builder(std::shared_ptr<const Layout> layout,
                                           const py::object& payloads, std::uint64_t region,
                                           std::uint64_t generation) {
  if (layout->apart() != !payloads.is_none()) {
    throw py::value_error("payloads: expected a buffer where the layout is apart, and only there");
  }
  if (payloads.is_none()) return std::make_unique<ReplyBuilder>(std::move(layout));
  return std::make_unique<ReplyBuilder>(std::move(layout), payloads, region, generation);
}

py::bytes encode(const py::iterable& tensors, const py::object& field, const py::bytes& head) {
  std::vector<TensorSpec> specs;
  std::vector<std::unique_ptr<PythonBuffer>> buffers;
  for (py::handle item : tensors) {
    const py::tuple triple = to_triple(item);
    buffers.push_back(std::make_unique<PythonBuffer>(triple[2]));
    specs.push_back({to_utf8(triple[0]), to_int64(triple[1]), buffers.back()->shape()});
  }
  const auto layout =
      std::make_shared<Layout>(specs, to_int64(field), PyBytes_GET_SIZE(head.ptr()), false);
  ReplyBuilder builder(layout);
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    builder.write_buffer(static_cast<std::int64_t>(i), *buffers[i], specs[i].dtype);
  }
  return builder.finish(head);
}

std::uint32_t to_field(py::handle value) {
  const std::int64_t field = to_int64(value);
  if (field < 1 || field > kMaxFieldNumber) {
    throw py::value_error("field: got " + std::to_string(field) + ", expected 1 to 2**29 - 1");
  }
  return static_cast<std::uint32_t>(field);
}

py::bytes join_rest(const py::bytes& message, const std::vector<Span>& spans) {
  const char* bytes = PyBytes_AS_STRING(message.ptr());
  const auto size = static_cast<std::size_t>(PyBytes_GET_SIZE(message.ptr()));
  if (spans.size() == 1 && spans[0].size == size) return message;
  std::string rest;
  for (const Span& span : spans) rest.append(bytes + span.offset, span.size);
  return {rest.data(), rest.size()};
}

py::tuple to_python(const py::bytes& message, const py::object& view, const DecodedTensor& tensor) {
  const char* bytes = PyBytes_AS_STRING(message.ptr());
  py::tuple shape(tensor.rank);
  for (std::size_t i = 0; i < tensor.rank; ++i) shape[i] = py::int_(tensor.shape[i]);
  const auto begin = static_cast<py::ssize_t>(tensor.data.offset);
  const auto end = begin + static_cast<py::ssize_t>(tensor.data.size);
  const SharedSlice& at = tensor.slice;
  const py::object data = tensor.shared
                              ? py::make_tuple(at.region, at.generation, at.offset, at.size)
                              : py::object(view[py::slice(begin, end, 1)]);
  return py::make_tuple(py::str(bytes + tensor.name.offset, tensor.name.size), tensor.dtype,
                        std::move(shape), data);
}

std::size_t to_limit(const py::object& most) {
  const std::int64_t limit = to_int64(most);
  if (limit < 0) throw py::value_error("most: got " + std::to_string(limit) + ", expected from 0");
  return static_cast<std::size_t>(limit);
}

py::tuple decode_message(const py::bytes& message, const py::object& field, const py::object& most,
                         const py::iterable& counted) {
  DecodeOptions options{to_field(field), to_limit(most), {}};
  for (py::handle number : counted) options.counted.push_back(to_field(number));
  const Decoded decoded =
      decode(reinterpret_cast<const std::uint8_t*>(PyBytes_AS_STRING(message.ptr())),
             static_cast<std::size_t>(PyBytes_GET_SIZE(message.ptr())), options);
  const py::object view =
      py::reinterpret_steal<py::object>(PyMemoryView_FromObject(message.ptr()));
  if (!view) throw py::error_already_set();
  py::list tensors;
  for (const DecodedTensor& tensor : decoded.tensors) {
    tensors.append(to_python(message, view, tensor));
  }
  return py::make_tuple(join_rest(message, decoded.rest), std::move(tensors));
}

std::shared_ptr<Layout> make_raw_layout(const py::iterable& tensors, const py::object& field,
                                        const py::object& head_size) {
  std::vector<TensorSpec> specs;
  for (py::handle item : tensors) {
    auto pair = py::reinterpret_steal<py::tuple>(PySequence_Tuple(item.ptr()));
    if (!pair) throw py::error_already_set();
    if (pair.size() != 2) throw py::value_error("tensors: expected tuples of two");
    specs.push_back({"", to_int64(pair[0]), to_shape(pair[1])});
  }
  return std::make_shared<Layout>(raw_layout(specs, to_int64(field), to_int64(head_size)));
}

py::tuple split_message(const py::bytes& message, const py::object& field, const py::object& most) {
  const RawSplit split =
      split_raw(reinterpret_cast<const std::uint8_t*>(PyBytes_AS_STRING(message.ptr())),
                static_cast<std::size_t>(PyBytes_GET_SIZE(message.ptr())), to_field(field),
                to_limit(most));
  const py::object view =
      py::reinterpret_steal<py::object>(PyMemoryView_FromObject(message.ptr()));
  if (!view) throw py::error_already_set();
  py::list payloads;
  for (const Span& span : split.payloads) {
    const auto begin = static_cast<py::ssize_t>(span.offset);
    payloads.append(view[py::slice(begin, begin + static_cast<py::ssize_t>(span.size), 1)]);
  }
  return py::make_tuple(join_rest(message, split.rest), std::move(payloads));
}

constexpr std::int64_t kMaxSide = 1 << 24;  // Pillow's sizes are single-precision numbers

constexpr const char* kFilters[] = {"box", "bilinear", "hamming", "bicubic", "lanczos"};

Filter to_filter(const py::object& name) {
  const std::string wanted = to_utf8(name);
  for (std::size_t i = 0; i < std::size(kFilters); ++i) {
    if (wanted == kFilters[i]) return static_cast<Filter>(i);
  }
  throw py::value_error("interpolation: got " + wanted +
                        ", expected box, bilinear, hamming, bicubic or lanczos");
}

Pixels to_pixels(const PythonBuffer& buffer) {
  const Source source = buffer.source();
  const bool is_image = source.rank == 3 && source.itemsize == 1 && source.shape[0] > 0 &&
                        source.shape[0] <= kMaxSide && source.shape[1] > 0 &&
                        source.shape[1] <= kMaxSide &&
                        (source.shape[2] == 1 || source.shape[2] == 4) && is_dense(source);
  if (!is_image) {
    throw py::value_error("pixels: expected contiguous bytes [height, width, 1 or 4], with sides "
                          "from 1 to 2**24");
  }
  return {source.data, source.shape[0], source.shape[1], source.shape[2]};
}

Resizing to_resizing(const py::iterable& size, const py::iterable& window, const py::object& filter,
                     bool vertical_first) {
  const std::vector<std::int64_t> sides = to_shape(size);
  if (sides.size() != 2 || sides[0] < 1 || sides[0] > kMaxSide || sides[1] < 1 ||
      sides[1] > kMaxSide) {
    throw py::value_error("size: expected height and width, from 1 to 2**24");
  }
  const std::vector<std::int64_t> part = to_shape(window);
  const auto is_inside = [](std::int64_t begin, std::int64_t count, std::int64_t side) {
    return begin >= 0 && begin < side && count >= 1 && count <= side - begin;
  };
  if (part.size() != 4 || !is_inside(part[0], part[2], sides[0]) ||
      !is_inside(part[1], part[3], sides[1])) {
    throw py::value_error("window: expected top, left, height and width, inside the resized image");
  }
  return {sides[0], sides[1], part[0], part[1], part[2], part[3], to_filter(filter),
          vertical_first};
}

void image_values(py::handle pixels, const py::iterable& size, const py::iterable& window,
                  const py::object& filter, bool vertical_first, py::handle tables,
                  py::handle target) {
  const PythonBuffer image(pixels);
  const Pixels source = to_pixels(image);
  const Resizing resizing = to_resizing(size, window, filter, vertical_first);
  const PythonBuffer entries(tables);
  const Source table = entries.source();
  const bool are_tables = table.rank == 2 && table.itemsize == sizeof(float) &&
                          table.shape[1] == 256 && is_dense(table) &&
                          (source.channels == 1 || table.shape[0] <= source.channels);
  if (!are_tables) {
    throw py::value_error("tables: expected contiguous float32 [count, 256], no more than channels");
  }
  const WritableBuffer values(target);
  const std::int64_t count = resizing.rows * resizing.columns;
  const std::size_t needed =
      static_cast<std::size_t>(table.shape[0] * count) * sizeof(float);
  if (values.size() != needed) {
    throw py::value_error("target: got " + std::to_string(values.size()) + " bytes, expected " +
                          std::to_string(needed));
  }
  const py::gil_scoped_release released;
  std::vector<std::uint8_t> resized(static_cast<std::size_t>(count * source.channels));
  resample(source, resizing, resized.data());
  look_up(resized.data(), count, source.channels, reinterpret_cast<const float*>(table.data),
          table.shape[0], reinterpret_cast<float*>(values.data()));
}

std::uint64_t from_one(const char* name, const py::object& number) {
  const std::int64_t value = to_int64(number);
  if (value < 1) {
    throw py::value_error(name + (": got " + std::to_string(value)) + ", expected from 1");
  }
  return static_cast<std::uint64_t>(value);
}

bool keep_memory_bound(const py::object& bound) { return keep_memory(from_one("bound", bound)); }

bool map_large_blocks_of(const py::object& least) {
  return map_large_blocks(from_one("least", least));
}

py::object malloc_usage_or_none() {
  const std::optional<MallocUsage> usage = malloc_usage();
  if (!usage) return py::none();
  return py::make_tuple(usage->used, usage->free);
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Bytes in, bytes out: layertap's C++ extension.";
  module.attr("MAX_RANK") = kMaxRank;
  module.attr("MAX_MESSAGE_BYTES") = kMaxMessageBytes;

  py::class_<Layout, std::shared_ptr<Layout>>(module, "ReplyLayout", py::is_final())
      .def(py::init(&make_layout), py::arg("tensors"), py::kw_only(), py::arg("field"),
           py::arg("head_size"), py::arg("apart") = false)
      .def_property_readonly("nbytes", &Layout::nbytes)
      .def_property_readonly("payload_nbytes", &Layout::payload_nbytes)
      .def("__len__", [](const Layout& layout) { return layout.slots().size(); });

  py::class_<ReplyBuilder>(module, "ReplyBuilder", py::is_final())
      .def(py::init([](std::shared_ptr<Layout> layout, const py::object& payloads,
                       std::uint64_t region, std::uint64_t generation) {
             return make_builder(std::move(layout), payloads, region, generation);
           }),
           py::arg("layout").none(false), py::arg("payloads") = py::none(), py::kw_only(),
           py::arg("region") = 0, py::arg("generation") = 0)
      .def("write", &ReplyBuilder::write, py::arg("index"), py::arg("array"), py::arg("dtype"))
      .def("finish", &ReplyBuilder::finish, py::arg("head"));

  module.def("encode", &encode, py::arg("tensors"), py::kw_only(), py::arg("field"),
             py::arg("head"));
  module.def("decode", &decode_message, py::arg("message"), py::kw_only(), py::arg("field"),
             py::arg("most") = kMaxMessageBytes, py::arg("counted") = py::tuple());

  module.def("raw_layout", &make_raw_layout, py::arg("tensors"), py::kw_only(), py::arg("field"),
             py::arg("head_size"));
  module.def("split", &split_message, py::arg("message"), py::kw_only(), py::arg("field"),
             py::arg("most"));

  module.def("image_values", &image_values, py::arg("pixels"), py::kw_only(), py::arg("size"),
             py::arg("window"), py::arg("interpolation"), py::arg("vertical_first"), py::arg("tables"),
             py::arg("target"));

  module.def("keep_memory", &keep_memory_bound, py::arg("bound"));
  module.def("map_large_blocks", &map_large_blocks_of, py::arg("least"));
  // Returning a gigabyte to the system takes tens of milliseconds.
  module.def("trim_memory", &trim_memory, py::call_guard<py::gil_scoped_release>());
  module.def("malloc_usage", &malloc_usage_or_none);
}
