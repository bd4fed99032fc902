"""Items that fail, servers that are overloaded, and memory that is bounded."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hfnets
from layertap import Texts, load
from layertap.dataset import extract
from layertap.dataset.runners import Answer
from layertap.dataset.shard import Output, ShardBuffer
from layertap.dataset.sources import TextItems, gather
from layertap.dataset.tasks import Task, Tasks
from layertap.errors import InvalidInputError, OverloadedError, UnavailableError
from layertap.local import LocalModel
from layertap.selection import Extractor
from watched_runner import WatchedRunner


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten images, of which the fourth is broken."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(10):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "3.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_failing_items_are_listed_and_left_out(
    model: LocalModel, photos: Path, tmp_path: Path, batch_size: int
) -> None:
    """All other items have the rows of a pass without it, whatever batch they are in."""
    paths = [str(photos / f"{number}.png") for number in range(10)]
    names = [path for path in paths if path != paths[3]]
    outcome = extract(
        model, paths, ["layer1"], tmp_path / "out.npz",
        on_error="skip", batch_size=batch_size, shard_items=4, extractor="hook",
    )  # fmt: skip
    assert [each.id for each in outcome.failures] == [paths[3]]
    assert "got 8 bytes of something else" in outcome.failures[0].error
    lines = (tmp_path / "out.npz.failures.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [paths[3]]
    with np.load(tmp_path / "out.npz") as stored:
        assert stored["ids"].tolist() == names
        for name, row in zip(names, stored["layer1"], strict=True):
            alone = model.extract(name, ["layer1"], extractor="hook")["layer1"][0].numpy()
            np.testing.assert_allclose(row, alone, 1e-5, 1e-5)


def test_files_that_vanish_are_failures(model: LocalModel, photos: Path, tmp_path: Path) -> None:
    """A file that can't be read any more is an item that failed, and no row takes its place."""
    (photos / "3.png").unlink()
    source = gather([str(photos)])
    (photos / "5.png").unlink()
    outcome = extract(model, source, ["layer1"], tmp_path / "out.npz", on_error="skip")
    assert [(each.id, each.error) for each in outcome.failures] == [
        (f"{photos}/5.png", "No such file or directory")
    ]
    assert outcome.rows == 8
    with pytest.raises(InvalidInputError, match=r"image .*5\.png: No such file"):
        extract(model, source, ["layer1"], tmp_path / "other.npz")


def test_one_text_that_is_too_long_is_found(tmp_path: Path) -> None:
    """An error that names no item is traced to it, by running the items of the batch alone."""
    folder = hfnets.wordpiece(hfnets.bert(tmp_path / "bert"))
    texts = ["the cat sat", "cat " * 5000, "a bird"]
    source = TextItems([(str(number), text) for number, text in enumerate(texts)])
    with load(f"hf:{folder}") as model:
        outcome = extract(model, source, ["pooler"], tmp_path / "out.npz", on_error="skip")
        expected = model.extract(Texts([texts[0], texts[2]]), "pooler")["pooler"].numpy()
    assert [each.id for each in outcome.failures] == ["1"]
    with np.load(tmp_path / "out.npz") as stored:
        assert stored["ids"].tolist() == ["0", "2"]
        np.testing.assert_allclose(stored["pooler"], expected, 1e-4, 1e-5)


def test_nothing_is_written_if_every_item_fails(
    model: LocalModel, photos: Path, tmp_path: Path
) -> None:
    """It is an error, as nobody knows what the outputs would be."""
    with pytest.raises(InvalidInputError, match=r"all of the first 1 items failed; the first, .*3"):
        extract(model, [photos / "3.png"], ["layer1"], tmp_path / "out.npz", on_error="skip")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


