// Command client asks a layertap server for layers of a photograph and of a tensor, and, if a model
// of texts is named, for one of its layers.
//
//	client HOST:PORT [MODEL] [PHOTO] [TEXT_MODEL] [TEXT_LAYER]
package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log"
	"math"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	health "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "layertap.example/client/layertap/v1"
)

//go:generate ./generate.sh

const (
	readyWithin  = 60 * time.Second
	answerWithin = 60 * time.Second
)

func main() {
	log.SetFlags(0)
	arguments := append(os.Args[1:], "", "", "", "", "")
	address, model, photo := arguments[0], arguments[1], arguments[2]
	textModel, textLayer := arguments[3], arguments[4]
	if address == "" {
		log.Fatal("usage: client HOST:PORT [MODEL] [PHOTO] [TEXT_MODEL] [TEXT_LAYER]")
	}
	if model == "" {
		model = "resnet18"
	}
	if photo == "" {
		photo = "../images/grace_hopper.jpg"
	}
	if textLayer == "" {
		textLayer = "encoder.layer.11"
	}
	if err := run(address, model, photo, textModel, textLayer); err != nil {
		log.Fatal(err)
	}
}

func run(address, model, photo, textModel, textLayer string) error {
	image, err := os.ReadFile(photo)
	if err != nil {
		return err
	}
	connection, err := grpc.NewClient(address,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		// A few layers of a batch are soon over the 4 MB that gRPC receives by default.
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(math.MaxInt32)))
	if err != nil {
		return err
	}
	defer connection.Close()
	if err := waitUntilReady(connection); err != nil {
		return err
	}
	features := pb.NewFeatureServiceClient(connection)

	images := []*pb.ImageBatch{{Images: [][]byte{image}}}
	layer1 := &pb.LayerSelection{Layer: "layer1"}
	pooled := &pb.LayerSelection{Layer: "avgpool", Capture: pb.Capture_CAPTURE_INPUT}
	if err := show(features, "photo", &pb.ExtractRequest{
		Model: model, Images: images, Layers: []*pb.LayerSelection{layer1, pooled},
	}); err != nil {
		return err
	}

	ramp, err := rampTensor(1, 3, 224, 224)
	if err != nil {
		return err
	}
	if err := show(features, "tensor", &pb.ExtractRequest{
		Model: model, Inputs: []*pb.Tensor{ramp}, Layers: []*pb.LayerSelection{{Layer: "avgpool"}},
	}); err != nil {
		return err
	}

	// Where in the photo layer1 raises the largest element of avgpool: a class activation map.
	where := &pb.LayerSelection{
		Layer: "layer1", Capture: pb.Capture_CAPTURE_GRADIENT, Method: pb.Method_METHOD_GRAD_CAM,
	}
	largest := &pb.ObjectiveTerm{Layer: "avgpool", Measure: pb.Measure_MEASURE_MAXIMUM}
	if err := show(features, "map", &pb.ExtractRequest{
		Model: model, Images: images, Layers: []*pb.LayerSelection{where},
		Objective: []*pb.ObjectiveTerm{largest},
	}); err != nil {
		return err
	}

	// What avgpool is given without channels 0 and 1 of layer1, and with those from 32 on halved.
	without := &pb.Intervention{
		Layer: "layer1", Operation: pb.Operation_OPERATION_ZERO,
		Select: []*pb.AxisSelection{{Axis: pb.Axis_AXIS_CHANNEL, Index: []int64{0, 1}}},
	}
	halved := &pb.Intervention{
		Layer: "layer1", Operation: pb.Operation_OPERATION_SCALE, Factor: proto.Float64(0.5),
		Select: []*pb.AxisSelection{{Axis: pb.Axis_AXIS_CHANNEL, Begin: proto.Int64(32)}},
	}
	if err := show(features, "changed", &pb.ExtractRequest{
		Model: model, Images: images, Layers: []*pb.LayerSelection{pooled},
		Interventions: []*pb.Intervention{without, halved},
	}); err != nil {
		return err
	}

	if textModel != "" {
		texts := []*pb.TextBatch{{Texts: []string{"the cat sat on the mat.", "a bird flew"}}}
		// The mean of each text's tokens; the server tokenises the texts and leaves padding out.
		mean := &pb.LayerSelection{
			Layer: textLayer, Reduction: pb.Reduction_REDUCTION_GLOBAL_AVERAGE_POOL,
		}
		if err := show(features, "text", &pb.ExtractRequest{
			Model: textModel, Texts: texts, Layers: []*pb.LayerSelection{mean},
		}); err != nil {
			return err
		}
	}

	return showRefusal(features, &pb.ExtractRequest{
		Model: model, Images: images, Layers: []*pb.LayerSelection{{Layer: "no.such.layer"}},
	})
}

