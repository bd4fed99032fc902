from __future__ import annotations

import pytest
import torch

import namednets
from layertap.extraction.catalogue import Catalogue
from layertap.extraction.measure import measure
from layertap.extraction.names import LayerNames, aliases
from layertap.models import ModelSpec, load_model
from layertap.selection import Capture, Extractor

ITEM = (3, 16, 16)


def catalogue(net: str, item_shape: tuple[int, ...] = ITEM) -> Catalogue:
    return measure(load_model(ModelSpec(f"namednets:{net}", item_shape=item_shape)))


def test_every_path_of_a_module_is_an_alias_of_its_first() -> None:
    """The paths are those of named_modules without removing duplicates."""
    net = namednets.two_names()
    every = dict(net.named_modules(remove_duplicate=False))
    first = dict(net.named_modules())
    found = aliases(net)
    assert set(found) == set(every) - set(first)
    assert all(every[alias] is first[path] for alias, path in found.items())


def test_modules_that_hold_one_another_end() -> None:
    """A cycle of modules has only the paths of its first round."""
    assert aliases(namednets.cycle()) == {}


def test_further_names_serve_the_same_points() -> None:
    """Each name of a module is a layer, and says which name is the first; so for silent modules."""
    found = catalogue("two_names")
    assert found.entry("layer1").points == found.entry("base.2").points
    assert found.entry("layer0.0").same_as == "base.0"
    assert found.entry("layer0").same_as == ""
    assert (found.entry("also_unused").calls, found.entry("also_unused").same_as) == (0, "unused")
    assert found.names[found.entry("layer1").points[Capture.OUTPUT]] == "base.2"


def test_a_glob_returns_a_layer_once() -> None:
    """If several of its names match, the first counts; a single match counts too."""
    found = catalogue("two_names")
    assert [entry.name for entry in found.match("layer?")] == ["layer0", "layer1"]
    matched = [entry.name for entry in found.match("**")]
    assert "layer1" not in matched
    assert "base.2" in matched


def test_the_result_is_a_layer_that_globs_leave_out() -> None:
    """The result is called output; a glob finds it only if the glob begins so."""
    found = catalogue("functions")
    entry = found.entry("output")
    assert entry.is_result
    assert entry.served_by(Capture.OUTPUT) == [
        Extractor.TORCHSCRIPT,
        Extractor.EXPORT,
        Extractor.HOOK,
    ]
    assert entry.specs[Capture.OUTPUT].shape(2) == (2, 5)
    assert Capture.INPUT not in entry.points
    assert [each.name for each in found.match("**")] == ["conv"]
    assert [each.name for each in found.match("outp*")] == []
    assert [each.name for each in found.match("output*")] == ["output"]


def test_a_module_keeps_its_name() -> None:
    """If a module has the name of a result or a further call, the other one is renamed."""
    found = catalogue("taken")
    assert (found.entry("output").type, found.entry("conv_1").type) == ("Conv2d", "Conv2d")
    assert found.entry("conv@1").points[Capture.OUTPUT].call == 1
    assert found.entry("model_output.logits").is_result


@pytest.mark.parametrize(
    ("net", "names"),
    [("joined", ["encoder[0]", "encoder[1]"]), ("keyed", ["heads[a]", "heads[b]"])],
)
def test_members_that_are_called_like_children(net: str, names: list[str]) -> None:
    """A member differs from the child of that name; the refusal of the whole names a member."""
    found = catalogue(net)
    whole, _, rest = names[0].partition("[")
    assert [found.entry(name).points[Capture.OUTPUT].member for name in names] == [
        (name.partition("[")[2].rstrip("]"),) for name in names
    ]
    child = found.entry(f"{whole}.{rest.rstrip(']')}")
    assert child.points[Capture.OUTPUT].path == child.name
    assert f"such as {names[0]}" in found.entry(whole).refusal(Extractor.HOOK)


def test_members_below_a_name_that_a_child_has() -> None:
    """The hidden state that a Sequential returns is not the output of the LSTM at its end."""
    found = catalogue("ends_in_lstm", (7, 3))
    members = {
        name: (entry.points[Capture.OUTPUT].path, entry.points[Capture.OUTPUT].member)
        for name, entry in found.entries.items()
        if Capture.OUTPUT in entry.points and entry.points[Capture.OUTPUT].member
    }
    assert members == {
        "rnn.1.0": ("rnn.1", ("0",)),
        "rnn.1.1.0": ("rnn.1", ("1", "0")),
        "rnn.1.1.1": ("rnn.1", ("1", "1")),
        "rnn[0]": ("rnn", ("0",)),
        "rnn[1][0]": ("rnn", ("1", "0")),
        "rnn[1][1]": ("rnn", ("1", "1")),
    }


def test_keys_that_look_alike_are_several_layers() -> None:
    """Keys of one text, with dots, and like a further call: each is a layer, and none is state."""
    found = catalogue("look_alike")
    members = [
        found.names[point]
        for point in found.names
        if (point.path, point.capture) == ("pack", Capture.OUTPUT)
    ]
    assert members == [
        "pack.1", "pack.'1'", "pack[a.b]", "pack.a.b", "pack[conv]", "pack[conv_1]"
    ]  # fmt: skip
    assert not found.notes
    assert found.entry("pack.1").specs[Capture.OUTPUT].shape(3) == (3, 4, 16, 16)


def test_the_result_of_a_model_that_calls_itself_is_the_outermost_calls() -> None:
    """Of a recursive model's calls, the one that ended last is its result."""
    assert catalogue("recursive").entry("output").points[Capture.OUTPUT].call == 2


def test_attention_weights_are_layers() -> None:
    """They are layers if the module can return them, else a refusal with the reason."""
    found = catalogue("attends", (5, 8))
    weights = found.entry("layer.self_attn.attention_weights")
    assert weights.specs[Capture.OUTPUT].shape(3) == (3, 2, 5, 5)
    assert "asked.attention_weights" not in found.entries
    assert found.entry("asked.1").specs[Capture.OUTPUT].shape(3) == (3, 5, 5)
    fused = found.entry("fused.attention_weights")
    assert fused.served_by(Capture.OUTPUT) == []
    assert "scaled_dot_product_attention" in fused.refusal(Extractor.HOOK)


def test_names_of_calls_and_members() -> None:
    """The rules of Note [Names], one by one."""
    names = LayerNames(namednets.two_names())
    assert names.of_call("base.2", 0) == ["base.2", "layer1"]
    assert names.of_call("base.2", 1) == ["base.2_1", "layer1_1"]
    assert names.of_call("", 0) == ["output"]
    assert names.of_member("layer1", ("x", "0")) == "layer1.x.0"
    assert names.of_member("base", ("2",)) == "base[2]"
    assert names.of_member("base", ("2", "h")) == "base[2][h]"
    assert names.of_member("base", ("2_1",)) == "base[2_1]"
    assert names.of_member("base", ("a.b",)) == "base[a.b]"
    assert names.of_member("base", ("22",)) == "base.22"
    assert LayerNames(torch.nn.Sequential()).result == "output"