class Unreliable(WatchedRunner):
    """A model whose workers are refused now and then, as servers are."""

    most_workers = 2

    def __init__(self, model: LocalModel, errors: Sequence[type[Exception]]) -> None:
        super().__init__(model)
        self._errors = errors
        self._calls = 0
        self._lock = threading.Lock()

    def answer(self, ask_model: Callable[[], Answer], extractor: Extractor, variant: str) -> Answer:
        """Refuse every other call from the fourth on."""
        with self._lock:
            self._calls += 1
            calls = self._calls
        if calls < 3 or calls % 2:
            return ask_model()
        raise self._errors[calls // 2 % len(self._errors)]("not now")


def test_an_overloaded_server_is_asked_again(model: LocalModel, tmp_path: Path) -> None:
    """Its refusals are not failures of items: every item has its row, in its place."""
    np.save(tmp_path / "items.npy", np.random.default_rng(0).random((12, 3, 16, 16), np.float32))
    runner = Unreliable(model, [OverloadedError, UnavailableError])
    for given, name in ((model, "right"), (runner, "out")):
        extract(
            given, [tmp_path / "items.npy"], ["layer1"], tmp_path / f"{name}.npz",
            batch_size=2, shard_items=4, extractor="hook", on_error="skip",
        )  # fmt: skip
    assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "right.npz").read_bytes()


def test_rows_of_another_shape_are_refused(tmp_path: Path) -> None:
    """A row that does not fit is never cut or stretched, and the item is named."""
    buffer = ShardBuffer(["a", "b"], {"x": Output("float32", (2,))})
    buffer.place([0], {"x": np.zeros((1, 2), np.float32)})
    with pytest.raises(InvalidInputError, match=r"got the shape \[1\] for b, and \[2\] for the"):
        buffer.place([1], {"x": np.zeros((1, 1), np.float32)})


def tasks(shards: int, batches: int, nbytes: int) -> Iterator[Task]:
    return (
        Task(shard, [shard * batches + batch], nbytes)
        for shard in range(shards)
        for batch in range(batches)
    )


def test_no_more_batches_are_handed_out_than_memory_allows() -> None:
    """A batch takes its rows twice until they are in the shard, and once until that is written."""
    given = Tasks(tasks(1, 8, 10), memory=55)
    first, second = given.take(), given.take()
    assert (first.items, second.items) == ([0], [1])
    waiting = threading.Thread(target=given.take)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    given.done(first)
    waiting.join(5)
    assert not waiting.is_alive()
    given.stop()
    assert given.take() is None


def test_a_shard_larger_than_the_memory_is_finished_all_the_same() -> None:
    """Its batches are then run one at a time."""
    given = Tasks(tasks(2, 4, 10), memory=1)
    for shard in range(2):
        for _ in range(4):
            task = given.take()
            assert task.shard == shard
            given.done(task)
        given.committed(shard, 40)
    assert given.take() is None


def test_at_most_one_whole_shard_is_not_on_the_disk() -> None:
    """The third shard begins only after the first is written."""
    given = Tasks(tasks(3, 1, 10), memory=1000)
    for _ in range(2):
        given.done(given.take())
    waiting = threading.Thread(target=given.take)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    given.committed(0, 10)
    waiting.join(5)
    assert not waiting.is_alive()


def test_a_batch_that_was_given_back_is_handed_out_before_others() -> None:
    """It is not lost, even if no other batch is left."""
    given = Tasks(tasks(1, 2, 10), memory=1000)
    first, second = given.take(), given.take()
    given.give_back(first)
    assert given.take() is first
    given.done(second)
    given.done(first)
    assert given.take() is None


def test_large_runs_are_compiled_and_fall_back_to_hook(model: LocalModel, tmp_path: Path) -> None:
    """AUTO names one extractor for the whole run; a batch that it can't serve is taken by HOOK."""
    items = np.random.default_rng(0).random((1001, 3, 16, 16), np.float32)
    items[500, 0, 0, 0] = np.nan
    np.save(tmp_path / "items.npy", items)
    outcome = extract(
        model, [tmp_path / "items.npy"], ["layer1"], tmp_path / "out.npz", batch_size=100
    )  # fmt: skip
    assert (outcome.extractor, outcome.rows) == (Extractor.TORCHSCRIPT, 1001)
    with np.load(tmp_path / "out.npz") as stored:
        rows = stored["layer1"]
    right = model.extract(items, ["layer1"], extractor="hook")["layer1"].numpy()
    np.testing.assert_allclose(rows, right, 1e-4, 1e-5)
    assert np.isnan(rows[500]).any()
    np.testing.assert_array_equal(
        rows[500:600], model.extract(items[500:600], ["layer1"], extractor="hook")["layer1"].numpy()
    )