// waitUntilReady returns once the server's models are loaded.
func waitUntilReady(connection *grpc.ClientConn) error {
	ctx, cancel := context.WithTimeout(context.Background(), readyWithin)
	defer cancel()
	for {
		// WaitForReady waits for the server to listen; it listens before its models are loaded.
		reply, err := health.NewHealthClient(connection).Check(
			ctx, &health.HealthCheckRequest{}, grpc.WaitForReady(true))
		if err != nil {
			return fmt.Errorf("not ready within %v: %w", readyWithin, err)
		}
		if reply.Status == health.HealthCheckResponse_SERVING {
			return nil
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// rampTensor makes a float32 input whose element i is (i % 255) / 255.
func rampTensor(shape ...int64) (*pb.Tensor, error) {
	count := int64(1)
	for _, size := range shape {
		count *= size
	}
	values := make([]float32, count)
	for i := range values {
		values[i] = float32(i%255) / 255
	}
	data, err := binary.Append(nil, binary.LittleEndian, values)
	if err != nil {
		return nil, err
	}
	return &pb.Tensor{Dtype: pb.DataType_DATA_TYPE_FLOAT32, Shape: shape, Data: data}, nil
}

// show prints a line for each tensor of the reply, and one for each intervention of the request.
func show(features pb.FeatureServiceClient, what string, request *pb.ExtractRequest) error {
	ctx, cancel := context.WithTimeout(context.Background(), answerWithin)
	defer cancel()
	reply, err := features.Extract(ctx, request)
	if err != nil {
		return err
	}
	reports := map[string]*pb.Tensor{}
	for _, tensor := range reply.Tensors {
		if name, found := strings.CutPrefix(tensor.Name, "interventions."); found {
			reports[name] = tensor
			continue
		}
		numbers, err := summary(tensor)
		if err != nil {
			return err
		}
		shape := strings.Trim(strings.ReplaceAll(fmt.Sprint(tensor.Shape), " ", "x"), "[]")
		fmt.Printf("%s %s %s %s %s\n", what, tensor.Name, dtypeName(tensor), shape, numbers)
	}
	if len(reports) == 0 {
		return nil
	}
	return showInterventions(reports)
}

// summary returns the sum and the first of a tensor's elements as text.
func summary(tensor *pb.Tensor) (string, error) {
	if tensor.Dtype == pb.DataType_DATA_TYPE_INT64 {
		values, err := integers(tensor)
		if err != nil {
			return "", err
		}
		sum := int64(0)
		for _, value := range values {
			sum += value
		}
		return fmt.Sprintf("sum=%d first=%d", sum, values[0]), nil
	}
	values, err := floats(tensor)
	if err != nil {
		return "", err
	}
	sum := 0.0
	for _, value := range values {
		sum += float64(value)
	}
	return fmt.Sprintf("sum=%.4f first=%.6f", sum, values[0]), nil
}

// showInterventions prints a line for each intervention: the calls of modules and the elements that
// it selected, those whose value changed, and the norm of the selected elements before and after.
func showInterventions(reports map[string]*pb.Tensor) error {
	calls, err1 := integers(reports["calls"])
	selected, err2 := integers(reports["elements"])
	changed, err3 := integers(reports["changed"])
	norms, err4 := floats(reports["norm"]) // [N, 2]
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return err
	}
	for i := range calls {
		fmt.Printf("intervention %d calls=%d elements=%d changed=%d norm=%.4f->%.4f\n",
			i, calls[i], selected[i], changed[i], norms[2*i], norms[2*i+1])
	}
	return nil
}

// showRefusal prints how the server refuses a request: the status says what to do about it, the
// metadata which of the server's errors it is.
func showRefusal(features pb.FeatureServiceClient, request *pb.ExtractRequest) error {
	ctx, cancel := context.WithTimeout(context.Background(), answerWithin)
	defer cancel()
	var trailer metadata.MD
	_, err := features.Extract(ctx, request, grpc.Trailer(&trailer))
	if err == nil {
		return errors.New("the server was expected to refuse the request")
	}
	kind := strings.Join(trailer.Get("layertap-error"), ",")
	refusal := status.Convert(err)
	fmt.Printf("error %s %s %s\n", refusal.Code(), kind, refusal.Message())
	return nil
}
