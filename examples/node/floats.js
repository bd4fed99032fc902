// Between a tensor's bytes, which are little-endian on the wire, and Float32Array, which has the
// byte order of the machine.

import { endianness } from "node:os";

const SIZE = Float32Array.BYTES_PER_ELEMENT;
const sameByteOrder = endianness() === "LE";

/** The bytes of a Float32Array: a view of its memory where the byte orders agree. */
export function fromFloats(values) {
  const bytes = Buffer.from(values.buffer, values.byteOffset, values.byteLength);
  return sameByteOrder ? bytes : Buffer.from(bytes).swap32();
}

/**
 * The elements of a float32 tensor in row-major order.
 *
 * A Float32Array can be a view of memory only from a multiple of 4 on. The tensor's bytes are a view
 * of the received message, in which the server begins them at a multiple of 16; but grpc-js 1.14
 * keeps the 5 bytes of gRPC's framing in front of the message, so today they are copied. Looking
 * costs nothing, and saves the copy wherever they do lie right.
 */
export function toFloats({ name, dtype, shape, data }) {
  if (dtype !== "DATA_TYPE_FLOAT32") {
    throw new TypeError(`${name}: expected DATA_TYPE_FLOAT32, got ${dtype}`);
  }
  const expected = shape.reduce((product, size) => product * size, SIZE);
  if (data.length !== expected) {
    throw new RangeError(`${name}: shape [${shape}] takes ${expected} bytes, got ${data.length}`);
  }
  if (sameByteOrder && data.byteOffset % SIZE === 0) {
    return new Float32Array(data.buffer, data.byteOffset, data.length / SIZE);
  }
  const copy = new Uint8Array(data);
  if (!sameByteOrder) Buffer.from(copy.buffer).swap32();
  return new Float32Array(copy.buffer);
}
