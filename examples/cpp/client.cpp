// Asks a layertap server for layers of a photograph and of a tensor, and, if a model of texts is
// named, for one of its layers.
//
//   client HOST:PORT [MODEL] [PHOTO] [TEXT_MODEL] [TEXT_LAYER]
#include <absl/status/status.h>
#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cinttypes>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>

#include "elements.h"
#include "layertap/v1/feature_service.grpc.pb.h"

namespace v1 = layertap::v1;

namespace {

constexpr std::chrono::seconds kReadyWithin(60);
constexpr std::chrono::seconds kAnswerWithin(60);

// The channel itself asks grpc.health.v1, and counts as connected only while the server ("" stands
// for all of it) says SERVING. round_robin, since the default policy does not look at health.
constexpr char kHealth[] = R"({
  "loadBalancingConfig": [{"round_robin": {}}],
  "healthCheckConfig": {"serviceName": ""}
})";

std::shared_ptr<grpc::Channel> connect(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetServiceConfigJSON(kHealth);
  // No limit: a few layers of a batch are soon over the 4 MB that gRPC receives by default.
  arguments.SetMaxReceiveMessageSize(-1);
  auto channel = grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
  if (!channel->WaitForConnected(std::chrono::system_clock::now() + kReadyWithin)) {
    throw std::runtime_error(address + " was not ready within " +
                             std::to_string(kReadyWithin.count()) + " s");
  }
  return channel;
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string bytes(std::istreambuf_iterator<char>(file), {});
  if (bytes.empty()) throw std::runtime_error("can't read " + path);
  return bytes;
}

// Makes a float32 tensor whose element i is (i % 255) / 255.
v1::Tensor ramp(std::initializer_list<std::int64_t> shape) {
  v1::Tensor tensor;
  tensor.set_dtype(v1::DATA_TYPE_FLOAT32);
  std::int64_t count = 1;
  for (std::int64_t size : shape) {
    tensor.add_shape(size);
    count *= size;
  }
  std::string* data = tensor.mutable_data();
  data->reserve(count * sizeof(float));
  for (std::int64_t i = 0; i < count; ++i) append_float(data, static_cast<float>(i % 255) / 255);
  return tensor;
}

// gRPC's numbers are Abseil's, which has names for them: NOT_FOUND.
std::string name_of(grpc::StatusCode code) {
  return absl::StatusCodeToString(static_cast<absl::StatusCode>(code));
}

grpc::Status extract(v1::FeatureService::Stub& features, const v1::ExtractRequest& request,
                     v1::ExtractResponse* reply, grpc::ClientContext& context) {
  context.set_deadline(std::chrono::system_clock::now() + kAnswerWithin);
  return features.Extract(&context, request, reply);
}

// The sum and the first of a tensor's elements.
std::string summary(const v1::Tensor& tensor) {
  char text[128];
  if (tensor.dtype() == v1::DATA_TYPE_INT64) {
    const Integers values = integers(tensor);
    const std::int64_t sum = std::accumulate(values.begin(), values.end(), std::int64_t{0});
    const std::int64_t first = values.size() > 0 ? values.data()[0] : 0;
    std::snprintf(text, sizeof text, "sum=%" PRId64 " first=%" PRId64, sum, first);
    return text;
  }
  const Floats values = floats(tensor);
  const double sum = std::accumulate(values.begin(), values.end(), 0.0);
  const float first = values.size() > 0 ? values.data()[0] : NAN;
  std::snprintf(text, sizeof text, "sum=%.4f first=%.6f", sum, first);
  return text;
}

// Prints a line for each intervention: the calls of modules and the elements that it selected,
// those whose value changed, and the norm of the selected elements before and after.
void show_interventions(const std::map<std::string, const v1::Tensor*>& reports) {
  const Integers calls = integers(*reports.at("interventions.calls"));
  const Integers selected = integers(*reports.at("interventions.elements"));
  const Integers changed = integers(*reports.at("interventions.changed"));
  const Floats norms = floats(*reports.at("interventions.norm"));  // [N, 2]
  for (std::size_t i = 0; i < calls.size(); ++i) {
    std::printf("intervention %zu calls=%" PRId64 " elements=%" PRId64 " changed=%" PRId64
                " norm=%.4f->%.4f\n",
                i, calls.data()[i], selected.data()[i], changed.data()[i], norms.data()[2 * i],
                norms.data()[2 * i + 1]);
  }
}

// Prints a line for each tensor of the reply, and one for each intervention of the request.
void show(v1::FeatureService::Stub& features, const char* what, const v1::ExtractRequest& request) {
  grpc::ClientContext context;
  v1::ExtractResponse reply;
  const grpc::Status status = extract(features, request, &reply, context);
  if (!status.ok()) {
    throw std::runtime_error(name_of(status.error_code()) + ": " + status.error_message());
  }
  std::map<std::string, const v1::Tensor*> reports;
  for (const v1::Tensor& tensor : reply.tensors()) {
    if (tensor.name().rfind("interventions.", 0) == 0) {
      reports[tensor.name()] = &tensor;
      continue;
    }
    std::printf("%s %s %s %s %s\n", what, tensor.name().c_str(), dtype_name(tensor.dtype()).c_str(),
                shape_text(tensor).c_str(), summary(tensor).c_str());
  }
  if (!reports.empty()) show_interventions(reports);
}

