"""Do captum, pytorch-grad-cam and layertap agree, and which of them is right where they don't?

``make test-beside`` runs this in an environment of its own. Each of them is asked for the same
attributions of the same float32 models; a float64 reference without in-place modules decides
(``gradient_truths.py``). The table is a section of docs/coverage.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
TESTS = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(TESTS), str(TESTS / "coverage"), str(TESTS.parent / "server")]

import numpy as np
import torch
from gradient_subjects import GradientSubject, classifier
from gradient_truths import Place, changed, gradients
from page import write_section
from torch import nn
from torch.overrides import TorchFunctionMode

import layertap
from layertap import Capture, LayerSelection, LocalModel, Method, Sweep

CLASS = 3
STEPS = 20
TOLERANCE = 1e-3
"""Of the largest magnitude: float32 against float64, through sums that cancel."""

OF_SWEEPS = 1e-2
"""The same for integrated gradients: some steps fall on the other side of a kink in float32."""

OF_SUMMANDS = 1e-5
"""The same for maps whose channels cancel, as before a layer norm, relative to what is added up."""

OTHERS = ("captum", "pytorch-grad-cam")

MODELS = {
    "resnet18": {
        "layer4": "the last block",
        "layer4.1.bn2": "before `out += identity`",
        "layer1.0.bn1": "before an in-place ReLU",
    },
    "vgg11_bn": {
        "features.28": "the last pooling",
        "features.26": "before an in-place ReLU",
    },
    "densenet121": {"features": "before `relu(x, inplace=True)`"},
    "googlenet": {
        "inception5b": "the last block",
        "inception5b.branch1.bn": "before `relu(x, inplace=True)`",
    },
    "swin_t": {"features.7": "the last stage, [B, H, W, C]"},
}
"""Layers to explain, by model, and what follows each of them."""

Maps = Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]


def grad_cam(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return (g.mean((2, 3), keepdim=True) * a).sum(1)


def hires_cam(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return (g * a).sum(1)


def layer_cam(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return (g.clamp(min=0) * a).sum(1)


def grad_cam_plus_plus(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    # Equation 19 of the paper, which has no epsilon in the denominator.
    below = 2 * g**2 + a.sum((2, 3), keepdim=True) * g**3
    alpha = torch.where(g != 0, g**2 / below, 0)
    return ((alpha * g.clamp(min=0)).sum((2, 3), keepdim=True) * a).sum(1)


def with_epsilon(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    below = 2 * g**2 + a.sum((2, 3), keepdim=True) * g**3 + 1e-6
    alpha = torch.where(g != 0, g**2 / below, 0)
    return ((alpha * g.clamp(min=0)).sum((2, 3), keepdim=True) * a).sum(1)


def eigen_cam(a: torch.Tensor, g: torch.Tensor, *, centred: bool = False) -> torch.Tensor:
    maps = []
    for item in a:
        rows = item.flatten(1).T
        rows = rows - rows.mean(0) if centred else rows
        made = rows @ torch.linalg.svd(rows)[2][0]
        maps.append((made if made.sum() >= 0 else -made).reshape(item.shape[1:]))
    return torch.stack(maps)


MAPS: Maps = {
    "grad_cam": grad_cam,
    "hires_cam": hires_cam,
    "layer_cam": layer_cam,
    "grad_cam_plus_plus": grad_cam_plus_plus,
    "eigen_cam": eigen_cam,
}

VARIANTS: Mapping[str, tuple[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]] = {
    "grad_cam_plus_plus": ("another formula: 1e-6 added", with_epsilon),
    "eigen_cam": ("another formula: centred", lambda a, g: eigen_cam(a, g, centred=True)),
}
"""The formulas that pytorch-grad-cam has in place of the papers', and what is different."""


class _Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return given[0] * (given[0] > 0) * (x > 0)


