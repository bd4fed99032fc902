"""Do TransformerLens, pyvene and layertap agree about interventions, and are they right?

``make test-beside-interventions`` runs this in an environment of its own. Each of them reads and
changes values of the same GPT-2 with random weights, in float32; a float64 pass of plain PyTorch
with forward hooks decides (``intervention_truths.py``). The table is a section of docs/coverage.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
TESTS = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(TESTS), str(TESTS / "coverage"), str(TESTS.parent / "server")]

import intervention_truths as truths
import torch
from gradient_truths import Place
from intervention_truths import Edit, Part
from page import write_section

import editnets
import layertap
from layertap import Intervention, LocalModel

TOLERANCE = 1e-5
"""Of the largest magnitude: float32 against float64."""

TOOLS = ("layertap", "TransformerLens", "pyvene")

HEADS = 4
BLOCK, MLP, VALUES = "transformer.h.1", "transformer.h.1.mlp", "transformer.h.1.attn.c_proj"
"""A block, its MLP, and the module that is given the heads' values."""

DIRECTION = torch.randn(32, generator=torch.Generator().manual_seed(5))
STEER = torch.randn(32, generator=torch.Generator().manual_seed(6))
LAST = 11
"""The last token."""


def prompts() -> torch.Tensor:
    return torch.randint(1, 64, (2, LAST + 1), generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Case:
    """One request to each tool.

    Attributes:
        what: What is changed, or read.
        place: Where the reference changes it.
        edit: What the reference does there; None where a value is only read.
        intervention: The same for layertap.
        hook: For TransformerLens the name of a hook point, and a function of its value.
        unit: For pyvene the component, and an intervention's class and source.
    """

    what: str
    place: Place
    edit: Edit | None
    intervention: Intervention | None
    hook: tuple[str, Callable[[torch.Tensor], torch.Tensor] | None]
    unit: tuple[str, str]


@dataclass
class Result:
    """One line of the table: for each tool the error, or why there is none."""

    what: str
    value: str
    found: dict[str, float | str] = field(default_factory=dict)


def _set_head(z: torch.Tensor) -> torch.Tensor:
    z = z.clone()
    z[:, :, 2] = 0
    return z


def _patched(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value[0, LAST] = value[1, LAST]
    return value


def _steered(value: torch.Tensor) -> torch.Tensor:
    value = value.clone()
    value[:, LAST] += 4 * STEER
    return value


def _projected(value: torch.Tensor) -> torch.Tensor:
    unit = DIRECTION / DIRECTION.norm()
    return value - (value @ unit)[..., None] * unit


def _out(path: str) -> Place:
    return Place(path, "output", 0, ())


HEAD_CHANNELS = range(16, 24)
CASES = (
    Case("read the residual", _out(BLOCK), None, None,
         ("blocks.1.hook_resid_post", None), ("block_output", "collect")),
    Case("read the MLP", _out(MLP), None, None,
         ("blocks.1.hook_mlp_out", None), ("mlp_output", "collect")),
    Case("read the heads' values", Place(VALUES, "input", 0, ()), None, None,
         ("blocks.1.attn.hook_z", None), ("attention_value_output", "collect")),
    Case("zero a head", Place(VALUES, "input", 0, ()),
         Edit(Part(0, {2: HEAD_CHANNELS}), truths.set_to(0.0)),
         Intervention.zero(VALUES, head=2, heads=HEADS).of_input(),
         ("blocks.1.attn.hook_z", _set_head), ("head_attention_value_output", "zero")),
    Case("zero the MLP", _out(MLP), Edit(Part(0), truths.set_to(0.0)), Intervention.zero(MLP),
         ("blocks.1.hook_mlp_out", torch.zeros_like), ("mlp_output", "zero")),
    Case("patch the residual of the last token", _out(BLOCK),
         Edit(Part(0, {1: [LAST]}, [0]), source=Part(0, {1: [LAST]}, [1])),
         Intervention.patch(BLOCK, 1, item=0, token=-1),
         ("blocks.1.hook_resid_post", _patched), ("block_output", "patch")),
    Case("add a direction to the last token", _out(BLOCK),
         Edit(Part(0, {1: [LAST]}), truths.add(STEER, 4.0)),
         Intervention.add(BLOCK, STEER, factor=4, token=-1),
         ("blocks.1.hook_resid_post", _steered), ("block_output", "add")),
    Case("project a direction out", _out(BLOCK),
         Edit(Part(0), truths.project_out(DIRECTION, 2)),
         Intervention.project_out(BLOCK, DIRECTION),
         ("blocks.1.hook_resid_post", _projected), ("block_output", "project")),
)  # fmt: skip


def reference(case: Case) -> torch.Tensor:
    """Return the scores, or the value that is read, of a float64 pass of plain PyTorch."""
    scores = Place("", "output", 0, ("logits",))
    edits = {} if case.edit is None else {case.place: case.edit}
    read = case.place if case.edit is None else scores
    found = truths.run(
        editnets.gpt2().double(), lambda net: net(prompts(), use_cache=False), [read], edits
    )
    return found.values[read]


def by_layertap(case: Case, model: LocalModel) -> torch.Tensor:
    side = ":input" if case.place.side == "input" else ""
    layer = f"{case.place.path}{side}" if case.intervention is None else "lm_head"
    return model.extract(prompts(), layer, interventions=case.intervention)[layer]


def tokenizer(folder: str) -> Any:
    """Return a tokenizer, which TransformerLens loads again from its folder, without any text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(64)}
    whole = Tokenizer(WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token="w0", eos_token="w0", pad_token="w0", unk_token="w0"
    ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def by_transformer_lens(case: Case) -> torch.Tensor:
    from transformer_lens.model_bridge import TransformerBridge

    with TemporaryDirectory() as folder:
        bridge = TransformerBridge.boot_transformers(
            "gpt2", hf_model=editnets.gpt2(), tokenizer=tokenizer(folder), device="cpu"
        )
    name, change = case.hook
    with torch.no_grad():
        if change is None:
            value = bridge.run_with_cache(prompts())[1][name]
            return value.flatten(2) if value.dim() == 4 else value
        return bridge.run_with_hooks(
            prompts(), fwd_hooks=[(name, lambda value, hook: change(value))]
        )


def by_pyvene(case: Case) -> torch.Tensor:
    import pyvene

    class ProjectOut(pyvene.ConstantSourceIntervention, pyvene.LocalistRepresentationIntervention):
        """pyvene has none of its own: a class of the user's."""

        def forward(self, base: torch.Tensor, source: Any = None, subspaces: Any = None) -> Any:
            return _projected(base)

    component, kind = case.unit
    net = editnets.gpt2()
    kinds = {
        "collect": pyvene.CollectIntervention,
        "zero": pyvene.ZeroIntervention,
        "patch": pyvene.VanillaIntervention,
        "add": pyvene.AdditionIntervention,
        "project": ProjectOut,
    }
    heads = component.startswith("head")
    unit: dict[str, Any] = {"layer": 1, "component": component, "intervention_type": kinds[kind]}
    if heads:
        unit["unit"] = "h"
    if kind == "add":
        unit["source_representation"] = 4 * STEER
    model = pyvene.IntervenableModel(pyvene.IntervenableConfig([unit]), model=net)
    everywhere = 2 if heads else list(range(LAST + 1))
    ids = prompts()
    with torch.no_grad():
        if kind == "collect":
            tokens = []  # Of several tokens at once it collects the first one's channels.
            for token in range(LAST + 1):
                (_, collected), _ = model({"input_ids": ids}, unit_locations={"base": token})
                tokens.append(torch.stack(list(collected)).reshape(2, -1))
            return torch.stack(tokens, 1)
        if kind == "patch":
            plain = net(ids).logits
            both = model(
                {"input_ids": ids[:1]}, [{"input_ids": ids[1:]}],
                unit_locations={"sources->base": LAST},
            )  # fmt: skip
            return torch.cat([both[1].logits, plain[1:]])
        where = LAST if kind == "add" else everywhere
        return model({"input_ids": ids}, unit_locations={"base": where})[1].logits


def compare(model: LocalModel) -> list[Result]:
    """Ask each tool for everything."""
    results = []
    for case in CASES:
        expected = reference(case)
        result = Result(case.what, case.place.path if case.edit is None else "scores")
        asked: Mapping[str, Callable[[], torch.Tensor]] = {
            "layertap": lambda case=case: by_layertap(case, model),
            "TransformerLens": lambda case=case: by_transformer_lens(case),
            "pyvene": lambda case=case: by_pyvene(case),
        }
        if case.edit is not None:
            plain = truths.run(
                editnets.gpt2().double(), lambda net: net(prompts(), use_cache=False),
                [Place("", "output", 0, ("logits",))], {},
            ).values.popitem()[1]  # fmt: skip
            assert _far(plain, expected) > 100 * TOLERANCE, case.what  # It has an effect.
        for tool, ask in asked.items():
            try:
                result.found[tool] = _far(ask(), expected)
            except Exception as error:  # noqa: BLE001 - it is a fact for the table
                lines = str(error).strip().splitlines() or [""]
                result.found[tool] = f"{type(error).__name__}: {lines[0][:120]}"
        results.append(result)
        print(result, flush=True)
    return results


def _far(found: torch.Tensor, expected: torch.Tensor) -> float:
    if found.shape != expected.shape:
        raise ValueError(f"got {list(found.shape)}, expected {list(expected.shape)}")
    return float((found.double() - expected).abs().max() / expected.abs().max())


HEADER = """## Interventions beside TransformerLens and pyvene

TransformerLens {lens} (`TransformerBridge`), pyvene {pyvene} and layertap read and change values of
the second block of one GPT-2 with random weights (3 layers, 4 heads, 32 channels), in float32, for
two prompts of 12 tokens. A number is the largest error of the value that was read, or of the scores
after a change, relative to the largest magnitude of a float64 pass of plain PyTorch with forward
hooks; right is at most {tolerance:.0e}. Each change moves the scores by more than a hundred times
that. pyvene has no projection, so it is given a class of ours. pyvene patches from another input,
the others from another item of the batch. `make test-beside-interventions` writes this section.

"""


def section(results: list[Result]) -> str:
    """Return the section of docs/coverage.md."""
    head = HEADER.format(
        lens=version("transformer-lens"), pyvene=version("pyvene"), tolerance=TOLERANCE
    )
    lines = [f"| what | value | {' | '.join(TOOLS)} |", f"| --- | --- |{' --- |' * len(TOOLS)}"]
    for each in results:
        value = each.value if each.value == "scores" else f"`{each.value}`"
        cells = [_cell(each.found[tool]) for tool in TOOLS]
        lines.append(f"| {each.what} | {value} | {' | '.join(cells)} |")
    return head + "\n".join(lines) + "\n"


def _cell(found: float | str) -> str:
    if isinstance(found, str):
        return found.replace("|", "/")
    return f"right {found:.0e}" if found <= TOLERANCE else f"**wrong** {found:.2g}"


def main() -> int:
    """Compare everything, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="the Markdown file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with layertap.load(
        "editnets:gpt2",
        item_shape=(LAST + 1,),
        input_dtype="int64",
        device="cpu",
        threads=1,
        plan_cache="off",
    ) as model:
        results = compare(model)
    if options.write:
        write_section(options.write, "beside_interventions", section(results))
    wrong = [each for each in results if not _right(each.found["layertap"])]
    print(f"layertap is wrong in {len(wrong)} of {len(results)} comparisons")
    return 1 if wrong else 0


def _right(found: float | str) -> bool:
    return isinstance(found, float) and found <= TOLERANCE


if __name__ == "__main__":
    sys.exit(main())
