//! A tensor's bytes as native numbers, and native numbers as a tensor's bytes.

use crate::v1::{DataType, Tensor};

/// Returns a float32 tensor's elements in row-major order, read from the bytes that were received.
///
/// They come one by one, since a `&[f32]` must be aligned and these bytes are not: gRPC's header of
/// five bytes is in front of the message in tonic's buffer. `collect()` makes a `Vec` with one copy.
///
/// # Errors
///
/// Says what was got and expected if the type is another, or the size is not the shape's.
pub fn floats(tensor: &Tensor) -> Result<impl ExactSizeIterator<Item = f32> + Clone, String> {
    let Tensor {
        name, shape, data, ..
    } = tensor;
    if tensor.dtype() != DataType::Float32 {
        return Err(format!(
            "{name}: got {}, expected float32",
            dtype_name(tensor)
        ));
    }
    let expected =
        bytes_of(shape).ok_or_else(|| format!("{name}: no tensor has the shape {shape:?}"))?;
    if data.len() != expected {
        return Err(format!(
            "{name}: got {} bytes, expected {expected} for {shape:?}",
            data.len()
        ));
    }
    let (elements, _) = data.as_chunks();
    // Little-endian by name: right on every machine.
    Ok(elements.iter().copied().map(f32::from_le_bytes))
}

/// Returns a float32 tensor of that shape whose element i is made by `element(i)`.
pub fn tensor(shape: &[i64], element: impl Fn(usize) -> f32) -> Tensor {
    let count = shape.iter().product::<i64>() as usize;
    let mut tensor = Tensor {
        shape: shape.to_vec(),
        data: (0..count).flat_map(|i| element(i).to_le_bytes()).collect(),
        ..Default::default()
    };
    tensor.set_dtype(DataType::Float32);
    tensor
}

/// Returns the element type's name as numpy has it, such as `float32`.
pub fn dtype_name(tensor: &Tensor) -> String {
    let name = tensor.dtype().as_str_name();
    name.trim_start_matches("DATA_TYPE_").to_lowercase()
}

/// Returns none if a size is negative or the product overflows: sizes come from outside.
fn bytes_of(shape: &[i64]) -> Option<usize> {
    shape.iter().try_fold(size_of::<f32>(), |product, &size| {
        product.checked_mul(usize::try_from(size).ok()?)
    })
}
