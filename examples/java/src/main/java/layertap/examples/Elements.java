package layertap.examples;

import com.google.protobuf.UnsafeByteOperations;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.FloatBuffer;
import java.nio.LongBuffer;
import java.util.List;
import java.util.Locale;
import java.util.function.IntToDoubleFunction;
import layertap.v1.DataType;
import layertap.v1.Tensor;

/** A tensor's bytes as native numbers, and native numbers as a tensor's bytes. */
final class Elements {
  private Elements() {}

  /**
   * Returns a float32 tensor's elements in row-major order: a read-only view of the received bytes,
   * without a copy. A buffer knows its byte order and reads elements that are not aligned, so it
   * works on every machine.
   *
   * @throws IllegalArgumentException if the type is another, or the size is not the shape's
   */
  static FloatBuffer floats(Tensor tensor) {
    return bytes(tensor, DataType.DATA_TYPE_FLOAT32, Float.BYTES).asFloatBuffer();
  }

  /**
   * Returns an int64 tensor's elements, as {@link #floats} does those of float32.
   *
   * @throws IllegalArgumentException if the type is another, or the size is not the shape's
   */
  static LongBuffer integers(Tensor tensor) {
    return bytes(tensor, DataType.DATA_TYPE_INT64, Long.BYTES).asLongBuffer();
  }

  private static ByteBuffer bytes(Tensor tensor, DataType type, int itemBytes) {
    if (tensor.getDtype() != type) {
      throw new IllegalArgumentException(
          "%s: got %s, expected %s"
              .formatted(tensor.getName(), nameOf(tensor.getDtype()), nameOf(type)));
    }
    long expected = bytesOf(tensor.getShapeList(), itemBytes);
    if (tensor.getData().size() != expected) {
      throw new IllegalArgumentException(
          "%s: got %d bytes, expected %d for %s"
              .formatted(
                  tensor.getName(), tensor.getData().size(), expected, tensor.getShapeList()));
    }
    // A ByteBuffer's own order is big-endian, everywhere.
    return tensor.getData().asReadOnlyByteBuffer().order(ByteOrder.LITTLE_ENDIAN);
  }

  /** Returns a float32 tensor of that shape whose element i is made by {@code element}. */
  static Tensor tensor(List<Long> shape, IntToDoubleFunction element) {
    var bytes = ByteBuffer.allocate(Math.toIntExact(bytesOf(shape, Float.BYTES)));
    var elements = bytes.order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer();
    for (int i = 0; i < elements.limit(); i++) {
      elements.put(i, (float) element.applyAsDouble(i));
    }
    return Tensor.newBuilder()
        .setDtype(DataType.DATA_TYPE_FLOAT32)
        .addAllShape(shape)
        // Not copied, which is safe because nobody else has the buffer.
        .setData(UnsafeByteOperations.unsafeWrap(bytes))
        .build();
  }

  /** Returns a type's name as numpy has it, such as {@code float32}. */
  static String nameOf(DataType type) {
    return type.name().replace("DATA_TYPE_", "").toLowerCase(Locale.ROOT);
  }

  /** Sizes come from outside: the product must not wrap around. */
  private static long bytesOf(List<Long> shape, int itemBytes) {
    long product = itemBytes;
    for (long size : shape) {
      if (size < 0 || (size > 0 && product > Long.MAX_VALUE / size)) {
        throw new IllegalArgumentException("no tensor has the shape " + shape);
      }
      product *= size;
    }
    return product;
  }
}