class GuidedReLUs(TorchFunctionMode):
    """Runs every ReLU of a block, as a module or a function, as one that is guided."""

    RELUS = (
        torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_,
        torch.Tensor.relu, torch.Tensor.relu_,
    )  # fmt: skip

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in self.RELUS:
            return _Guided.apply(args[0] if args else kwargs["input"])
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Case:
    """One model under comparison.

    Attributes:
        subject: The model and its batch.
        net: A float32 instance, which the other tools may change.
        model: The same weights in layertap.
    """

    subject: GradientSubject
    model: LocalModel

    def net(self) -> nn.Module:
        """Return a fresh float32 instance, whose parameters need gradients for the other tools."""
        return self.subject.factory(torch.float32)().requires_grad_(True)

    @property
    def x(self) -> torch.Tensor:
        batch = self.subject.batch
        assert isinstance(batch, torch.Tensor)
        return batch.clone()

    def last(self, layer: str) -> bool:
        """Return whether the layer's channels are its last dimension."""
        return self.subject.name.startswith("swin") and layer.startswith("features")

    def grid(self, layer: str, value: torch.Tensor) -> torch.Tensor:
        """Return a layer's value as ``[B, C, H, W]``."""
        return value.movedim(-1, 1) if self.last(layer) else value


@dataclass
class Result:
    """One line of the table.

    Attributes:
        model: The model.
        layer: The layer, or the input.
        method: The method.
        found: For each tool the error relative to the largest magnitude, or why there is none.
    """

    model: str
    layer: str
    method: str
    found: dict[str, float | str]


