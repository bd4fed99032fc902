import assert from "node:assert/strict";
import { test } from "node:test";
import { fromFloats, toFloats, toIntegers } from "./elements.js";

// 1.0, -2.0 and 0.5, little-endian.
const ELEMENTS = [0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0, 0, 0, 0, 0x3f];
const tensor = (shape, data, dtype = "DATA_TYPE_FLOAT32") => ({ name: "t", dtype, shape, data });

test("the elements are the same at each alignment", () => {
  for (const offset of [0, 1, 2, 3, 4]) {
    const memory = Buffer.from(new ArrayBuffer(16));
    const data = memory.subarray(offset, offset + ELEMENTS.length);
    data.set(ELEMENTS);
    assert.deepEqual(toFloats(tensor([1, 3], data)), Float32Array.of(1, -2, 0.5));
  }
});

test("whole numbers are the same at each alignment, over 32 bits too", () => {
  // -2 and 2 to the power of 40, little-endian.
  const bytes = [0xfe, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 0, 0, 1, 0, 0];
  for (let offset = 0; offset < 9; offset++) {
    const data = Buffer.from(new ArrayBuffer(32)).subarray(offset, offset + bytes.length);
    data.set(bytes);
    const found = toIntegers(tensor([2], data, "DATA_TYPE_INT64"));
    assert.deepEqual(found, BigInt64Array.of(-2n, 1n << 40n));
  }
});

test("what goes out is what came in", () => {
  assert.deepEqual([...fromFloats(Float32Array.of(1, -2, 0.5))], ELEMENTS);
});

test("a size that does not go with the shape, and another type, are errors that tell both", () => {
  const data = Buffer.from(ELEMENTS);
  assert.throws(() => toFloats(tensor([2, 2], data)), /shape \[2,2\] takes 16 bytes, got 12/);
  assert.throws(() => toFloats(tensor([6], data, "DATA_TYPE_FLOAT16")), /got DATA_TYPE_FLOAT16/);
  assert.throws(() => toIntegers(tensor([3], data)), /expected DATA_TYPE_INT64, got DATA_TYPE_F/);
});
