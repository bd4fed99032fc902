"""The copy into a message: casts and strides."""

from __future__ import annotations

import functools
from fractions import Fraction
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layertap import _core, _pure

cores = pytest.mark.parametrize("core", [_core, _pure], ids=["core", "pure"])

F32, F16, BF16, F64, U8, I64 = 1, 2, 3, 4, 6, 9
FLOATS = {
    F32: np.dtype("<f4"),
    F16: np.dtype("<f2"),
    BF16: np.dtype(ml_dtypes.bfloat16),
    F64: np.dtype("<f8"),
}


def bits(array: np.ndarray) -> np.ndarray:
    """Return the bit patterns of an array, for which numpy exports a buffer."""
    return array.view(f"<u{array.itemsize}")


def through(core: ModuleType, array: np.ndarray, source: int, target: int) -> bytes:
    """Return an array's payload in a message."""
    layout = core.ReplyLayout([("", target, array.shape)], field=1, head_size=0)
    builder = core.ReplyBuilder(layout)
    builder.write(0, array, source)
    [(_, dtype, shape, data)] = core.decode(builder.finish(b""), field=1)[1]
    assert (dtype, shape) == (target, array.shape)
    return bytes(data)


# numpy warns of the very infinities and NaNs that are asked for.
quiet = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@functools.cache
def every_kind_of_value(source: int) -> np.ndarray:
    """Return all values of a 16-bit type; for wider types limits, halfway and random values."""
    dtype = FLOATS[source]
    if dtype.itemsize == 2:
        return np.arange(1 << 16, dtype=np.uint16).view(dtype)
    random = np.random.default_rng(0)
    whole = np.uint32 if dtype.itemsize == 4 else np.uint64
    wild = random.integers(0, np.iinfo(whole).max, 1 << 16, whole, endpoint=True).view(dtype)
    narrow = [
        np.arange(1 << 16, dtype=np.uint16).view(FLOATS[to]).astype(np.float64)
        for to in (F16, BF16)
    ]
    halfway = [(values[:-1] + values[1:]) / 2 for values in narrow]
    near = np.concatenate([*narrow, *halfway]).astype(dtype)
    edges = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 5e-324, 1e-45, 1e300], dtype)
    up, down = np.nextafter(near, dtype.type(np.inf)), np.nextafter(near, dtype.type(-np.inf))
    limits = np.array([np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal], dtype)
    signalling = np.array([0x7F800001, 0xFF800001, 0x7FBFFFFF], np.uint32).view(np.float32)
    return np.concatenate([wild, near, up, down, edges, limits, signalling.astype(dtype)])


def exact(values: np.ndarray, target: int) -> np.ndarray:
    """Cast float64 with one rounding, by exact arithmetic on the two neighbours of each value."""
    dtype = FLOATS[target]
    order = np.arange(0x8000, dtype=np.uint16).view(dtype).astype(np.float64)
    order = order[np.isfinite(order)]
    # The value after the largest, by which IEEE 754 judges what rounds to infinity.
    order = np.append(order, 2 * order[-1] - order[-2])
    out = []
    for value in values.tolist():
        low = min(int(np.searchsorted(order, abs(value), "right")) - 1, len(order) - 2)
        middle = (Fraction(order[low]) + Fraction(order[low + 1])) / 2
        size = Fraction(abs(value))
        up = size > middle or (size == middle and low % 2 == 1)
        out.append((low + up) | (0x8000 if np.signbit(value) else 0))
    return np.array(out, np.uint16).view(dtype)


def assert_same_floats(got: np.ndarray, expected: np.ndarray) -> None:
    """Check for equal bits, except that a NaN of the same sign may have any payload."""
    nan = np.isnan(expected)
    assert (np.isnan(got) == nan).all()
    assert (np.signbit(got) == np.signbit(expected)).all()
    assert (bits(got)[~nan] == bits(expected)[~nan]).all()