// Prints how the server refuses a request: the status says what to do about it, the trailing
// metadata which of the server's errors it is.
void show_refusal(v1::FeatureService::Stub& features, const v1::ExtractRequest& request) {
  grpc::ClientContext context;
  v1::ExtractResponse reply;
  const grpc::Status status = extract(features, request, &reply, context);
  if (status.ok()) throw std::runtime_error("a layer that does not exist was served");
  const auto& trailing = context.GetServerTrailingMetadata();
  const auto found = trailing.find("layertap-error");
  // Metadata is not terminated by a zero, as %s needs it.
  const std::string kind =
      found == trailing.end() ? "none" : std::string(found->second.data(), found->second.size());
  std::printf("error %s %s %s\n", name_of(status.error_code()).c_str(), kind.c_str(),
              status.error_message().c_str());
}

void show_texts(v1::FeatureService::Stub& features, const std::string& model,
                const std::string& layer) {
  v1::ExtractRequest of_texts;
  of_texts.set_model(model);
  v1::TextBatch* texts = of_texts.add_texts();
  texts->add_texts("the cat sat on the mat.");
  texts->add_texts("a bird flew");
  // The mean of each text's tokens; the server tokenises the texts and leaves padding out.
  v1::LayerSelection* mean = of_texts.add_layers();
  mean->set_layer(layer);
  mean->set_reduction(v1::REDUCTION_GLOBAL_AVERAGE_POOL);
  show(features, "text", of_texts);
}

// What avgpool is given without channels 0 and 1 of layer1, and with those from 32 on halved.
void show_changed(v1::FeatureService::Stub& features, const std::string& model,
                  const std::string& image) {
  v1::ExtractRequest of_changed;
  of_changed.set_model(model);
  of_changed.add_images()->add_images(image);
  v1::LayerSelection* pooled = of_changed.add_layers();
  pooled->set_layer("avgpool");
  pooled->set_capture(v1::CAPTURE_INPUT);

  v1::Intervention* zero = of_changed.add_interventions();
  zero->set_layer("layer1");
  v1::AxisSelection* first = zero->add_select();
  first->set_axis(v1::AXIS_CHANNEL);
  first->add_index(0);
  first->add_index(1);
  zero->set_operation(v1::OPERATION_ZERO);

  v1::Intervention* halve = of_changed.add_interventions();
  halve->set_layer("layer1");
  v1::AxisSelection* rest = halve->add_select();
  rest->set_axis(v1::AXIS_CHANNEL);
  rest->set_begin(32);
  halve->set_operation(v1::OPERATION_SCALE);
  halve->set_factor(0.5);
  show(features, "changed", of_changed);
}

void run(const std::string& address, const std::string& model, const std::string& photo,
         const std::string& text_model, const std::string& text_layer) {
  const std::string image = read_file(photo);
  const auto features = v1::FeatureService::NewStub(connect(address));

  v1::ExtractRequest of_photo;
  of_photo.set_model(model);
  of_photo.add_images()->add_images(image);
  of_photo.add_layers()->set_layer("layer1");
  v1::LayerSelection* pooled = of_photo.add_layers();
  pooled->set_layer("avgpool");
  pooled->set_capture(v1::CAPTURE_INPUT);
  show(*features, "photo", of_photo);

  v1::ExtractRequest of_tensor;
  of_tensor.set_model(model);
  *of_tensor.add_inputs() = ramp({1, 3, 224, 224});
  of_tensor.add_layers()->set_layer("avgpool");
  show(*features, "tensor", of_tensor);

  // Where in the photo layer1 raises the largest element of avgpool: a class activation map.
  v1::ExtractRequest of_map;
  of_map.set_model(model);
  of_map.add_images()->add_images(image);
  v1::LayerSelection* where = of_map.add_layers();
  where->set_layer("layer1");
  where->set_capture(v1::CAPTURE_GRADIENT);
  where->set_method(v1::METHOD_GRAD_CAM);
  v1::ObjectiveTerm* largest = of_map.add_objective();
  largest->set_layer("avgpool");
  largest->set_measure(v1::MEASURE_MAXIMUM);
  show(*features, "map", of_map);

  show_changed(*features, model, image);

  if (!text_model.empty()) show_texts(*features, text_model, text_layer);

  v1::ExtractRequest unknown;
  unknown.set_model(model);
  unknown.add_images()->add_images(image);
  unknown.add_layers()->set_layer("no.such.layer");
  show_refusal(*features, unknown);
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) {
    throw std::runtime_error("usage: client HOST:PORT [MODEL] [PHOTO] [TEXT_MODEL] [TEXT_LAYER]");
  }
  const auto argument = [&](int index, const char* otherwise) {
    return argc > index ? argv[index] : otherwise;
  };
  run(argv[1], argument(2, "resnet18"), argument(3, "../images/grace_hopper.jpg"), argument(4, ""),
      argument(5, "encoder.layer.11"));
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
