"""The two ends of every row of bench_wire.py, each a process of its own.

``serve ROW`` answers until its standard input ends; the first line that it prints is its address.
``call ROW ADDRESS`` does what each line of its standard input says and answers with a line. A reply
is always one float32 tensor; what it holds follows from its size, so both ends know it.
"""

from __future__ import annotations

import argparse
import json
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from layertap import Client
from layertap.app.grpc_options import channel_options
from layertap.malloc import keep_memory
from layertap.selection import Extractor
from layertap.services.grpc_adapter.handlers import service
from layertap.services.native_form import REPLY_HEAD_SIZE, encode_reply_head
from layertap.services.shared_memory_service import SharedMemoryService
from layertap.shm.broker import Broker
from layertap.shm.shared_memory import SessionMemory, SharedMemory
from layertap.timings import Timings
from layertap.v1 import feature_service_pb2, tensor_pb2
from layertap.wire.codec import ReplyBuilder, ReplyLayout
from layertap.wire.messages import REPLY_TENSOR_FIELD, decode_request

EXTRACT = "/layertap.v1.FeatureService/Extract"
FLOAT32 = tensor_pb2.DATA_TYPE_FLOAT32
LENGTH = struct.Struct("<Q")
LAYER = "layer1"
REQUEST = np.zeros((1, 1), np.float32)

# resnet18's layer1 is [64, 56, 56] an image: 1, 16 and 128 of them.
SHAPES = {
    "4 KB": (1, 1024),
    "800 KB": (1, 64, 56, 56),
    "12.8 MB": (16, 64, 56, 56),
    "102 MB": (128, 64, 56, 56),
}

Call = Callable[[str], np.ndarray]


@dataclass(frozen=True)
class Row:
    """One way from a server's array to a client's.

    Attributes:
        name: What the tables call it.
        kind: What stands at both ends: ``naive``, ``layertap``, ``socket`` or ``memcpy``.
        unix: Whether they meet on a Unix socket rather than on TCP over the loopback.
        keep: Whether both ends keep freed memory (``layertap.keep_memory``).
        fresh: Whether the receiver's buffer is a new one for each reply.
        shared: Whether the reply stands in memory that both ends share.
    """

    name: str
    kind: str
    unix: bool = False
    keep: bool = False
    fresh: bool = False
    shared: bool = False


ROWS = (
    Row("naive protobuf, TCP", "naive"),
    Row("layertap, TCP", "layertap"),
    Row("layertap, TCP, memory kept", "layertap", keep=True),
    Row("layertap, Unix socket", "layertap", unix=True),
    Row("layertap, Unix socket, memory kept", "layertap", unix=True, keep=True),
    Row("layertap, TCP, shared memory", "layertap", shared=True),
    Row("layertap, Unix socket, shared memory", "layertap", unix=True, shared=True),
    Row("raw TCP socket, new buffer", "socket", fresh=True),
    Row("raw TCP socket, reused buffer", "socket"),
    Row("raw Unix socket, new buffer", "socket", unix=True, fresh=True),
    Row("raw Unix socket, reused buffer", "socket", unix=True),
    Row("memcpy, reused buffer", "memcpy"),
)


def expected(size: str) -> np.ndarray:
    """Return the float32 array of a size, the same in every process."""
    return np.random.default_rng(0).random(SHAPES[size], np.float32)


class Arrays(dict[str, np.ndarray]):
    """The arrays by size, made when they are first asked for."""

    def __missing__(self, size: str) -> np.ndarray:
        """Make one."""
        return self.setdefault(size, expected(size))


def naive_handler(arrays: Arrays) -> grpc.RpcMethodHandler:
    """Return what anybody would write with the generated classes."""

    def extract(request: Any, context: Any) -> Any:
        array = arrays[request.model]
        reply = feature_service_pb2.ExtractResponse()
        reply.tensors.add(name=LAYER, dtype=FLOAT32, shape=array.shape, data=array.tobytes())
        return reply

    return grpc.unary_unary_rpc_method_handler(
        extract,
        feature_service_pb2.ExtractRequest.FromString,
        feature_service_pb2.ExtractResponse.SerializeToString,
    )


def layertap_handler(arrays: Arrays, memory: SharedMemory | None) -> grpc.RpcMethodHandler:
    """Return what layertap does with a captured value, with no model in front of it."""

    def extract(message: bytes, context: Any) -> bytes:
        request, _ = decode_request(message)
        array = arrays[request.model]
        space = SessionMemory.find(memory, request.shared_memory_session)
        loan = space.lend(array.nbytes) if space else None
        layout = ReplyLayout(
            [(LAYER, FLOAT32, array.shape)],
            field=REPLY_TENSOR_FIELD,
            head_size=REPLY_HEAD_SIZE,
            apart=loan is not None,
        )
        if loan is None:
            builder = ReplyBuilder(layout)
        else:
            builder = ReplyBuilder(
                layout, loan.buffer, region=loan.region, generation=loan.generation
            )
        builder.write(0, array, FLOAT32)
        reply = builder.finish(encode_reply_head(Extractor.HOOK, Timings()))
        if loan is not None:
            loan.publish()
        return reply

    return grpc.unary_unary_rpc_method_handler(extract)


