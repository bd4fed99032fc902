from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReloadAction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RELOAD_ACTION_UNSPECIFIED: _ClassVar[ReloadAction]
    RELOAD_ACTION_UNCHANGED: _ClassVar[ReloadAction]
    RELOAD_ACTION_LOADED: _ClassVar[ReloadAction]
    RELOAD_ACTION_REPLACED: _ClassVar[ReloadAction]
    RELOAD_ACTION_UNLOADED: _ClassVar[ReloadAction]
    RELOAD_ACTION_FAILED: _ClassVar[ReloadAction]
RELOAD_ACTION_UNSPECIFIED: ReloadAction
RELOAD_ACTION_UNCHANGED: ReloadAction
RELOAD_ACTION_LOADED: ReloadAction
RELOAD_ACTION_REPLACED: ReloadAction
RELOAD_ACTION_UNLOADED: ReloadAction
RELOAD_ACTION_FAILED: ReloadAction

class ReloadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelReload(_message.Message):
    __slots__ = ("name", "action", "reason", "serving")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SERVING_FIELD_NUMBER: _ClassVar[int]
    name: str
    action: ReloadAction
    reason: str
    serving: bool
    def __init__(self, name: _Optional[str] = ..., action: _Optional[_Union[ReloadAction, str]] = ..., reason: _Optional[str] = ..., serving: bool = ...) -> None: ...

class ReloadResponse(_message.Message):
    __slots__ = ("models", "not_applied")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    NOT_APPLIED_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelReload]
    not_applied: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelReload, _Mapping]]] = ..., not_applied: _Optional[_Iterable[str]] = ...) -> None: ...