@quiet
@cores
@pytest.mark.parametrize("row", [1, 7, 9], ids=lambda n: f"runs of {n}")
@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_casts_agree_with_numpy(core: ModuleType, source: int, target: int, row: int) -> None:
    """Every cast gives numpy's bits for all kinds of values, in long and short arrays."""
    values = every_kind_of_value(source)
    values = values[: len(values) // row * row]
    # A column more than is sent makes each row a run of its own.
    padded = np.zeros((len(values) // row, row + (row > 1)), values.dtype)
    padded[:, :row] = values.reshape(-1, row)
    array = padded[:, :row]
    expected = array.astype(FLOATS[target])
    if (source, target) == (F64, BF16):
        # ml_dtypes goes by way of float32; only values that it has exactly are rounded once.
        once = (array.astype(np.float32) == array) | ~np.isfinite(array)
        array, expected = array[once], expected[once]
    got = np.frombuffer(through(core, bits(array), source, target), FLOATS[target])
    assert_same_floats(got, expected.reshape(-1))


@quiet
@cores
@pytest.mark.parametrize("target", [F16, BF16])
def test_float64_is_rounded_once(core: ModuleType, target: int) -> None:
    """Values close to halfway are rounded to the near side, although float32 would be halfway."""
    narrow = np.arange(0, 0x7C00, 37, dtype=np.uint16).view(FLOATS[target]).astype(np.float64)
    halfway = (narrow + np.nextafter(narrow.astype(FLOATS[target]), np.inf).astype(np.float64)) / 2
    off = halfway * 2.0**-40
    values = np.concatenate([halfway, halfway + off, halfway - off, -halfway - off, narrow + off])
    values = np.append(values, [65519.999999, 65520.0, 3.4e38, 3.3961775292304957e38, 1e-300])
    got = np.frombuffer(through(core, values, F64, target), FLOATS[target])
    assert_same_floats(got, exact(values, target))


@cores
def test_other_types_cast_to_themselves_only(core: ModuleType) -> None:
    """Integers and booleans are cast neither to each other nor to floats."""
    layout = core.ReplyLayout([("", 8, (2,)), ("", F32, (2,))], field=1, head_size=0)
    builder = core.ReplyBuilder(layout)
    for index, dtype, itemsize in ((0, I64, 8), (0, F32, 4), (0, U8, 1), (1, 8, 4), (1, 10, 1)):
        with pytest.raises(ValueError, match="no cast from"):
            builder.write(index, np.zeros(2, f"u{itemsize}"), dtype)


STRIDED = {
    "dense": lambda a: a,
    "transposed": lambda a: a.T,
    "reversed": lambda a: a[::-1, ::-1, ::-1],
    "reversed inside": lambda a: a[..., ::-1],
    "steps": lambda a: a[::2, :, ::3],
    "batch slice": lambda a: a[3:9],
    "column": lambda a: a[:, 5, 2],
    "broadcast": lambda a: np.broadcast_to(a[:, :1, None], (len(a), 4, 3, a.shape[2])),
    "broadcast inside": lambda a: np.broadcast_to(a[..., None], (*a.shape, 5)),
    "one element": lambda a: a[2, 3, 4],
    "empty": lambda a: a[:0],
    "singletons": lambda a: a[None, :, None, 4:5],
    "channels last": lambda a: a.transpose(2, 0, 1)[None],
    "rolled": lambda a: a.transpose(1, 2, 0),
    "unaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
}


@cores
@pytest.mark.parametrize("dtype", [U8, F16, F32, I64])
@pytest.mark.parametrize("kind", STRIDED)
def test_any_strides_become_dense(core: ModuleType, kind: str, dtype: int) -> None:
    """An array with any strides arrives as its elements in C order."""
    itemsize = {U8: 1, F16: 2, F32: 4, I64: 8}[dtype]
    base = np.random.default_rng(1).integers(0, 255, (19, 23, 37 * itemsize), np.uint8)
    array = STRIDED[kind](base.view(f"<u{itemsize}"))
    assert through(core, np.asarray(array), dtype, dtype) == array.tobytes()


@cores
@pytest.mark.parametrize(
    "shape", [(2, 64, 33, 35), (1, 3, 50, 50), (3, 130, 1, 9), (1, 17, 16, 16)]
)
def test_channels_last_is_sent_as_nchw(core: ModuleType, shape: tuple[int, ...]) -> None:
    """[N, C, H, W] in channels_last memory is transposed and cast in one pass."""
    n, c, h, w = shape
    nhwc = np.random.default_rng(2).standard_normal((n, h, w, c)).astype(np.float32)
    nchw = nhwc.transpose(0, 3, 1, 2)
    assert through(core, nchw, F32, F32) == nchw.tobytes()
    assert through(core, nchw, F32, F16) == nchw.astype(np.float16).tobytes()
    half = nchw.astype(np.float16)
    assert through(core, half, F16, BF16) == half.astype(ml_dtypes.bfloat16).tobytes()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_strided_copies_agree_with_the_twin(data: st.DataObject) -> None:
    """Any slicing and order of dimensions gives the same bytes as the plain-Python version."""
    shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    itemsize = data.draw(st.sampled_from([1, 2, 4, 8]))
    size = int(np.prod(shape)) * itemsize
    array = np.random.default_rng(size).bytes(size)
    view = np.frombuffer(array, f"<u{itemsize}").reshape(shape)
    view = view.transpose(data.draw(st.permutations(range(len(shape)))))
    steps = st.sampled_from([slice(None), slice(None, None, -1), slice(1, None, 2), slice(0, 1)])
    view = view[tuple(data.draw(steps) for _ in shape)]
    dtype = {1: U8, 2: F16, 4: F32, 8: I64}[itemsize]
    assert through(_core, view, dtype, dtype) == view.tobytes()
    assert through(_pure, view, dtype, dtype) == view.tobytes()
