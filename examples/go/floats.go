package main

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	pb "layertap.example/client/layertap/v1"
)

// Elements are little-endian on the wire, whatever the machine.
var sameByteOrder = binary.NativeEndian.Uint16([]byte{1, 0}) == 1

// floats returns the elements of a float32 tensor in row-major order.
//
// They are a view of tensor.Data, without a copy, where this machine has the wire's byte order and
// the bytes begin at a multiple of 4. They do as protobuf unmarshals them, since it gives each bytes
// field memory of its own. Otherwise they are decoded into a new slice.
func floats(tensor *pb.Tensor) ([]float32, error) {
	if tensor.Dtype != pb.DataType_DATA_TYPE_FLOAT32 {
		return nil, fmt.Errorf("%s: expected DATA_TYPE_FLOAT32, got %s", tensor.Name, tensor.Dtype)
	}
	expected := int64(4)
	for _, size := range tensor.Shape {
		expected *= size
	}
	if int64(len(tensor.Data)) != expected {
		return nil, fmt.Errorf("%s: shape %v takes %d bytes, got %d",
			tensor.Name, tensor.Shape, expected, len(tensor.Data))
	}
	count := len(tensor.Data) / 4
	address := unsafe.Pointer(unsafe.SliceData(tensor.Data))
	if sameByteOrder && uintptr(address)%unsafe.Alignof(float32(0)) == 0 {
		return unsafe.Slice((*float32)(address), count), nil
	}
	values := make([]float32, count)
	_, err := binary.Decode(tensor.Data, binary.LittleEndian, values)
	return values, err
}
