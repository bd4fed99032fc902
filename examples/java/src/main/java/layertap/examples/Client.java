package layertap.examples;

import com.google.protobuf.ByteString;
import io.grpc.Channel;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.Metadata;
import io.grpc.StatusRuntimeException;
import io.grpc.health.v1.HealthCheckRequest;
import io.grpc.health.v1.HealthCheckResponse.ServingStatus;
import io.grpc.health.v1.HealthGrpc;
import java.io.IOException;
import java.nio.FloatBuffer;
import java.nio.LongBuffer;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.concurrent.TimeUnit;
import java.util.stream.Collectors;
import layertap.v1.Axis;
import layertap.v1.AxisSelection;
import layertap.v1.Capture;
import layertap.v1.DataType;
import layertap.v1.ExtractRequest;
import layertap.v1.FeatureServiceGrpc;
import layertap.v1.ImageBatch;
import layertap.v1.Intervention;
import layertap.v1.LayerSelection;
import layertap.v1.Measure;
import layertap.v1.Method;
import layertap.v1.ObjectiveTerm;
import layertap.v1.Operation;
import layertap.v1.Reduction;
import layertap.v1.Tensor;
import layertap.v1.TextBatch;

/**
 * Asks a layertap server for layers of a photograph and of a tensor, and, if a model of texts is
 * named, for one of its layers: {@code client HOST:PORT [MODEL] [PHOTO] [TEXT_MODEL] [TEXT_LAYER]}.
 */
public final class Client {
  private static final String PHOTO = "../images/grace_hopper.jpg";
  private static final String TEXT_LAYER = "encoder.layer.11";
  private static final long READY_WITHIN_SECONDS = 60;
  private static final long ASK_AGAIN_MS = 100;

  /**
   * gRPC refuses messages over 4 MB unless told otherwise, and activations are often larger: layer1
   * of a batch of six images already is.
   */
  private static final int LARGEST_REPLY = 1 << 30;

  /** How the names of the tensors begin that tell what interventions changed. */
  private static final String REPORT = "interventions.";

  private static final Metadata.Key<String> ERROR_KIND =
      Metadata.Key.of("layertap-error", Metadata.ASCII_STRING_MARSHALLER);

  private Client() {}

  public static void main(String[] args) throws IOException, InterruptedException {
    if (args.length < 1 || args.length > 5) {
      System.err.println("usage: client HOST:PORT [MODEL] [PHOTO] [TEXT_MODEL] [TEXT_LAYER]");
      System.exit(2);
    }
    var model = args.length > 1 ? args[1] : "resnet18";
    var photo = Files.readAllBytes(Path.of(args.length > 2 ? args[2] : PHOTO));
    var channel =
        Grpc.newChannelBuilder(args[0], InsecureChannelCredentials.create())
            .maxInboundMessageSize(LARGEST_REPLY)
            .build();
    try {
      awaitReady(channel);
      askForLayers(channel, model, photo);
      askWithInterventions(channel, model, photo);
      if (args.length > 3) {
        askWithTexts(channel, args[3], args.length > 4 ? args[4] : TEXT_LAYER);
      }
      askForNothing(channel, model, photo);
    } finally {
      channel.shutdownNow();
    }
  }

  private static void awaitReady(Channel channel) throws InterruptedException {
    // withWaitForReady: until the server listens, calls would fail at once.
    var health =
        HealthGrpc.newBlockingStub(channel)
            .withWaitForReady()
            .withDeadlineAfter(READY_WITHIN_SECONDS, TimeUnit.SECONDS);
    var request = HealthCheckRequest.getDefaultInstance();
    while (health.check(request).getStatus() != ServingStatus.SERVING) {
      Thread.sleep(ASK_AGAIN_MS);
    }
  }

  private static void askForLayers(Channel channel, String model, byte[] photo) {
    var features = FeatureServiceGrpc.newBlockingStub(channel);
    var images = ImageBatch.newBuilder().addImages(ByteString.copyFrom(photo)).build();

    var ofPhoto =
        ExtractRequest.newBuilder()
            .setModel(model)
            .addImages(images)
            .addLayers(layer("layer1"))
            .addLayers(inputOf("avgpool"))
            .build();
    print("photo", features.extract(ofPhoto).getTensorsList());

    var ofTensor =
        ExtractRequest.newBuilder()
            .setModel(model)
            .addInputs(Elements.tensor(List.of(1L, 3L, 224L, 224L), i -> (i % 255) / 255f))
            .addLayers(layer("avgpool"))
            .build();
    print("tensor", features.extract(ofTensor).getTensorsList());

    // Where in the photo layer1 raises the largest element of avgpool: a class activation map.
    var ofMap =
        ExtractRequest.newBuilder()
            .setModel(model)
            .addImages(images)
            .addLayers(mapOf("layer1"))
            .addObjective(
                ObjectiveTerm.newBuilder().setLayer("avgpool").setMeasure(Measure.MEASURE_MAXIMUM))
            .build();
    print("map", features.extract(ofMap).getTensorsList());
  }

