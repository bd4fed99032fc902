from layertap.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Extractor(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXTRACTOR_UNSPECIFIED: _ClassVar[Extractor]
    EXTRACTOR_AUTO: _ClassVar[Extractor]
    EXTRACTOR_TORCHSCRIPT: _ClassVar[Extractor]
    EXTRACTOR_FX: _ClassVar[Extractor]
    EXTRACTOR_HOOK: _ClassVar[Extractor]
    EXTRACTOR_LAYER_GETTER: _ClassVar[Extractor]
    EXTRACTOR_CHILDREN: _ClassVar[Extractor]
    EXTRACTOR_EXPORT: _ClassVar[Extractor]

class Capture(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CAPTURE_UNSPECIFIED: _ClassVar[Capture]
    CAPTURE_OUTPUT: _ClassVar[Capture]
    CAPTURE_INPUT: _ClassVar[Capture]
    CAPTURE_GRADIENT: _ClassVar[Capture]
    CAPTURE_INPUT_GRADIENT: _ClassVar[Capture]

class LayerKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LAYER_KIND_UNSPECIFIED: _ClassVar[LayerKind]
    LAYER_KIND_MODULE: _ClassVar[LayerKind]
    LAYER_KIND_NODE: _ClassVar[LayerKind]

class Layout(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LAYOUT_UNSPECIFIED: _ClassVar[Layout]
    LAYOUT_CHANNELS_FIRST: _ClassVar[Layout]
    LAYOUT_CHANNELS_LAST: _ClassVar[Layout]
    LAYOUT_TOKENS: _ClassVar[Layout]

class KeptState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KEPT_STATE_UNSPECIFIED: _ClassVar[KeptState]
    KEPT_STATE_NONE: _ClassVar[KeptState]
    KEPT_STATE_RESET: _ClassVar[KeptState]
    KEPT_STATE_KEPT: _ClassVar[KeptState]
EXTRACTOR_UNSPECIFIED: Extractor
EXTRACTOR_AUTO: Extractor
EXTRACTOR_TORCHSCRIPT: Extractor
EXTRACTOR_FX: Extractor
EXTRACTOR_HOOK: Extractor
EXTRACTOR_LAYER_GETTER: Extractor
EXTRACTOR_CHILDREN: Extractor
EXTRACTOR_EXPORT: Extractor
CAPTURE_UNSPECIFIED: Capture
CAPTURE_OUTPUT: Capture
CAPTURE_INPUT: Capture
CAPTURE_GRADIENT: Capture
CAPTURE_INPUT_GRADIENT: Capture
LAYER_KIND_UNSPECIFIED: LayerKind
LAYER_KIND_MODULE: LayerKind
LAYER_KIND_NODE: LayerKind
LAYOUT_UNSPECIFIED: Layout
LAYOUT_CHANNELS_FIRST: Layout
LAYOUT_CHANNELS_LAST: Layout
LAYOUT_TOKENS: Layout
KEPT_STATE_UNSPECIFIED: KeptState
KEPT_STATE_NONE: KeptState
KEPT_STATE_RESET: KeptState
KEPT_STATE_KEPT: KeptState

class Dimension(_message.Message):
    __slots__ = ("size", "batch", "free", "expression", "varies")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    EXPRESSION_FIELD_NUMBER: _ClassVar[int]
    VARIES_FIELD_NUMBER: _ClassVar[int]
    size: int
    batch: bool
    free: str
    expression: str
    varies: bool
    def __init__(self, size: _Optional[int] = ..., batch: bool = ..., free: _Optional[str] = ..., expression: _Optional[str] = ..., varies: bool = ...) -> None: ...

class TensorSpec(_message.Message):
    __slots__ = ("dtype", "shape", "bytes_per_item", "dynamic", "quantized", "interleaved")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_ITEM_FIELD_NUMBER: _ClassVar[int]
    DYNAMIC_FIELD_NUMBER: _ClassVar[int]
    QUANTIZED_FIELD_NUMBER: _ClassVar[int]
    INTERLEAVED_FIELD_NUMBER: _ClassVar[int]
    dtype: _tensor_pb2.DataType
    shape: _containers.RepeatedCompositeFieldContainer[Dimension]
    bytes_per_item: int
    dynamic: bool
    quantized: str
    interleaved: bool
    def __init__(self, dtype: _Optional[_Union[_tensor_pb2.DataType, str]] = ..., shape: _Optional[_Iterable[_Union[Dimension, _Mapping]]] = ..., bytes_per_item: _Optional[int] = ..., dynamic: bool = ..., quantized: _Optional[str] = ..., interleaved: bool = ...) -> None: ...

class CaptureSupport(_message.Message):
    __slots__ = ("capture", "served", "reason")
    CAPTURE_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    capture: Capture
    served: bool
    reason: str
    def __init__(self, capture: _Optional[_Union[Capture, str]] = ..., served: bool = ..., reason: _Optional[str] = ...) -> None: ...

class ExtractorSupport(_message.Message):
    __slots__ = ("extractor", "captures")
    EXTRACTOR_FIELD_NUMBER: _ClassVar[int]
    CAPTURES_FIELD_NUMBER: _ClassVar[int]
    extractor: Extractor
    captures: _containers.RepeatedCompositeFieldContainer[CaptureSupport]
    def __init__(self, extractor: _Optional[_Union[Extractor, str]] = ..., captures: _Optional[_Iterable[_Union[CaptureSupport, _Mapping]]] = ...) -> None: ...

class Layer(_message.Message):
    __slots__ = ("name", "kind", "type", "calls", "output", "input", "channels", "reduction", "extractors", "layout", "grid", "front_tokens", "same_as", "is_result")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    REDUCTION_FIELD_NUMBER: _ClassVar[int]
    EXTRACTORS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    GRID_FIELD_NUMBER: _ClassVar[int]
    FRONT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAME_AS_FIELD_NUMBER: _ClassVar[int]
    IS_RESULT_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: LayerKind
    type: str
    calls: int
    output: TensorSpec
    input: TensorSpec
    channels: int
    reduction: float
    extractors: _containers.RepeatedCompositeFieldContainer[ExtractorSupport]
    layout: Layout
    grid: _containers.RepeatedScalarFieldContainer[int]
    front_tokens: int
    same_as: str
    is_result: bool
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[_Union[LayerKind, str]] = ..., type: _Optional[str] = ..., calls: _Optional[int] = ..., output: _Optional[_Union[TensorSpec, _Mapping]] = ..., input: _Optional[_Union[TensorSpec, _Mapping]] = ..., channels: _Optional[int] = ..., reduction: _Optional[float] = ..., extractors: _Optional[_Iterable[_Union[ExtractorSupport, _Mapping]]] = ..., layout: _Optional[_Union[Layout, str]] = ..., grid: _Optional[_Iterable[int]] = ..., front_tokens: _Optional[int] = ..., same_as: _Optional[str] = ..., is_result: bool = ...) -> None: ...

class RefusedPlan(_message.Message):
    __slots__ = ("extractor", "layers", "inputs", "reason")
    EXTRACTOR_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    extractor: Extractor
    layers: _containers.RepeatedScalarFieldContainer[str]
    inputs: _containers.RepeatedCompositeFieldContainer[ItemTensor]
    reason: str
    def __init__(self, extractor: _Optional[_Union[Extractor, str]] = ..., layers: _Optional[_Iterable[str]] = ..., inputs: _Optional[_Iterable[_Union[ItemTensor, _Mapping]]] = ..., reason: _Optional[str] = ...) -> None: ...

class ExtractorVariants(_message.Message):
    __slots__ = ("extractor", "names")
    EXTRACTOR_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    extractor: Extractor
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, extractor: _Optional[_Union[Extractor, str]] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class ItemTensor(_message.Message):
    __slots__ = ("name", "dtype", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: _tensor_pb2.DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[_tensor_pb2.DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class InputSpec(_message.Message):
    __slots__ = ("dtype", "shape", "images", "preprocessing", "image_preprocessing", "name", "optional", "texts", "tokenization", "audio", "sampling_rate", "audio_preprocessing")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    PREPROCESSING_FIELD_NUMBER: _ClassVar[int]
    IMAGE_PREPROCESSING_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    OPTIONAL_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZATION_FIELD_NUMBER: _ClassVar[int]
    AUDIO_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_RATE_FIELD_NUMBER: _ClassVar[int]
    AUDIO_PREPROCESSING_FIELD_NUMBER: _ClassVar[int]
    dtype: _tensor_pb2.DataType
    shape: _containers.RepeatedCompositeFieldContainer[Dimension]
    images: bool
    preprocessing: str
    image_preprocessing: ImagePreprocessing
    name: str
    optional: bool
    texts: bool
    tokenization: str
    audio: bool
    sampling_rate: int
    audio_preprocessing: str
    def __init__(self, dtype: _Optional[_Union[_tensor_pb2.DataType, str]] = ..., shape: _Optional[_Iterable[_Union[Dimension, _Mapping]]] = ..., images: bool = ..., preprocessing: _Optional[str] = ..., image_preprocessing: _Optional[_Union[ImagePreprocessing, _Mapping]] = ..., name: _Optional[str] = ..., optional: bool = ..., texts: bool = ..., tokenization: _Optional[str] = ..., audio: bool = ..., sampling_rate: _Optional[int] = ..., audio_preprocessing: _Optional[str] = ...) -> None: ...

class ImagePreprocessing(_message.Message):
    __slots__ = ("color", "exif_orientation", "resize", "resize_mode", "interpolation", "crop", "mean", "std", "origin", "assumed", "custom")
    COLOR_FIELD_NUMBER: _ClassVar[int]
    EXIF_ORIENTATION_FIELD_NUMBER: _ClassVar[int]
    RESIZE_FIELD_NUMBER: _ClassVar[int]
    RESIZE_MODE_FIELD_NUMBER: _ClassVar[int]
    INTERPOLATION_FIELD_NUMBER: _ClassVar[int]
    CROP_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    ASSUMED_FIELD_NUMBER: _ClassVar[int]
    CUSTOM_FIELD_NUMBER: _ClassVar[int]
    color: str
    exif_orientation: bool
    resize: _containers.RepeatedScalarFieldContainer[int]
    resize_mode: str
    interpolation: str
    crop: _containers.RepeatedScalarFieldContainer[int]
    mean: _containers.RepeatedScalarFieldContainer[float]
    std: _containers.RepeatedScalarFieldContainer[float]
    origin: str
    assumed: _containers.RepeatedScalarFieldContainer[str]
    custom: str
    def __init__(self, color: _Optional[str] = ..., exif_orientation: bool = ..., resize: _Optional[_Iterable[int]] = ..., resize_mode: _Optional[str] = ..., interpolation: _Optional[str] = ..., crop: _Optional[_Iterable[int]] = ..., mean: _Optional[_Iterable[float]] = ..., std: _Optional[_Iterable[float]] = ..., origin: _Optional[str] = ..., assumed: _Optional[_Iterable[str]] = ..., custom: _Optional[str] = ...) -> None: ...

class PassRules(_message.Message):
    __slots__ = ("early_stop", "concurrent", "shared", "state")
    EARLY_STOP_FIELD_NUMBER: _ClassVar[int]
    CONCURRENT_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    early_stop: bool
    concurrent: bool
    shared: bool
    state: KeptState
    def __init__(self, early_stop: bool = ..., concurrent: bool = ..., shared: bool = ..., state: _Optional[_Union[KeptState, str]] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "source", "weights", "device", "inputs", "declared_layers", "notes", "pass_rules", "fingerprint", "variants")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    DECLARED_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    PASS_RULES_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    weights: str
    device: str
    inputs: _containers.RepeatedCompositeFieldContainer[InputSpec]
    declared_layers: _containers.RepeatedScalarFieldContainer[str]
    notes: _containers.RepeatedScalarFieldContainer[str]
    pass_rules: PassRules
    fingerprint: str
    variants: _containers.RepeatedCompositeFieldContainer[ExtractorVariants]
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ..., weights: _Optional[str] = ..., device: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[InputSpec, _Mapping]]] = ..., declared_layers: _Optional[_Iterable[str]] = ..., notes: _Optional[_Iterable[str]] = ..., pass_rules: _Optional[_Union[PassRules, _Mapping]] = ..., fingerprint: _Optional[str] = ..., variants: _Optional[_Iterable[_Union[ExtractorVariants, _Mapping]]] = ...) -> None: ...
