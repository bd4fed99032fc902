from layertap.v1 import catalogue_pb2 as _catalogue_pb2
from layertap.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Reduction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REDUCTION_UNSPECIFIED: _ClassVar[Reduction]
    REDUCTION_NONE: _ClassVar[Reduction]
    REDUCTION_GLOBAL_AVERAGE_POOL: _ClassVar[Reduction]
    REDUCTION_FLATTEN: _ClassVar[Reduction]
    REDUCTION_CLASS_TOKEN: _ClassVar[Reduction]
    REDUCTION_TOKEN_GRID: _ClassVar[Reduction]
    REDUCTION_LAST_TOKEN: _ClassVar[Reduction]
    REDUCTION_TOKEN_MAX: _ClassVar[Reduction]
    REDUCTION_TOKENS: _ClassVar[Reduction]
    REDUCTION_WORDS: _ClassVar[Reduction]

class Truncation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRUNCATION_UNSPECIFIED: _ClassVar[Truncation]
    TRUNCATION_NONE: _ClassVar[Truncation]
    TRUNCATION_END: _ClassVar[Truncation]
    TRUNCATION_START: _ClassVar[Truncation]

class Method(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    METHOD_UNSPECIFIED: _ClassVar[Method]
    METHOD_GRADIENT: _ClassVar[Method]
    METHOD_GRADIENT_X_ACTIVATION: _ClassVar[Method]
    METHOD_GRAD_CAM: _ClassVar[Method]
    METHOD_HIRES_CAM: _ClassVar[Method]
    METHOD_LAYER_CAM: _ClassVar[Method]
    METHOD_GRAD_CAM_PLUS_PLUS: _ClassVar[Method]
    METHOD_INTEGRATED_GRADIENTS: _ClassVar[Method]
    METHOD_SMOOTH_GRAD: _ClassVar[Method]
    METHOD_EIGEN_CAM: _ClassVar[Method]
    METHOD_GUIDED_BACKPROPAGATION: _ClassVar[Method]

class MapForm(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MAP_FORM_UNSPECIFIED: _ClassVar[MapForm]
    MAP_FORM_GRID: _ClassVar[MapForm]
    MAP_FORM_RESIZED: _ClassVar[MapForm]
    MAP_FORM_OVERLAY: _ClassVar[MapForm]

class IntegrationRule(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INTEGRATION_RULE_UNSPECIFIED: _ClassVar[IntegrationRule]
    INTEGRATION_RULE_GAUSS_LEGENDRE: _ClassVar[IntegrationRule]
    INTEGRATION_RULE_TRAPEZOID: _ClassVar[IntegrationRule]
    INTEGRATION_RULE_LEFT: _ClassVar[IntegrationRule]
    INTEGRATION_RULE_MIDDLE: _ClassVar[IntegrationRule]
    INTEGRATION_RULE_RIGHT: _ClassVar[IntegrationRule]

class Resize(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESIZE_UNSPECIFIED: _ClassVar[Resize]
    RESIZE_BILINEAR: _ClassVar[Resize]
    RESIZE_AVERAGE_POOL: _ClassVar[Resize]

class Measure(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MEASURE_UNSPECIFIED: _ClassVar[Measure]
    MEASURE_ELEMENT: _ClassVar[Measure]
    MEASURE_MAXIMUM: _ClassVar[Measure]
    MEASURE_SUM: _ClassVar[Measure]
    MEASURE_MEAN: _ClassVar[Measure]
    MEASURE_NORM: _ClassVar[Measure]
    MEASURE_LOG_PROBABILITY: _ClassVar[Measure]
    MEASURE_DOT: _ClassVar[Measure]

class Axis(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AXIS_UNSPECIFIED: _ClassVar[Axis]
    AXIS_ITEM: _ClassVar[Axis]
    AXIS_CHANNEL: _ClassVar[Axis]
    AXIS_TOKEN: _ClassVar[Axis]
    AXIS_HEAD: _ClassVar[Axis]
    AXIS_Y: _ClassVar[Axis]
    AXIS_X: _ClassVar[Axis]
    AXIS_DIMENSION: _ClassVar[Axis]

class Operation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATION_UNSPECIFIED: _ClassVar[Operation]
    OPERATION_ZERO: _ClassVar[Operation]
    OPERATION_SET: _ClassVar[Operation]
    OPERATION_MEAN: _ClassVar[Operation]
    OPERATION_SCALE: _ClassVar[Operation]
    OPERATION_ADD: _ClassVar[Operation]
    OPERATION_REPLACE: _ClassVar[Operation]
    OPERATION_PATCH: _ClassVar[Operation]
    OPERATION_PROJECT_OUT: _ClassVar[Operation]
    OPERATION_PROJECT_KEEP: _ClassVar[Operation]
    OPERATION_CAP: _ClassVar[Operation]
    OPERATION_CLAMP: _ClassVar[Operation]
    OPERATION_NOISE: _ClassVar[Operation]
    OPERATION_SKIP: _ClassVar[Operation]
REDUCTION_UNSPECIFIED: Reduction
REDUCTION_NONE: Reduction
REDUCTION_GLOBAL_AVERAGE_POOL: Reduction
REDUCTION_FLATTEN: Reduction
REDUCTION_CLASS_TOKEN: Reduction
REDUCTION_TOKEN_GRID: Reduction
REDUCTION_LAST_TOKEN: Reduction
REDUCTION_TOKEN_MAX: Reduction
REDUCTION_TOKENS: Reduction
REDUCTION_WORDS: Reduction
TRUNCATION_UNSPECIFIED: Truncation
TRUNCATION_NONE: Truncation
TRUNCATION_END: Truncation
TRUNCATION_START: Truncation
METHOD_UNSPECIFIED: Method
METHOD_GRADIENT: Method
METHOD_GRADIENT_X_ACTIVATION: Method
METHOD_GRAD_CAM: Method
METHOD_HIRES_CAM: Method
METHOD_LAYER_CAM: Method
METHOD_GRAD_CAM_PLUS_PLUS: Method
METHOD_INTEGRATED_GRADIENTS: Method
METHOD_SMOOTH_GRAD: Method
METHOD_EIGEN_CAM: Method
METHOD_GUIDED_BACKPROPAGATION: Method
MAP_FORM_UNSPECIFIED: MapForm
MAP_FORM_GRID: MapForm
MAP_FORM_RESIZED: MapForm
MAP_FORM_OVERLAY: MapForm
INTEGRATION_RULE_UNSPECIFIED: IntegrationRule
INTEGRATION_RULE_GAUSS_LEGENDRE: IntegrationRule
INTEGRATION_RULE_TRAPEZOID: IntegrationRule
INTEGRATION_RULE_LEFT: IntegrationRule
INTEGRATION_RULE_MIDDLE: IntegrationRule
INTEGRATION_RULE_RIGHT: IntegrationRule
RESIZE_UNSPECIFIED: Resize
RESIZE_BILINEAR: Resize
RESIZE_AVERAGE_POOL: Resize
MEASURE_UNSPECIFIED: Measure
MEASURE_ELEMENT: Measure
MEASURE_MAXIMUM: Measure
MEASURE_SUM: Measure
MEASURE_MEAN: Measure
MEASURE_NORM: Measure
MEASURE_LOG_PROBABILITY: Measure
MEASURE_DOT: Measure
AXIS_UNSPECIFIED: Axis
AXIS_ITEM: Axis
AXIS_CHANNEL: Axis
AXIS_TOKEN: Axis
AXIS_HEAD: Axis
AXIS_Y: Axis
AXIS_X: Axis
AXIS_DIMENSION: Axis
OPERATION_UNSPECIFIED: Operation
OPERATION_ZERO: Operation
OPERATION_SET: Operation
OPERATION_MEAN: Operation
OPERATION_SCALE: Operation
OPERATION_ADD: Operation
OPERATION_REPLACE: Operation
OPERATION_PATCH: Operation
OPERATION_PROJECT_OUT: Operation
OPERATION_PROJECT_KEEP: Operation
OPERATION_CAP: Operation
OPERATION_CLAMP: Operation
OPERATION_NOISE: Operation
OPERATION_SKIP: Operation

class ImageBatch(_message.Message):
    __slots__ = ("images", "input")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedScalarFieldContainer[bytes]
    input: str
    def __init__(self, images: _Optional[_Iterable[bytes]] = ..., input: _Optional[str] = ...) -> None: ...

class TextBatch(_message.Message):
    __slots__ = ("texts", "input", "truncation", "max_tokens", "omit_special_tokens", "return_tokens")
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    TRUNCATION_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OMIT_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RETURN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    input: str
    truncation: Truncation
    max_tokens: int
    omit_special_tokens: bool
    return_tokens: bool
    def __init__(self, texts: _Optional[_Iterable[str]] = ..., input: _Optional[str] = ..., truncation: _Optional[_Union[Truncation, str]] = ..., max_tokens: _Optional[int] = ..., omit_special_tokens: bool = ..., return_tokens: bool = ...) -> None: ...

class Sweep(_message.Message):
    __slots__ = ("steps", "rule", "baseline", "noise", "seed", "baseline_tensor")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    BASELINE_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    BASELINE_TENSOR_FIELD_NUMBER: _ClassVar[int]
    steps: int
    rule: IntegrationRule
    baseline: float
    noise: float
    seed: int
    baseline_tensor: _tensor_pb2.Tensor
    def __init__(self, steps: _Optional[int] = ..., rule: _Optional[_Union[IntegrationRule, str]] = ..., baseline: _Optional[float] = ..., noise: _Optional[float] = ..., seed: _Optional[int] = ..., baseline_tensor: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class AudioBatch(_message.Message):
    __slots__ = ("audio", "input")
    AUDIO_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    audio: _containers.RepeatedScalarFieldContainer[bytes]
    input: str
    def __init__(self, audio: _Optional[_Iterable[bytes]] = ..., input: _Optional[str] = ...) -> None: ...

class Regrid(_message.Message):
    __slots__ = ("around", "height", "width", "resize")
    AROUND_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    RESIZE_FIELD_NUMBER: _ClassVar[int]
    around: int
    height: int
    width: int
    resize: Resize
    def __init__(self, around: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., resize: _Optional[_Union[Resize, str]] = ...) -> None: ...

class Projection(_message.Message):
    __slots__ = ("matrix", "mean")
    MATRIX_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    matrix: _tensor_pb2.Tensor
    mean: _tensor_pb2.Tensor
    def __init__(self, matrix: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., mean: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class LayerSelection(_message.Message):
    __slots__ = ("layer", "capture", "alias", "reduction", "dtype", "method", "sweep", "map_form", "concat", "regrid", "projection")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_FIELD_NUMBER: _ClassVar[int]
    ALIAS_FIELD_NUMBER: _ClassVar[int]
    REDUCTION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    SWEEP_FIELD_NUMBER: _ClassVar[int]
    MAP_FORM_FIELD_NUMBER: _ClassVar[int]
    CONCAT_FIELD_NUMBER: _ClassVar[int]
    REGRID_FIELD_NUMBER: _ClassVar[int]
    PROJECTION_FIELD_NUMBER: _ClassVar[int]
    layer: str
    capture: _catalogue_pb2.Capture
    alias: str
    reduction: Reduction
    dtype: _tensor_pb2.DataType
    method: Method
    sweep: Sweep
    map_form: MapForm
    concat: _containers.RepeatedScalarFieldContainer[str]
    regrid: Regrid
    projection: Projection
    def __init__(self, layer: _Optional[str] = ..., capture: _Optional[_Union[_catalogue_pb2.Capture, str]] = ..., alias: _Optional[str] = ..., reduction: _Optional[_Union[Reduction, str]] = ..., dtype: _Optional[_Union[_tensor_pb2.DataType, str]] = ..., method: _Optional[_Union[Method, str]] = ..., sweep: _Optional[_Union[Sweep, _Mapping]] = ..., map_form: _Optional[_Union[MapForm, str]] = ..., concat: _Optional[_Iterable[str]] = ..., regrid: _Optional[_Union[Regrid, _Mapping]] = ..., projection: _Optional[_Union[Projection, _Mapping]] = ...) -> None: ...

class ObjectiveTerm(_message.Message):
    __slots__ = ("layer", "capture", "measure", "index", "place_length", "vector", "weight")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_FIELD_NUMBER: _ClassVar[int]
    MEASURE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PLACE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    layer: str
    capture: _catalogue_pb2.Capture
    measure: Measure
    index: _containers.RepeatedScalarFieldContainer[int]
    place_length: int
    vector: _tensor_pb2.Tensor
    weight: float
    def __init__(self, layer: _Optional[str] = ..., capture: _Optional[_Union[_catalogue_pb2.Capture, str]] = ..., measure: _Optional[_Union[Measure, str]] = ..., index: _Optional[_Iterable[int]] = ..., place_length: _Optional[int] = ..., vector: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., weight: _Optional[float] = ...) -> None: ...

class AxisSelection(_message.Message):
    __slots__ = ("axis", "index", "begin", "end", "step", "dimension", "heads")
    AXIS_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DIMENSION_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    axis: Axis
    index: _containers.RepeatedScalarFieldContainer[int]
    begin: int
    end: int
    step: int
    dimension: int
    heads: int
    def __init__(self, axis: _Optional[_Union[Axis, str]] = ..., index: _Optional[_Iterable[int]] = ..., begin: _Optional[int] = ..., end: _Optional[int] = ..., step: _Optional[int] = ..., dimension: _Optional[int] = ..., heads: _Optional[int] = ...) -> None: ...

class Intervention(_message.Message):
    __slots__ = ("layer", "capture", "select", "operation", "value", "factor", "low", "high", "tensor", "source_item", "seed", "over", "over_dimensions", "set")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_FIELD_NUMBER: _ClassVar[int]
    SELECT_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ITEM_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    OVER_FIELD_NUMBER: _ClassVar[int]
    OVER_DIMENSIONS_FIELD_NUMBER: _ClassVar[int]
    SET_FIELD_NUMBER: _ClassVar[int]
    layer: str
    capture: _catalogue_pb2.Capture
    select: _containers.RepeatedCompositeFieldContainer[AxisSelection]
    operation: Operation
    value: float
    factor: float
    low: float
    high: float
    tensor: _tensor_pb2.Tensor
    source_item: int
    seed: int
    over: _containers.RepeatedScalarFieldContainer[Axis]
    over_dimensions: _containers.RepeatedScalarFieldContainer[int]
    set: int
    def __init__(self, layer: _Optional[str] = ..., capture: _Optional[_Union[_catalogue_pb2.Capture, str]] = ..., select: _Optional[_Iterable[_Union[AxisSelection, _Mapping]]] = ..., operation: _Optional[_Union[Operation, str]] = ..., value: _Optional[float] = ..., factor: _Optional[float] = ..., low: _Optional[float] = ..., high: _Optional[float] = ..., tensor: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., source_item: _Optional[int] = ..., seed: _Optional[int] = ..., over: _Optional[_Iterable[_Union[Axis, str]]] = ..., over_dimensions: _Optional[_Iterable[int]] = ..., set: _Optional[int] = ...) -> None: ...

class ExtractRequest(_message.Message):
    __slots__ = ("model", "inputs", "images", "layers", "extractor", "shared_memory_session", "texts", "audio", "objective", "interventions", "variant")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    EXTRACTOR_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_SESSION_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    AUDIO_FIELD_NUMBER: _ClassVar[int]
    OBJECTIVE_FIELD_NUMBER: _ClassVar[int]
    INTERVENTIONS_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    model: str
    inputs: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    images: _containers.RepeatedCompositeFieldContainer[ImageBatch]
    layers: _containers.RepeatedCompositeFieldContainer[LayerSelection]
    extractor: _catalogue_pb2.Extractor
    shared_memory_session: bytes
    texts: _containers.RepeatedCompositeFieldContainer[TextBatch]
    audio: _containers.RepeatedCompositeFieldContainer[AudioBatch]
    objective: _containers.RepeatedCompositeFieldContainer[ObjectiveTerm]
    interventions: _containers.RepeatedCompositeFieldContainer[Intervention]
    variant: str
    def __init__(self, model: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ..., images: _Optional[_Iterable[_Union[ImageBatch, _Mapping]]] = ..., layers: _Optional[_Iterable[_Union[LayerSelection, _Mapping]]] = ..., extractor: _Optional[_Union[_catalogue_pb2.Extractor, str]] = ..., shared_memory_session: _Optional[bytes] = ..., texts: _Optional[_Iterable[_Union[TextBatch, _Mapping]]] = ..., audio: _Optional[_Iterable[_Union[AudioBatch, _Mapping]]] = ..., objective: _Optional[_Iterable[_Union[ObjectiveTerm, _Mapping]]] = ..., interventions: _Optional[_Iterable[_Union[Intervention, _Mapping]]] = ..., variant: _Optional[str] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("prepare_ns", "queue_ns", "compute_ns", "total_ns")
    PREPARE_NS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_NS_FIELD_NUMBER: _ClassVar[int]
    prepare_ns: int
    queue_ns: int
    compute_ns: int
    total_ns: int
    def __init__(self, prepare_ns: _Optional[int] = ..., queue_ns: _Optional[int] = ..., compute_ns: _Optional[int] = ..., total_ns: _Optional[int] = ...) -> None: ...

class ExtractResponse(_message.Message):
    __slots__ = ("tensors", "extractor", "timings", "variant")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    EXTRACTOR_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    extractor: _catalogue_pb2.Extractor
    timings: Timings
    variant: str
    def __init__(self, tensors: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ..., extractor: _Optional[_Union[_catalogue_pb2.Extractor, str]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., variant: _Optional[str] = ...) -> None: ...

class ExtractStreamRequest(_message.Message):
    __slots__ = ("model", "inputs", "images", "layers", "extractor", "shared_memory_session", "texts", "audio", "objective", "interventions", "variant", "id", "timeout_ns")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    EXTRACTOR_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_SESSION_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    AUDIO_FIELD_NUMBER: _ClassVar[int]
    OBJECTIVE_FIELD_NUMBER: _ClassVar[int]
    INTERVENTIONS_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_NS_FIELD_NUMBER: _ClassVar[int]
    model: str
    inputs: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    images: _containers.RepeatedCompositeFieldContainer[ImageBatch]
    layers: _containers.RepeatedCompositeFieldContainer[LayerSelection]
    extractor: _catalogue_pb2.Extractor
    shared_memory_session: bytes
    texts: _containers.RepeatedCompositeFieldContainer[TextBatch]
    audio: _containers.RepeatedCompositeFieldContainer[AudioBatch]
    objective: _containers.RepeatedCompositeFieldContainer[ObjectiveTerm]
    interventions: _containers.RepeatedCompositeFieldContainer[Intervention]
    variant: str
    id: int
    timeout_ns: int
    def __init__(self, model: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ..., images: _Optional[_Iterable[_Union[ImageBatch, _Mapping]]] = ..., layers: _Optional[_Iterable[_Union[LayerSelection, _Mapping]]] = ..., extractor: _Optional[_Union[_catalogue_pb2.Extractor, str]] = ..., shared_memory_session: _Optional[bytes] = ..., texts: _Optional[_Iterable[_Union[TextBatch, _Mapping]]] = ..., audio: _Optional[_Iterable[_Union[AudioBatch, _Mapping]]] = ..., objective: _Optional[_Iterable[_Union[ObjectiveTerm, _Mapping]]] = ..., interventions: _Optional[_Iterable[_Union[Intervention, _Mapping]]] = ..., variant: _Optional[str] = ..., id: _Optional[int] = ..., timeout_ns: _Optional[int] = ...) -> None: ...

class ExtractStreamError(_message.Message):
    __slots__ = ("code", "kind", "message", "image")
    CODE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    code: int
    kind: str
    message: str
    image: int
    def __init__(self, code: _Optional[int] = ..., kind: _Optional[str] = ..., message: _Optional[str] = ..., image: _Optional[int] = ...) -> None: ...

class ExtractStreamResponse(_message.Message):
    __slots__ = ("tensors", "extractor", "timings", "variant", "id", "error")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    EXTRACTOR_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    extractor: _catalogue_pb2.Extractor
    timings: Timings
    variant: str
    id: int
    error: ExtractStreamError
    def __init__(self, tensors: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ..., extractor: _Optional[_Union[_catalogue_pb2.Extractor, str]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., variant: _Optional[str] = ..., id: _Optional[int] = ..., error: _Optional[_Union[ExtractStreamError, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[_catalogue_pb2.Model]
    def __init__(self, models: _Optional[_Iterable[_Union[_catalogue_pb2.Model, _Mapping]]] = ...) -> None: ...

class DescribeModelRequest(_message.Message):
    __slots__ = ("model", "fingerprint")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    model: str
    fingerprint: bool
    def __init__(self, model: _Optional[str] = ..., fingerprint: bool = ...) -> None: ...

class DescribeModelResponse(_message.Message):
    __slots__ = ("model", "layers", "refused_plans")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_PLANS_FIELD_NUMBER: _ClassVar[int]
    model: _catalogue_pb2.Model
    layers: _containers.RepeatedCompositeFieldContainer[_catalogue_pb2.Layer]
    refused_plans: _containers.RepeatedCompositeFieldContainer[_catalogue_pb2.RefusedPlan]
    def __init__(self, model: _Optional[_Union[_catalogue_pb2.Model, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[_catalogue_pb2.Layer, _Mapping]]] = ..., refused_plans: _Optional[_Iterable[_Union[_catalogue_pb2.RefusedPlan, _Mapping]]] = ...) -> None: ...