  /** What avgpool is given without channels 0 and 1 of layer1, and with those from 32 on halved. */
  private static void askWithInterventions(Channel channel, String model, byte[] photo) {
    var images = ImageBatch.newBuilder().addImages(ByteString.copyFrom(photo)).build();
    var first = AxisSelection.newBuilder().setAxis(Axis.AXIS_CHANNEL).addIndex(0).addIndex(1);
    var rest = AxisSelection.newBuilder().setAxis(Axis.AXIS_CHANNEL).setBegin(32);
    var zero =
        Intervention.newBuilder()
            .setLayer("layer1")
            .addSelect(first)
            .setOperation(Operation.OPERATION_ZERO);
    var halve =
        Intervention.newBuilder()
            .setLayer("layer1")
            .addSelect(rest)
            .setOperation(Operation.OPERATION_SCALE)
            .setFactor(0.5);
    var ofChanged =
        ExtractRequest.newBuilder()
            .setModel(model)
            .addImages(images)
            .addLayers(inputOf("avgpool"))
            .addInterventions(zero)
            .addInterventions(halve)
            .build();
    var reply = FeatureServiceGrpc.newBlockingStub(channel).extract(ofChanged);
    Map<Boolean, List<Tensor>> tensors =
        reply.getTensorsList().stream()
            .collect(Collectors.partitioningBy(each -> each.getName().startsWith(REPORT)));
    print("changed", tensors.get(false));
    printInterventions(tensors.get(true));
  }

  private static void askWithTexts(Channel channel, String model, String layer) {
    var texts =
        TextBatch.newBuilder().addTexts("the cat sat on the mat.").addTexts("a bird flew").build();
    // The mean of each text's tokens; the server tokenises the texts and leaves padding out.
    var mean = Reduction.REDUCTION_GLOBAL_AVERAGE_POOL;
    var ofTexts =
        ExtractRequest.newBuilder()
            .setModel(model)
            .addTexts(texts)
            .addLayers(layer(layer).toBuilder().setReduction(mean))
            .build();
    print("text", FeatureServiceGrpc.newBlockingStub(channel).extract(ofTexts).getTensorsList());
  }

  private static void askForNothing(Channel channel, String model, byte[] photo) {
    var features = FeatureServiceGrpc.newBlockingStub(channel);
    var images = ImageBatch.newBuilder().addImages(ByteString.copyFrom(photo)).build();
    var ofNothing =
        ExtractRequest.newBuilder()
            .setModel(model)
            .addImages(images)
            .addLayers(layer("no.such.layer"))
            .build();
    try {
      features.extract(ofNothing);
      throw new IllegalStateException("a layer that does not exist was served");
    } catch (StatusRuntimeException error) {
      print(error);
    }
  }

  /** What the layer returns. */
  private static LayerSelection layer(String name) {
    return LayerSelection.newBuilder().setLayer(name).build();
  }

  /** What the layer is given; the reply calls it {@code name:input}. */
  private static LayerSelection inputOf(String name) {
    return LayerSelection.newBuilder().setLayer(name).setCapture(Capture.CAPTURE_INPUT).build();
  }

  /** The layer's Grad-CAM; the reply calls it {@code name:grad_cam}. */
  private static LayerSelection mapOf(String name) {
    return LayerSelection.newBuilder()
        .setLayer(name)
        .setCapture(Capture.CAPTURE_GRADIENT)
        .setMethod(Method.METHOD_GRAD_CAM)
        .build();
  }

  private static void print(String what, List<Tensor> tensors) {
    for (Tensor tensor : tensors) {
      var shape =
          tensor.getShapeList().stream().map(String::valueOf).collect(Collectors.joining("x"));
      System.out.printf(
          "%s %s %s %s %s%n",
          what, tensor.getName(), Elements.nameOf(tensor.getDtype()), shape, summary(tensor));
    }
  }

  /** The sum and the first of a tensor's elements. */
  private static String summary(Tensor tensor) {
    if (tensor.getDtype() == DataType.DATA_TYPE_INT64) {
      LongBuffer elements = Elements.integers(tensor);
      long sum = 0;
      for (int i = 0; i < elements.limit(); i++) {
        sum += elements.get(i);
      }
      return "sum=%d first=%d".formatted(sum, elements.hasRemaining() ? elements.get(0) : 0);
    }
    FloatBuffer elements = Elements.floats(tensor);
    double sum = 0;
    for (int i = 0; i < elements.limit(); i++) {
      sum += elements.get(i);
    }
    float first = elements.hasRemaining() ? elements.get(0) : Float.NaN;
    // Locale.ROOT: a point before the decimals, whatever the user's language.
    return String.format(Locale.ROOT, "sum=%.4f first=%.6f", sum, first);
  }

  /**
   * Prints a line for each intervention: the calls of modules and the elements that it selected,
   * those whose value changed, and the norm of the selected elements before and after.
   */
  private static void printInterventions(List<Tensor> reports) {
    var byName = reports.stream().collect(Collectors.toMap(Tensor::getName, tensor -> tensor));
    LongBuffer calls = Elements.integers(byName.get(REPORT + "calls"));
    LongBuffer selected = Elements.integers(byName.get(REPORT + "elements"));
    LongBuffer changed = Elements.integers(byName.get(REPORT + "changed"));
    FloatBuffer norms = Elements.floats(byName.get(REPORT + "norm")); // [N, 2]
    for (int i = 0; i < calls.limit(); i++) {
      System.out.printf(
          Locale.ROOT,
          "intervention %d calls=%d elements=%d changed=%d norm=%.4f->%.4f%n",
          i,
          calls.get(i),
          selected.get(i),
          changed.get(i),
          norms.get(2 * i),
          norms.get(2 * i + 1));
    }
  }

  private static void print(StatusRuntimeException error) {
    var status = error.getStatus();
    var trailers = error.getTrailers();
    var kind = trailers == null ? null : trailers.get(ERROR_KIND);
    System.out.printf("error %s %s %s%n", status.getCode(), kind, status.getDescription());
  }
}
