// Between a tensor's bytes, which are little-endian on the wire, and typed arrays, which have the
// byte order of the machine.

import { endianness } from "node:os";

const sameByteOrder = endianness() === "LE";

/** The bytes of a Float32Array: a view of its memory where the byte orders agree. */
export function fromFloats(values) {
  const bytes = Buffer.from(values.buffer, values.byteOffset, values.byteLength);
  return sameByteOrder ? bytes : Buffer.from(bytes).swap32();
}

/** The elements of a float32 tensor in row-major order. */
export function toFloats(tensor) {
  return elements(tensor, "DATA_TYPE_FLOAT32", Float32Array);
}

/** The elements of an int64 tensor in row-major order, as BigInts. */
export function toIntegers(tensor) {
  return elements(tensor, "DATA_TYPE_INT64", BigInt64Array);
}

/** The element type's name as numpy has it, such as float32. */
export function nameOf(dtype) {
  return dtype.replace("DATA_TYPE_", "").toLowerCase();
}

/**
 * A typed array can be a view of memory only from a multiple of its elements' size on. The tensor's
 * bytes are a view of the received message, in which the server begins them at a multiple of 16; but
 * grpc-js 1.14 keeps the 5 bytes of gRPC's framing in front of the message, so today they are
 * copied. Looking costs nothing, and saves the copy wherever they do lie right.
 */
function elements({ name, dtype, shape, data }, expectedType, TypedArray) {
  if (dtype !== expectedType) {
    throw new TypeError(`${name}: expected ${expectedType}, got ${dtype}`);
  }
  const itemSize = TypedArray.BYTES_PER_ELEMENT;
  const expected = shape.reduce((product, size) => product * size, itemSize);
  if (data.length !== expected) {
    throw new RangeError(`${name}: shape [${shape}] takes ${expected} bytes, got ${data.length}`);
  }
  if (sameByteOrder && data.byteOffset % itemSize === 0) {
    return new TypedArray(data.buffer, data.byteOffset, data.length / itemSize);
  }
  const copy = new Uint8Array(data);
  if (!sameByteOrder) swap(Buffer.from(copy.buffer), itemSize);
  return new TypedArray(copy.buffer);
}

/** Turns the bytes of each element around. */
function swap(bytes, itemSize) {
  if (itemSize === 8) bytes.swap64();
  else bytes.swap32();
}
