from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class OpenSharedMemoryRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenSharedMemoryResponse(_message.Message):
    __slots__ = ("socket", "ticket")
    SOCKET_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    socket: str
    ticket: bytes
    def __init__(self, socket: _Optional[str] = ..., ticket: _Optional[bytes] = ...) -> None: ...
