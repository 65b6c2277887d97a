"""``verify``: is the slim graph the dense graph without the removed units?

Both run on the example inputs in eval mode, the dense one under masks (see :mod:`chase_fx.passes.reference`). In single
precision a difference can be rounding, so a doubt is settled in double precision. Where the model itself makes more of
rounding, each node is compared on the reference's values. On failure the first node that differs is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.fx import Interpreter, Node

from chase_fx.errors import ArgumentError, VerificationError
from chase_fx.graphs.alone import alone
from chase_fx.graphs.autocast import preserved_modes
from chase_fx.graphs.axes import Atom
from chase_fx.graphs.channels import ChannelGraph
from chase_fx.graphs.inference import normal_tensors
from chase_fx.graphs.kernels import plain_kernels
from chase_fx.graphs.traced import TracedModule, capture_of
from chase_fx.graphs.trees import map_tensors, named_tensors, tensors_in
from chase_fx.passes.comparing import Comparing
from chase_fx.passes.differences import relative_difference
from chase_fx.passes.draws import ConstantDraws
from chase_fx.passes.evaluation import evaluated, in_double
from chase_fx.passes.following import plain, ways
from chase_fx.passes.reference import MaskedReference, gather_kept
from chase_fx.passes.rewrite import channels_for

__all__ = ["VerificationReport", "verify"]

# Largest accepted relative difference: what rounding alone explains. Single precision only passes quickly with it, a
# larger difference is measured again in double precision.
_EXACT = 1e-9
_QUICK = 1e-5

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class VerificationReport:
    """What was compared.

    Attributes:
        difference: largest difference of an output, relative to the largest absolute value of that output, or of a
            node inside the graph that differs by more than rounding; of a node on equal values, if ``stepwise``.
        tolerance: what was allowed.
        dtype: the precision that decided.
        outputs: how many output tensors were compared.
        nodes: how many nodes of the dense graph ran under masks.
        unseen: lines at which data decide, of which one way was not compared: it can't run on the example's data.
        stepwise: the outputs differ by more than ``tolerance``, though no node does when it is given what the masked
            graph gives it: what is left is rounding that the model makes more of, as chaotic weights do.
    """

    difference: float
    tolerance: float
    dtype: torch.dtype
    outputs: int
    nodes: int
    unseen: tuple[str, ...] = ()
    stepwise: bool = False

    def __str__(self) -> str:
        unseen = f"; one way not compared at {', '.join(self.unseen)}" if self.unseen else ""
        what = f"{self.nodes} nodes on equal values" if self.stepwise else f"{self.outputs} outputs"
        return (
            f"exact: {what} differ by at most {self.difference:.1e} (relative, {self.dtype}), "
            f"{self.nodes} nodes compared{unseen}"
        )


# The report, the first node that differs, and the ways that were taken where data decide.
Compared = tuple[VerificationReport, Node | None, Mapping[str, bool]]


@normal_tensors()
def verify(traced: TracedModule, slim: TracedModule) -> VerificationReport:
    """Compare a slim module with the masked dense module that it was made from.

    Where data decide which way the forward goes, each way is compared, on the same data.

    Raises:
        VerificationError: they differ; ``node`` names the first node that does.
        ArgumentError: ``slim`` was not made by a rewrite.
    """
    info = capture_of(traced)
    plan = getattr(slim, "plan", None)
    if plan is None or not isinstance(slim, TracedModule):
        raise ArgumentError("the second argument of verify must come from chase_fx.rewrite or chase_fx.prune")
    channels = channels_for(traced, plan)
    masks = channels.masks_of(plan)
    inputs = (info.args, info.kwargs)
    if any(t.is_meta for t in tensors_in(inputs)) or any(p.is_meta for p in traced.parameters()):
        raise ArgumentError(
            "meta tensors hold no values to compare; prune with verify=False, or verify a model with real parameters"
        )
    floats = [p.dtype for p in traced.parameters() if p.is_floating_point()]
    dtype = floats[0] if floats else torch.get_default_dtype()

    def compare(forced: Mapping[str, bool]) -> Compared:
        if dtype is torch.float64:
            return _settle(partial(_compare, traced, slim, channels, masks, inputs, forced=forced))
        found = _compare(traced, slim, channels, masks, inputs, forced=forced, dtype=dtype, tolerance=_QUICK)
        if found[1] is None:
            return found
        wide, wide_slim = in_double(traced), in_double(slim)
        doubled = map_tensors(inputs, lambda t: alone(t, torch.float64) if t.is_floating_point() else t)
        return _settle(partial(_compare, wide, wide_slim, channels, masks, doubled, forced=forced))

    report, node, taken = compare({})
    seen = set(taken.items())
    failed: list[str] = []
    lines = {n.name: str(n.meta.get("source")) for n in traced.graph.nodes}
    for forced in ways(traced.graph):
        way = list(forced.items())[-1]
        if node is not None or way in seen:
            continue
        try:
            other, node, taken = compare(forced)
        except _NoReferenceError:  # the example's data can't go there
            failed.append(lines[way[0]])
            continue
        seen |= taken.items()
        report = other if node is not None or other.difference > report.difference else report
    report = replace(report, unseen=tuple(dict.fromkeys(failed)))
    if node is not None:
        source = node.meta.get("source") or "unknown line"
        raise VerificationError(
            f"the slim graph differs from the masked dense graph by {report.difference:.1e} (relative, {report.dtype}; "
            f"allowed {report.tolerance:.0e}); the first node that differs is '{node.name}' ({node.target}, {source}). "
            "This is a defect of Chase-FX or of a user-defined rule, not of your model: please report it with "
            "str(channels)",
            node=node.name,
        )
    return report


def _settle(exact: Callable[..., Compared]) -> Compared:
    """In double precision; where the outputs differ, node by node."""
    found = exact(dtype=torch.float64, tolerance=_EXACT)
    return found if found[1] is None else exact(dtype=torch.float64, tolerance=_EXACT, stepwise=True)


def _compare(
    traced: TracedModule,
    slim: TracedModule,
    channels: ChannelGraph,
    masks: Mapping[Atom, np.ndarray],
    inputs: Inputs,
    *,
    forced: Mapping[str, bool],
    dtype: torch.dtype,
    tolerance: float,
    stepwise: bool = False,
) -> Compared:
    trainable = [p for root in (traced, slim) for p in root.parameters() if p.requires_grad]
    for parameter in trainable:  # as in the capture: torch decomposes a matmul by what requires a gradient
        parameter.requires_grad = False
    try:
        # As in the capture: a view that is taken with gradients enabled makes another call.
        with (
            evaluated(traced, slim), torch.enable_grad(), plain_kernels(traced), preserved_modes(always=True),
            ConstantDraws(),
        ):  # fmt: skip
            reference = MaskedReference(traced, channels, 0, masks, forced)
            expected = _expected(reference, inputs)
            nodes = len(reference.values)
            compared = Comparing(slim, reference.values, forced, stepwise=stepwise)
            try:
                with _same_draws():
                    found = compared.run(*_placed(compared, inputs))
            except (RuntimeError, IndexError, TypeError, ValueError) as e:
                raise VerificationError(
                    f"the slim graph fails at node '{compared.at}' ({type(e).__name__}: {e}); the dense one runs. "
                    "This is a defect of Chase-FX or of a user-defined rule, not of your model: please report it",
                    node=compared.at,
                ) from e
    finally:
        for parameter in trainable:
            parameter.requires_grad = True
    capture = capture_of(traced).captures[0]
    worst = 0.0
    pairs = list(zip(tensors_in(expected), tensors_in(found), strict=True))
    leaves = {leaf.path: leaf for leaf in reversed(capture.outputs)}
    for (path, _), (want, have) in zip(named_tensors(expected), pairs, strict=True):
        labels = reference.labels[leaves[path].slot.index]
        worst = max(worst, relative_difference(gather_kept(want, labels, masks), have))
    if dtype is torch.float64 and compared.single:
        tolerance = _QUICK  # the forward itself goes through single precision, so its rounding is in the result
    if compared.gross is not None:
        worst = max(worst, compared.gross[1])
    if stepwise:
        worst = max(worst, compared.worst)
    report = VerificationReport(worst, tolerance, dtype, len(pairs), nodes, stepwise=stepwise)
    if compared.gross is not None:
        return report, compared.gross[0], reference.taken
    first = None if worst <= tolerance else compared.first_beyond(tolerance)
    return report, first, reference.taken


class _NoReferenceError(VerificationError):
    """The masked dense graph can't be computed."""


