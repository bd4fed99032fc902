package main

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"unsafe"

	pb "layertap.example/client/layertap/v1"
)

// 1.0, -2.0 and 0.5, little-endian.
var ofFloats = []byte{0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0, 0, 0, 0, 0x3f}

func tensorOf(data []byte, shape ...int64) *pb.Tensor {
	return &pb.Tensor{Name: "t", Dtype: pb.DataType_DATA_TYPE_FLOAT32, Shape: shape, Data: data}
}

// The elements are the same at each alignment, and a view of the bytes at that of a float32.
func TestFloatsAtEachAlignment(t *testing.T) {
	for offset := range 4 {
		data := append(make([]byte, offset, 64), ofFloats...)[offset:]
		values, err := floats(tensorOf(data, 1, 3))
		if err != nil || !slices.Equal(values, []float32{1, -2, 0.5}) {
			t.Errorf("offset %d: got %v, %v", offset, values, err)
		}
		view := unsafe.Pointer(&values[0]) == unsafe.Pointer(&data[0])
		if view != (sameByteOrder && offset == 0) {
			t.Errorf("offset %d: a view is %v", offset, view)
		}
	}
}

// The elements are the same at each alignment, negative ones and those over 32 bits too.
func TestIntegersAtEachAlignment(t *testing.T) {
	// -2 and 2 to the power of 40, little-endian.
	long := []byte{0xfe, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 0, 0, 1, 0, 0}
	for offset := range 8 {
		tensor := tensorOf(append(make([]byte, offset, 64), long...)[offset:], 2)
		tensor.Dtype = pb.DataType_DATA_TYPE_INT64
		values, err := integers(tensor)
		if err != nil || !slices.Equal(values, []int64{-2, 1 << 40}) {
			t.Errorf("offset %d: got %v, %v", offset, values, err)
		}
	}
}

// A tensor whose size does not go with its shape, or of another type, is an error that tells both.
func TestFloatsRefused(t *testing.T) {
	half := tensorOf(bytes.Clone(ofFloats), 6)
	half.Dtype = pb.DataType_DATA_TYPE_FLOAT16
	for text, tensor := range map[string]*pb.Tensor{
		"t: shape [2 2] takes 16 bytes, got 12":                tensorOf(ofFloats, 2, 2),
		"t: expected DATA_TYPE_FLOAT32, got DATA_TYPE_FLOAT16": half,
	} {
		if _, err := floats(tensor); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("expected %q, got %v", text, err)
		}
	}
}

// A tensor of floats is not read as integers.
func TestIntegersRefused(t *testing.T) {
	_, err := integers(tensorOf(ofFloats, 3))
	text := "t: expected DATA_TYPE_INT64, got DATA_TYPE_FLOAT32"
	if err == nil || err.Error() != text {
		t.Errorf("expected %q, got %v", text, err)
	}
}
