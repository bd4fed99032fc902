"""Plans whose shapes are computed from the catalogue's expressions, so that no pass is needed.

Note [The first pass at a size]
    The reference kind runs the model itself, so its values need no proof at another size of the
    inputs; only their shapes must be known to lay a reply out, and those follow from the
    expressions. A value of another shape than predicted is noticed when it is captured. But a model
    may write state for some sizes only, or refuse a size. So the first pass at a size runs to its
    end, as a reference pass does, and the scope looks at the state after it. If that pass fails, a
    pass on random input of that size tells whether the size or the content is at fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from layertap.errors import InvalidInputError, LayertapError
from layertap.extraction.base import BuiltExtractor
from layertap.extraction.catalogue import Catalogue
from layertap.extraction.dimensions import Sizes
from layertap.extraction.kinds.base import BuildContext
from layertap.extraction.kinds.registry import REFERENCE
from layertap.extraction.layout import Geometry, Layout
from layertap.extraction.out_of_memory import is_out_of_memory
from layertap.extraction.pass_spec import PassSpec
from layertap.extraction.plan import Findings, Plan
from layertap.extraction.points import CapturePoint, Sink, ValueSpec
from layertap.extraction.prover import Prover
from layertap.extraction.samples import ordinary_batch
from layertap.models import Batch, BatchKey, Signature, free_sizes

__all__ = ["placed", "predicted_plan", "unmeasured_plan"]


def predicted_plan(
    context: BuildContext,
    prover: Prover,
    catalogue: Catalogue,
    pass_spec: PassSpec,
    key: BatchKey,
) -> Plan | None:
    """Return a plan of the reference kind, without running the model.

    Args:
        context: The model and what belongs to it.
        prover: Runs the model where its first pass fails.
        catalogue: The model's catalogue.
        pass_spec: What to capture: points of modules.
        key: The inputs, and the sizes of their items.

    Returns:
        The plan; None if the shape of some point can't be predicted for such items.
    """
    specs = _specs(context.model.signature, catalogue, pass_spec.points, key)
    if specs is None:
        return None
    built = _first_watched(context, prover, pass_spec, key)
    return Plan(REFERENCE, pass_spec, key, specs, built, Findings(), predicted=True)


def unmeasured_plan(
    context: BuildContext,
    prover: Prover,
    catalogue: Catalogue,
    pass_spec: PassSpec,
    key: BatchKey,
) -> Plan:
    """Return a plan of the reference kind for layers of which samples don't run all.

    A mask that is passed on only if it hides something is an example. Nothing is known of the
    shapes at this size, so the reply is laid out after each pass. See ``predicted_plan`` for the
    arguments.
    """
    specs = tuple(replace(catalogue.specs[point], dynamic=True) for point in pass_spec.points)
    built = _first_watched(context, prover, pass_spec, key)
    return Plan(REFERENCE, pass_spec, key, specs, built, Findings())


def _first_watched(
    context: BuildContext, prover: Prover, pass_spec: PassSpec, key: BatchKey
) -> _FirstWatched:
    def check() -> None:
        prover.truth(pass_spec, ordinary_batch(context.model, 1, key))

    return _FirstWatched(
        REFERENCE.build_reference(context, pass_spec), REFERENCE.build(context, pass_spec), check
    )


def placed(
    signature: Signature, catalogue: Catalogue, point: CapturePoint, spec: ValueSpec, key: BatchKey
) -> ValueSpec:
    """Return the spec of a point for items of a key, with what the catalogue knows of its layout.

    Args:
        signature: The inputs that the model takes.
        catalogue: The model's catalogue.
        point: The point.
        spec: Its type and shape for such items.
        key: The inputs, and the sizes of their items.
    """
    measured = catalogue.specs.get(point)
    if measured is None or len(measured.dims) != len(spec.dims):
        return spec
    spec = replace(spec, interleaved=measured.interleaved)
    if spec.batch_axis is None:
        return spec
    shape = [1, *(dim.size for dim in spec.dims if not dim.batch)]
    sizes = free_sizes(signature, key)
    geometry = _grid(measured, sizes) if sizes else None
    if geometry is None:
        name = catalogue.grid_input(point)
        item, usual = key.shape_of(name), catalogue.key.shape_of(name)
        if item is None or usual is None:
            return spec
        geometry = measured.geometry.at(shape, item, usual)
    return replace(spec, geometry=geometry)


def _specs(
    signature: Signature, catalogue: Catalogue, points: Sequence[CapturePoint], key: BatchKey
) -> tuple[ValueSpec, ...] | None:
    sizes = free_sizes(signature, key)
    given = {item.name for item in key.items}
    # Optional inputs seldom change a shape; if they do, that is noticed when it is captured.
    if sizes is None or not catalogue.runs_with(points, given):
        return None
    specs = []
    for point in points:
        measured = catalogue.specs[point]
        if not sizes.keys() >= _symbols(measured):
            return None
        spec = measured.at(sizes)
        if spec is None:
            return None
        specs.append(placed(signature, catalogue, point, spec, key))
    return tuple(specs)


def _symbols(spec: ValueSpec) -> set[str]:
    """Return the free dimensions on which a shape depends."""
    return {name for dim in spec.dims if dim.expression for name in dim.expression.symbols}


def _grid(measured: ValueSpec, sizes: Sizes) -> Geometry | None:
    """Return the geometry of tokens whose number is known to be a grid's height times its width."""
    geometry = measured.geometry
    if geometry.layout is not Layout.TOKENS:
        return None
    front = next(axis for axis, dim in enumerate(measured.dims) if not dim.batch)
    expression = measured.dims[front].expression
    if expression is None or expression.constant != geometry.front or len(expression.terms) != 1:
        return None
    (term,) = expression.terms
    if term.factor != 1 or len(term.counts) != 2:
        return None
    height, width = (count.at(sizes) for count in term.counts)
    return replace(geometry, height=height, width=width)


class _FirstWatched:
    """Runs the first pass to its end and watched, and the later ones as usual.

    See Note [The first pass at a size].

    Args:
        watched: Runs the first pass.
        usual: Runs the others.
        check: Raises InvalidInputError if the model can't run on items of this size.
    """

    def __init__(
        self, watched: BuiltExtractor, usual: BuiltExtractor, check: Callable[[], None]
    ) -> None:
        self._watched = watched
        self._usual = usual
        self._check = check
        self._ran = False
        self._refusal = ""

    def run(self, x: Batch, sink: Sink) -> None:
        """See BuiltExtractor; raises InvalidInputError if the model takes no such items."""
        if self._ran:
            self._usual.run(x, sink)
            return
        if self._refusal:
            raise InvalidInputError(self._refusal)
        try:
            self._watched.run(x, sink)
        except LayertapError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self._refuse()
            raise
        self._ran = True

    def _refuse(self) -> None:
        """Raise InvalidInputError if not the content of the batch but its size is at fault."""
        try:
            self._check()
        except InvalidInputError as refusal:
            self._refusal = str(refusal)
            raise
        except LayertapError:
            return  # The layers do not run for every input of this size.
        self._ran = True