def serve_grpc(row: Row, folder: str) -> None:
    """Serve one method by gRPC until standard input ends."""
    unlimited = [("grpc.max_send_message_length", -1)]
    naive = row.kind == "naive"
    server = grpc.server(
        ThreadPoolExecutor(8), options=unlimited if naive else channel_options(1 << 20)
    )
    broker = Broker(SharedMemory(1 << 30)) if row.shared else None
    if broker is not None:
        broker.start()
        offered = SharedMemoryService(broker)
        server.add_generic_rpc_handlers((service(offered.NAME, offered.methods()),))
    memory = broker.memory if broker else None
    handler = naive_handler(Arrays()) if naive else layertap_handler(Arrays(), memory)
    name, method = EXTRACT.strip("/").split("/")
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(name, {method: handler}),)
    )
    address = f"unix:{folder}/rpc" if row.unix else "127.0.0.1:0"
    port = server.add_insecure_port(address)
    server.start()
    print(address if row.unix else f"127.0.0.1:{port}", flush=True)
    sys.stdin.read()
    server.stop(0)
    if broker is not None:
        broker.close()


def serve_socket(row: Row, folder: str) -> None:
    """Send length and bytes for each name of a size, until standard input ends."""
    listener = socket.socket(socket.AF_UNIX if row.unix else socket.AF_INET)
    listener.bind(f"{folder}/raw" if row.unix else ("127.0.0.1", 0))
    listener.listen()
    name = listener.getsockname()
    print(name if row.unix else f"{name[0]}:{name[1]}", flush=True)
    threading.Thread(target=_answer, args=(listener, row.unix), daemon=True).start()
    sys.stdin.read()


def _answer(listener: socket.socket, unix: bool) -> None:
    arrays = Arrays()
    connection, _ = listener.accept()
    with connection:
        if not unix:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while name := connection.recv(64):
            data = arrays[name.decode()].data.cast("B")
            connection.sendall(LENGTH.pack(data.nbytes))
            connection.sendall(data)


def naive_call(target: str) -> Call:
    """Return a client of generated classes and numpy."""
    channel = grpc.insecure_channel(target, options=[("grpc.max_receive_message_length", -1)])
    method = channel.unary_unary(
        EXTRACT,
        feature_service_pb2.ExtractRequest.SerializeToString,
        feature_service_pb2.ExtractResponse.FromString,
    )

    def call(size: str) -> np.ndarray:
        tensor = method(feature_service_pb2.ExtractRequest(model=size)).tensors[0]
        return np.frombuffer(tensor.data, np.float32).reshape(tensor.shape)

    return call


def layertap_call(target: str, shared: bool) -> Call:
    """Return layertap's own client."""
    client = Client(target, shared_memory=shared)
    return lambda size: client.extract(size, REQUEST, LAYER)[LAYER]


def socket_call(target: str, unix: bool, fresh: bool) -> Call:
    """Return a reader of length and bytes."""
    connection = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
    host, _, port = target.rpartition(":")
    connection.connect(target if unix else (host, int(port)))
    if not unix:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffers: dict[str, np.ndarray] = {}

    def call(size: str) -> np.ndarray:
        connection.sendall(size.encode())
        length = LENGTH.unpack(connection.recv(LENGTH.size, socket.MSG_WAITALL))[0]
        buffer = None if fresh else buffers.get(size)
        if buffer is None:
            buffer = buffers[size] = np.empty(length // 4, np.float32)
        if fresh:
            del buffers[size]
        view, at = buffer.data.cast("B"), 0
        while at < length:
            at += connection.recv_into(view[at:])
        return buffer.reshape(SHAPES[size])

    return call


def memcpy_call() -> Call:
    """Return a copy into a buffer that is there already."""
    arrays = Arrays()
    buffers: dict[str, np.ndarray] = {}

    def call(size: str) -> np.ndarray:
        array = arrays[size]
        buffer = buffers.get(size)
        if buffer is None:
            buffer = buffers[size] = np.empty_like(array)
        np.copyto(buffer, array)
        return buffer

    return call


def caller(row: Row, address: str) -> Call:
    """Return the calling end of a row."""
    if row.kind == "naive":
        return naive_call(address)
    if row.kind == "layertap":
        return layertap_call(address, row.shared)
    if row.kind == "socket":
        return socket_call(address, row.unix, row.fresh)
    return memcpy_call()


def timed(call: Call, size: str) -> float:
    """Return the milliseconds from the call until its reply was dropped again.

    Something of each page is read, so that memory which was only promised is there in the end: a
    reply that was received is in the receiver's memory, a shared one may yet have to be mapped.
    """
    begun = time.perf_counter()
    see(call(size))
    return (time.perf_counter() - begun) * 1000


def see(array: np.ndarray) -> None:
    """Read one element of each page."""
    array.reshape(-1)[:: 4096 // array.itemsize].sum()


def obey(call: Call) -> None:
    """Check or time, as each line of standard input says."""
    for line in sys.stdin:
        order = json.loads(line)
        size = order["size"]
        if order["calls"]:
            answer: Any = [timed(call, size) for _ in range(order["calls"])]
        else:
            answer = bool(np.array_equal(call(size), expected(size)))
        print(json.dumps(answer), flush=True)


def main() -> None:
    """Be one end of a row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=["serve", "call"])
    parser.add_argument("row", choices=[row.name for row in ROWS])
    parser.add_argument("address", nargs="?", default="")
    options = parser.parse_args()
    row = next(row for row in ROWS if row.name == options.row)
    if row.keep and not keep_memory():
        raise SystemExit("this C library can't be told to keep memory")
    if options.role == "call":
        obey(caller(row, options.address))
        return
    with tempfile.TemporaryDirectory(prefix="layertap-") as folder:
        (serve_socket if row.kind == "socket" else serve_grpc)(row, str(Path(folder)))


if __name__ == "__main__":
    main()
