package main

import (
	"encoding/binary"
	"fmt"
	"strings"
	"unsafe"

	pb "layertap.example/client/layertap/v1"
)

// Elements are little-endian on the wire, whatever the machine.
var sameByteOrder = binary.NativeEndian.Uint16([]byte{1, 0}) == 1

// floats returns the elements of a float32 tensor in row-major order; see elements.
func floats(tensor *pb.Tensor) ([]float32, error) {
	return elements[float32](tensor, pb.DataType_DATA_TYPE_FLOAT32)
}

// integers returns the elements of an int64 tensor in row-major order; see elements.
func integers(tensor *pb.Tensor) ([]int64, error) {
	return elements[int64](tensor, pb.DataType_DATA_TYPE_INT64)
}

// elements returns the elements of a tensor of type T, whose name in the contract is dtype.
//
// They are a view of tensor.Data, without a copy, where this machine has the wire's byte order and
// the bytes begin at a multiple of T's alignment. They do as protobuf unmarshals them, since it gives
// each bytes field memory of its own. Otherwise they are decoded into a new slice.
func elements[T float32 | int64](tensor *pb.Tensor, dtype pb.DataType) ([]T, error) {
	if tensor.GetDtype() != dtype {
		return nil, fmt.Errorf("%s: expected %s, got %s", tensor.GetName(), dtype, tensor.GetDtype())
	}
	var element T
	expected := int64(unsafe.Sizeof(element))
	for _, size := range tensor.Shape {
		expected *= size
	}
	if int64(len(tensor.Data)) != expected {
		return nil, fmt.Errorf("%s: shape %v takes %d bytes, got %d",
			tensor.Name, tensor.Shape, expected, len(tensor.Data))
	}
	count := len(tensor.Data) / int(unsafe.Sizeof(element))
	address := unsafe.Pointer(unsafe.SliceData(tensor.Data))
	if sameByteOrder && uintptr(address)%unsafe.Alignof(element) == 0 {
		return unsafe.Slice((*T)(address), count), nil
	}
	values := make([]T, count)
	_, err := binary.Decode(tensor.Data, binary.LittleEndian, values)
	return values, err
}

// dtypeName returns the element type's name as numpy has it, such as float32.
func dtypeName(tensor *pb.Tensor) string {
	return strings.ToLower(strings.TrimPrefix(tensor.Dtype.String(), "DATA_TYPE_"))
}
