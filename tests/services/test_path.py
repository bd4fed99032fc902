"""A request goes through the files that docs/architecture.md lists, in that order, once each."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType, FunctionType

import grpc
import numpy as np

import layertap
from kept import kept
from layertap.app.server import FeatureServer
from layertap.engine import Engine
from layertap.models import ModelSpec
from layertap.services.feature_service import FeatureService
from layertap.settings import ServerOptions
from layertap.v1 import catalogue_pb2, feature_service_pb2
from layertap.wire.messages import encode_request
from tinynets import ITEM

SERVER = Path(layertap.__file__).parent
PAGE = SERVER.parents[1] / "docs" / "architecture.md"

HELPERS = {
    "app/": "interceptors and observers, around the handler",
    "batching/": "the queue between the threads",
    "engine/admission.py": "counts what a request takes, from its first byte to its last",
    "engine/batch.py": "checks the input for the pipeline",
    "engine/text_batch.py": "likewise, where texts are part of it",
    "call.py": "the deadline and cancellation state, asked all along the way",
    "engine/making.py": "what is made of values, for the layout and for the reply",
    "engine/sent_arrays.py": "arrays of selections, of which this request has none",
    "engine/engine.py": "gives the lease of the version and the pipeline",
    "engine/host/": "looks up layers and plans for the pipeline",
    "engine/sharing.py": "says whether requests share passes, before the queue and after it",
    "engine/versions.py": "counts the users of a version, from the lease's begin to its end",
    "errors.py": "exceptions",
    "extraction/": "what passes and values are like; the pass itself runs in extraction/taps.py",
    "models/": "what the model takes",
    "selection.py": "names of layers",
    "services/answer.py": "the reply with its bytes of the budget",
    "services/caller.py": "who sent the request, which each file passes on",
    "services/infer/statistics.py": "an observer",
    "services/native_form.py": "knows a reply's size before the pass and its head after it",
    "services/shared_form.py": "as services/native_form.py",
    "settings/": "limits",
    "shm/": "shared memory, which this request does not use",
    "threads.py": "the pools that run the handlers",
    "wire/": "what messages look like",
}
"""Files and folders that may be entered several times, and why."""


class Recorder:
    """Records which files of a folder are entered, while ``begin`` runs, in every thread.

    A file is entered by a call from another file. Helpers are looked through: a call by a helper
    counts as one by the file that called the helper.

    Args:
        root: The folder.
        begin: The function whose call begins the record, and whose return ends it.
        helpers: Files, and folders with a slash at the end, that are not recorded.
        path: Files that are recorded even so.
    """

    def __init__(
        self, root: Path, begin: CodeType, helpers: set[str], path: set[str] = frozenset()
    ) -> None:
        self.entered: list[str] = []
        self._root, self._begin = f"{root}/", begin
        self._helpers, self._path = helpers, path
        self._recording = False
        self._local = threading.local()

    def profile(self, frame: FrameType, event: str, argument: object) -> None:
        """Handle an event of ``threading.setprofile``."""
        code = frame.f_code
        if event not in {"call", "return"} or not code.co_filename.startswith(self._root):
            return
        if code is self._begin:
            self._recording = event == "call"
        stack = self._local.__dict__.setdefault("stack", [])
        file = code.co_filename.removeprefix(self._root)
        if event == "return":
            if stack and stack[-1][0] is frame:
                stack.pop()
            return
        if self._is_helper(file):
            return
        if self._recording and (not stack or stack[-1][1] != file):
            self.entered.append(file)
        stack.append((frame, file))

    def _is_helper(self, file: str) -> bool:
        folders = {f"{parent}/" for parent in Path(file).parents}
        return file not in self._path and not self._helpers.isdisjoint({file, *folders})


def listed() -> list[str]:
    """Return the files of the page's table, in its order."""
    (section,) = re.findall(
        r"## The path of an Extract request\n(.*?)(?=\n## |\Z)", PAGE.read_text("utf-8"), re.DOTALL
    )
    return re.findall(r"^\| `(\S+\.py)` \|", section, re.MULTILINE)


def test_a_request_enters_each_file_of_its_path_once() -> None:
    """One captured layer, by HOOK: at most ten files, in the page's order, each entered once."""
    files = listed()
    assert 5 < len(files) <= 10
    begin = FeatureService.extract.__code__
    recorder = Recorder(SERVER, begin, set(HELPERS), set(files))
    threading.setprofile(recorder.profile)
    try:
        engine = Engine(plan_cache=kept())
        engine.load(ModelSpec("tinynets:residual", item_shape=ITEM))
        server = FeatureServer(engine, ServerOptions(port=0))
        server.start()
    finally:
        threading.setprofile(None)
    try:
        with grpc.insecure_channel(server.address) as channel:
            ask = channel.unary_unary("/layertap.v1.FeatureService/Extract")
            request = feature_service_pb2.ExtractRequest(
                model="residual",
                layers=[feature_service_pb2.LayerSelection(layer="layer1")],
                extractor=catalogue_pb2.EXTRACTOR_HOOK,
            )
            message = encode_request(request, [("", np.zeros((2, *ITEM), np.float32))])
            ask(message)  # The first one may still make its plan.
            recorder.entered.clear()
            ask(message)
    finally:
        server.stop(0)
        engine.close()
    assert recorder.entered == files


def compiled(file: str) -> Callable[..., object]:
    """Return a function that calls its argument as if from another file."""

    def run(*each: Callable[[], object]) -> None:
        for one in each:
            one()

    return FunctionType(run.__code__.replace(co_filename=f"/root/{file}"), {})


def test_a_file_that_is_entered_again_is_recorded_again() -> None:
    """Calls back into a file, and repeated calls of it, are entries; calls inside it are not."""
    first, second, helper = compiled("first.py"), compiled("second.py"), compiled("tools/help.py")
    inner = compiled("first.py")
    recorder = Recorder(Path("/root"), first.__code__, {"tools/"})
    sys.setprofile(recorder.profile)
    try:
        first(lambda: second(lambda: helper(inner)))
        first(second, helper, second)
    finally:
        sys.setprofile(None)
    assert recorder.entered == [
        "first.py",
        "second.py",
        "first.py",
        "first.py",
        "second.py",
        "second.py",
    ]
