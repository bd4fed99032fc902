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
    let elements = elements(tensor, DataType::Float32)?;
    // Little-endian by name: right on every machine.
    Ok(elements.iter().copied().map(f32::from_le_bytes))
}

/// Returns an int64 tensor's elements in row-major order, as [`floats`] does those of float32.
///
/// # Errors
///
/// As those of [`floats`].
pub fn integers(tensor: &Tensor) -> Result<impl ExactSizeIterator<Item = i64> + Clone, String> {
    let elements = elements(tensor, DataType::Int64)?;
    Ok(elements.iter().copied().map(i64::from_le_bytes))
}

/// Returns the bytes of each element of a tensor that must have this type, whose elements have `N`.
fn elements<const N: usize>(tensor: &Tensor, dtype: DataType) -> Result<&[[u8; N]], String> {
    let Tensor {
        name, shape, data, ..
    } = tensor;
    if tensor.dtype() != dtype {
        return Err(format!(
            "{name}: got {}, expected {}",
            dtype_name(tensor.dtype()),
            dtype_name(dtype)
        ));
    }
    let expected =
        bytes_of(shape, N).ok_or_else(|| format!("{name}: no tensor has the shape {shape:?}"))?;
    if data.len() != expected {
        return Err(format!(
            "{name}: got {} bytes, expected {expected} for {shape:?}",
            data.len()
        ));
    }
    let (elements, _) = data.as_chunks();
    Ok(elements)
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
pub fn dtype_name(dtype: DataType) -> String {
    let name = dtype.as_str_name();
    name.trim_start_matches("DATA_TYPE_").to_lowercase()
}

/// Returns none if a size is negative or the product overflows: sizes come from outside.
fn bytes_of(shape: &[i64], item_size: usize) -> Option<usize> {
    shape.iter().try_fold(item_size, |product, &size| {
        product.checked_mul(usize::try_from(size).ok()?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor_of(dtype: DataType, shape: &[i64], data: &'static [u8]) -> Tensor {
        let mut tensor = Tensor {
            name: "t".into(),
            shape: shape.to_vec(),
            data: data.into(),
            ..Default::default()
        };
        tensor.set_dtype(dtype);
        tensor
    }

    /// -2 and 2 to the power of 40, little-endian.
    const LONG: &[u8] = b"\xfe\xff\xff\xff\xff\xff\xff\xff\0\0\0\0\0\x01\0\0";

    #[test]
    fn elements_are_read_from_their_bytes() {
        let ramp = tensor(&[2, 2], |i| i as f32 - 1.5);
        assert!(floats(&ramp).unwrap().eq([-1.5, -0.5, 0.5, 1.5]));
        let long = tensor_of(DataType::Int64, &[1, 2], LONG);
        assert!(integers(&long).unwrap().eq([-2, 1 << 40]));
    }

    #[test]
    fn another_type_or_size_is_an_error_that_tells_both() {
        let refused = |tensor: &Tensor| integers(tensor).err().unwrap();
        let other = tensor_of(DataType::Float32, &[4], LONG);
        assert_eq!(refused(&other), "t: got float32, expected int64");
        let small = tensor_of(DataType::Int64, &[3], LONG);
        assert_eq!(refused(&small), "t: got 16 bytes, expected 24 for [3]");
        let huge = tensor_of(DataType::Int64, &[1 << 62, 16], LONG);
        assert!(refused(&huge).starts_with("t: no tensor has the shape"));
    }
}