def reference(case: Case, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the value of a layer and its gradient, in float64."""
    place = Place(layer, "output", 0, ())
    x = case.x.double()
    kept = []

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept.append(value.clone())
        return value

    build = case.subject.factory(torch.float64)
    with torch.no_grad():
        changed(build(), lambda net: net(x.clone()), {place: keep})
    truth = gradients(
        build(), lambda net: net(x.clone()), [place], lambda scores: scores[:, CLASS].sum()
    )
    gradient = truth.gradients[place]
    assert gradient is not None
    return kept[0], gradient


def without_in_place(case: Case) -> nn.Module:
    """Return a float64 instance in which no module works in place."""
    net = case.subject.factory(torch.float64)()
    for module in net.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return net


def input_gradient(
    net: nn.Module,
    x: torch.Tensor,
    mode: AbstractContextManager[Any] | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Return the gradient with respect to the model's input."""
    given = x.to(dtype).clone().requires_grad_(True)
    with mode or torch.enable_grad():
        score = net(given + 0)[:, CLASS].sum()
    (found,) = torch.autograd.grad(score, given)
    return found


def integrated(step: Callable[[torch.Tensor], torch.Tensor], way: torch.Tensor) -> torch.Tensor:
    """Return the mean of gradients on a way from 0 (the baseline) to 1, times the way."""
    nodes, weights = np.polynomial.legendre.leggauss(STEPS)
    total = torch.zeros_like(way)
    for node, weight in zip(nodes, weights, strict=True):
        total += step(torch.tensor((node + 1) / 2)) * weight / 2
    return total * way


def compare(case: Case, layers: Mapping[str, str]) -> list[Result]:
    """Ask each tool for everything."""
    results = list(of_input(case))
    for layer in layers:
        results += of_layer(case, layer)
    return results


def of_input(case: Case) -> list[Result]:
    """Compare attributions of the model's input."""
    from captum.attr import GuidedBackprop, IntegratedGradients, Saliency
    from pytorch_grad_cam import GuidedBackpropReLUModel

    x, name = case.x, case.subject.name
    sweep = Sweep(steps=STEPS)
    net = without_in_place(case)

    def ours(method: str) -> Callable[[], torch.Tensor]:
        selection = LayerSelection("inputs.x", Capture.GRADIENT, method=Method(method), sweep=sweep)
        return lambda: case.model.extract(x, selection, objective=f"[{CLASS}]")[
            f"inputs.x:{method}"
        ]

    def guided_by_grad_cam() -> torch.Tensor:
        guided = GuidedBackpropReLUModel(model=case.net(), device="cpu")
        made = [guided(x[i : i + 1], target_category=CLASS) for i in range(len(x))]
        return torch.stack([torch.as_tensor(each) for each in made]).movedim(-1, 1)

    asked: dict[str, tuple[Callable[[], torch.Tensor], dict[str, Callable[[], torch.Tensor]]]] = {
        "gradient": (
            lambda: input_gradient(net, x),
            {"captum": lambda: Saliency(case.net()).attribute(x, CLASS, abs=False)},
        ),
        "integrated_gradients": (
            lambda: integrated(lambda at: input_gradient(net, x.double() * at), x.double()),
            {
                "captum": lambda: IntegratedGradients(case.net()).attribute(
                    x, target=CLASS, n_steps=STEPS, method="gausslegendre", internal_batch_size=20
                )
            },
        ),
        "guided_backpropagation": (
            lambda: input_gradient(net, x, GuidedReLUs()),
            {
                "captum": lambda: GuidedBackprop(case.net()).attribute(x, CLASS),
                "pytorch-grad-cam": guided_by_grad_cam,
            },
        ),
    }
    results = []
    for method, (truth, others) in asked.items():
        if method == "guided_backpropagation" and not _has_relus(case):
            why = _tried(ours(method))
            assert "no ReLU" in str(why), why
            found: dict[str, float | str] = {"layertap": "refused: no ReLU"}
            plain = input_gradient(net, x)
            for tool, ask in others.items():
                found[tool] = _silent(_tried(ask), plain)
            results.append(Result(name, "input", method, found))
            continue
        variants = None
        if method == "gradient":
            own = without_in_place(case).float()
            kink = "right in float32; a ReLU's kink lies between"
            variants = {kink: input_gradient(own, x, dtype=torch.float32).double()}
        tools = {"layertap": ours(method), **others}
        results.append(_judged(name, "input", method, truth(), tools, variants=variants))
    return results


def of_layer(case: Case, layer: str) -> list[Result]:
    """Compare attributions of a layer."""
    from captum.attr import LayerGradCam, LayerGradientXActivation, LayerIntegratedGradients

    x, name = case.x, case.subject.name
    value, gradient = reference(case, layer)
    place = Place(layer, "output", 0, ())
    kept: list[torch.Tensor] = []

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept.append(value.clone())
        return value

    with torch.no_grad():
        zeros = torch.zeros_like(x).double()
        changed(
            case.subject.factory(torch.float64)(), lambda net: net(zeros.clone()), {place: keep}
        )
    base = kept[0]

    def ours(method: str) -> Callable[[], torch.Tensor]:
        chosen = Method(method)
        selection = LayerSelection(
            layer,
            Capture.GRADIENT if chosen.takes_gradient else Capture.OUTPUT,
            method=chosen,
            sweep=Sweep(steps=STEPS, baseline=base) if chosen.sweeps else Sweep(),
        )
        aim = f"[{CLASS}]" if chosen.takes_gradient else None
        return lambda: case.model.extract(x, selection, objective=aim)[f"{layer}:{method}"]

    def by_captum(kind: Any, **options: Any) -> Callable[[], torch.Tensor]:
        def ask() -> torch.Tensor:
            net = case.net()
            made = kind(net, net.get_submodule(layer)).attribute(x, target=CLASS, **options)
            return made.squeeze(1) if kind is LayerGradCam else made

        return ask

    net = without_in_place(case)

    def along(at: torch.Tensor) -> torch.Tensor:
        here = base + (value - base) * at

        def replace(_: torch.Tensor) -> torch.Tensor:
            return here.clone().requires_grad_(True)

        return _gradient_at(net, x, place, replace)

    results = [
        _judged(
            name, layer, "gradient_x_activation", value * gradient,
            {"layertap": ours("gradient_x_activation"),
             "captum": by_captum(LayerGradientXActivation)},
        ),
        _judged(
            name, layer, "integrated_gradients", integrated(along, value - base),
            {"layertap": ours("integrated_gradients"),
             "captum": by_captum(
                 LayerIntegratedGradients, n_steps=STEPS, method="gausslegendre",
                 internal_batch_size=20,
             )},
        ),
    ]  # fmt: skip
    a, g = case.grid(layer, value), case.grid(layer, gradient)
    for method, formula in MAPS.items():
        tools = {"layertap": ours(method), "pytorch-grad-cam": by_grad_cam(case, layer, method)}
        if method == "grad_cam":
            tools["captum"] = by_captum(LayerGradCam)
        variants = (
            {word: made(a, g) for word, made in [VARIANTS[method]]} if (method in VARIANTS) else {}
        )
        parts = (
            formula(a.abs(), g.abs()) if method in {"grad_cam", "hires_cam", "layer_cam"} else None
        )
        results.append(
            _judged(name, layer, method, formula(a, g), tools, variants=variants, parts=parts)
        )
    return results


def by_grad_cam(case: Case, layer: str, method: str) -> Callable[[], torch.Tensor]:
    """Return what asks pytorch-grad-cam for a map with its sign, at the size of the grid."""
    import pytorch_grad_cam as tool
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    kind = {
        "grad_cam": tool.GradCAM,
        "hires_cam": tool.HiResCAM,
        "layer_cam": tool.LayerCAM,
        "grad_cam_plus_plus": tool.GradCAMPlusPlus,
        "eigen_cam": tool.EigenCAM,
    }[method]

    def ask() -> torch.Tensor:
        net, x = case.net(), case.x
        target = net.get_submodule(layer)
        turned = (lambda value: value.movedim(-1, 1)) if case.last(layer) else None
        with kind(model=net, target_layers=[target], reshape_transform=turned) as cam:
            aims = [ClassifierOutputTarget(CLASS)] * len(x)
            cam(input_tensor=x, targets=aims)
            seen = cam.activations_and_grads
            value = seen.activations[0].numpy()
            slope = seen.gradients[0].numpy() if seen.gradients else None
            made = cam.get_cam_image(x, target, aims, value, slope, False)
        return torch.as_tensor(made)

    return ask


def _gradient_at(
    net: nn.Module, x: torch.Tensor, place: Place, replace: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """Return the gradient at a value that takes the place of a layer's own."""
    kept = []

    def put(value: torch.Tensor) -> torch.Tensor:
        kept.append(replace(value))
        return kept[0] + 0

    with torch.enable_grad():
        scores = changed(net, lambda each: each(x.double()), {place: put})
        (found,) = torch.autograd.grad(scores[:, CLASS].sum(), kept[0])
    return found


def _has_relus(case: Case) -> bool:
    return not case.subject.name.startswith("swin")


def _judged(
    model: str,
    layer: str,
    method: str,
    truth: torch.Tensor,
    tools: Mapping[str, Callable[[], torch.Tensor]],
    *,
    variants: Mapping[str, torch.Tensor] | None = None,
    parts: torch.Tensor | None = None,
) -> Result:
    """Compare what the tools return with the truth, and else with variants of the formula.

    Args:
        model: The model.
        layer: The layer.
        method: The method.
        truth: What the reference found.
        tools: What asks each tool.
        variants: What other formulas give, by what the table says of them.
        parts: The sum of the magnitudes of what a map adds up; None if it adds up nothing.
    """
    found: dict[str, float | str] = {}
    for tool, ask in tools.items():
        made = _tried(ask)
        if isinstance(made, str):
            found[tool] = made
        elif made.shape != truth.shape:
            found[tool] = f"has the shape {list(made.shape)}"
        else:
            made = made.detach().double()
            # The sign of a singular vector is any.
            free = method == "eigen_cam" and tool != "layertap"
            error = found[tool] = _error(made, truth, free=free)
            for word, other in (variants or {}).items():
                if error > TOLERANCE and _error(made, other, free=free) <= TOLERANCE:
                    found[tool] = word
            if parts is not None and error > TOLERANCE:
                error = float((made - truth).abs().max() / parts.abs().max())
                if error <= OF_SUMMANDS:
                    found[tool] = f"right {error:.0e} of the summands, which cancel"
    return Result(model, layer, method, found)


def _error(made: torch.Tensor, truth: torch.Tensor, *, free: bool) -> float:
    scale = truth.abs().max()
    error = float((made - truth).abs().max() / scale)
    return min(error, float((made + truth).abs().max() / scale)) if free else error


def _tolerance(result: Result) -> float:
    return OF_SWEEPS if result.method == "integrated_gradients" else TOLERANCE


def _tried(ask: Callable[[], torch.Tensor]) -> torch.Tensor | str:
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            return ask()
    except Exception as error:  # noqa: BLE001 - whatever another tool raises is its answer
        return f"fails: {str(error).strip().splitlines()[0][:90]}"


def _silent(made: torch.Tensor | str, plain: torch.Tensor) -> str:
    if isinstance(made, str):
        return made
    same = float((made.double() - plain).abs().max() / plain.abs().max()) <= TOLERANCE
    return "the plain gradient, in silence" if same else "something else"


HEADER = """## Gradients beside captum and pytorch-grad-cam

The same attributions of the same float32 models by captum {captum}, pytorch-grad-cam {cam} and
layertap, held against a float64 reference without in-place modules. A cell is the largest error
relative to the largest magnitude: *right* up to {tolerance:g} ({sweeps:g} for integrated
gradients, where in float32 some steps fall on the other side of a ReLU's kink), **wrong** beyond.
Maps are compared at the size of the layer's grid and with their sign; of Eigen-CAM, whose sign is
any, the nearer one counts. The layers' integrated gradients begin at the value for an image of
zeros. Random weights, two images of 128 × 128, class {cls}, {steps} steps. `make test-beside`
writes this section.

{counts}

Why they differ:

- **Layers before in-place operations.** pytorch-grad-cam keeps the tensor that the layer returned,
  not a copy. An in-place ReLU, `+=` or `relu(x, inplace=True)` then changes the activations that it
  multiplies with, though its gradient is that of the earlier value. `densenet121`'s `features` is
  such a layer, and so is every batch norm before a ReLU in `resnet18` and `vgg11_bn`.
- **Grad-CAM++.** pytorch-grad-cam adds 1e-6 to the denominator `2 g² + S g³`, which equation 19 of
  the paper does not have. For gradients below about 1e-3 the 1e-6 is most of the denominator.
- **Eigen-CAM.** pytorch-grad-cam centres the channels before the singular value decomposition and
  projects the centred ones; the paper does not. These are two methods with one name.
- **captum's layer integrated gradients** fail where the layer's value is overwritten in place.
- **Guided backpropagation.** captum and pytorch-grad-cam guide modules of the class `nn.ReLU` only.
  `googlenet` and `densenet121` call `relu` as a function too, which stays unguided. Without any
  ReLU, as in `swin_t`, they return the plain gradient; layertap refuses.
- **[B, H, W, C].** captum's LayerGradCam takes the second dimension for the channels.

"""


def section(results: Sequence[Result], layers: Mapping[str, Mapping[str, str]]) -> str:
    """Return the section of docs/coverage.md."""
    tools = ("layertap", *OTHERS)
    counts = []
    for tool in tools:
        found = [(each.found[tool], each) for each in results if tool in each.found]
        right = sum(
            e.startswith("right") if isinstance(e, str) else e <= _tolerance(each)
            for e, each in found
        )
        wrong = sum(isinstance(e, float) and not e <= _tolerance(each) for e, each in found)
        rest = len(found) - right - wrong
        counts.append(f"{tool}: {right} right, {wrong} wrong, {rest} refused or of other formulas")
    lines = [
        f"| model | layer | method | {' | '.join(tools)} |",
        f"| --- | --- | --- |{' --- |' * len(tools)}",
    ]
    for each in results:
        where = layers[each.model].get(each.layer)
        place = f"`{each.layer}`, {where}" if where else each.layer
        cells = [_cell(each.found.get(tool), _tolerance(each)) for tool in tools]
        lines.append(f"| {each.model} | {place} | {each.method} | {' | '.join(cells)} |")
    head = HEADER.format(
        captum=version("captum"),
        cam=version("grad-cam"),
        tolerance=TOLERANCE,
        sweeps=OF_SWEEPS,
        cls=CLASS,
        steps=STEPS,
        counts="; ".join(counts) + ".",
    )
    return head + "\n".join(lines) + "\n"


def _cell(found: float | str | None, tolerance: float) -> str:
    if found is None:
        return "–"
    if isinstance(found, str):
        return found.replace("|", "/")
    return f"right {found:.0e}" if found <= tolerance else f"**wrong** {found:.2g}"


def main() -> int:
    """Compare all models, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="models; all if none")
    parser.add_argument("--rows", type=Path, help="a JSON file; models in it are left out")
    parser.add_argument("--write", type=Path, help="the Markdown file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: list[Result] = []
    if options.rows and options.rows.exists():
        results = [Result(**each) for each in json.loads(options.rows.read_text("utf-8"))]
    done = {each.model for each in results}
    for name in options.models or MODELS:
        if name in done:
            continue
        subject = classifier(name, 128)
        # As a factory that layertap imports by its name.
        sys.modules[__name__].factory = subject.factory(torch.float32)  # type: ignore[attr-defined]
        with layertap.load(
            f"{__name__}:factory",
            item_shape=subject.item,
            device="cpu",
            threads=1,
            plan_cache="off",
        ) as model:
            for result in compare(Case(subject, model), MODELS[name]):
                results.append(result)
                print(result, flush=True)
        if options.rows:
            options.rows.parent.mkdir(parents=True, exist_ok=True)
            options.rows.write_text(json.dumps([asdict(each) for each in results]), "utf-8")
    if options.write:
        write_section(options.write, "beside", section(results, MODELS))
    wrong = [
        each for each in results
        if isinstance(each.found["layertap"], float)
        and not each.found["layertap"] <= _tolerance(each)
    ]  # fmt: skip
    print(f"layertap is wrong in {len(wrong)} of {len(results)} comparisons")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