def _expected(reference: MaskedReference, inputs: Inputs) -> Any:
    """What the reference gives."""
    try:
        with _same_draws():
            return reference.run(*_placed(reference, inputs))
    except (RuntimeError, IndexError, TypeError, ValueError) as e:
        raise _NoReferenceError(
            f"the masked dense graph fails at node '{reference.at}' ({type(e).__name__}: {e}): without the removed "
            "channels the model's code takes another path than when it was captured; name the function whose path "
            "the data decides in whole= of trace",
            node=reference.at,
        ) from e


@contextmanager
def _same_draws() -> Iterator[None]:
    """A forward that draws numbers in eval mode draws the same ones inside every such block, and none outside."""
    state = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _placed(interpreter: Interpreter, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Iterator[Any]:
    """Values of the placeholders in order. Clones, for a forward may write to its inputs."""
    args, kwargs = map_tensors(inputs, alone)
    names = [str(n.target) for n in interpreter.graph.nodes if n.op == "placeholder"]
    rest = list(args)
    used: set[str] = set()
    for node in interpreter.graph.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target)
        if name.startswith("**"):
            yield {k: v for k, v in kwargs.items() if k not in used and k not in names}
        elif name.startswith("*"):
            yield tuple(rest)
            rest = []
        elif name in kwargs:
            used.add(name)
            yield kwargs[name]
        elif rest:
            yield rest.pop(0)
        else:
            yield plain(node.args[0])
