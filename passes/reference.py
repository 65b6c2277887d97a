"""The masked reference: what the dense graph computes when the removed units don't exist.

The dense graph runs with all of its weights. Every contraction sees zeros for removed units, and every reduction that
is no plain sum (mean, variance, the norms) sees kept units only; everywhere else dense values flow, so that a wrong
rule shows as a difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode

from chase_fx.errors import VerificationError
from chase_fx.graphs.axes import Atom, Axis, keep_mask
from chase_fx.graphs.calls import call_name
from chase_fx.graphs.channels import ChannelGraph
from chase_fx.graphs.rules.base import Facts
from chase_fx.graphs.tape import Slot, TapedOp
from chase_fx.graphs.traced import TracedModule
from chase_fx.passes.following import Following

__all__ = ["MaskedReference", "gather_kept", "initialised"]

aten = torch.ops.aten

_UNINITIALISED = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})


def gather_kept(tensor: torch.Tensor, labels: tuple[Axis, ...], masks: Mapping[Atom, np.ndarray]) -> torch.Tensor:
    """The kept indices of every dim."""
    for dim, axis in enumerate(labels):
        mask = keep_mask(axis, masks)
        if mask is not None:
            tensor = tensor.index_select(dim, torch.from_numpy(np.flatnonzero(mask)).to(tensor.device))
    return tensor


def initialised(node: Node, value: Any) -> Any:
    """``value``; memory that ``node`` left as it was found gets one number, the same in every run.

    What the forward writes later replaces it, so a place that only one of two graphs writes still shows.
    """
    if call_name(node) in _UNINITIALISED and isinstance(value, torch.Tensor):
        value.fill_(0.7 if value.is_floating_point() or value.is_complex() else 1)
    return value


class MaskedReference(Following):
    """Runs a traced module under the masks of a plan and keeps the value of every node that has labels."""

    def __init__(
        self,
        traced: TracedModule,
        channels: ChannelGraph,
        capture: int,
        masks: Mapping[Atom, np.ndarray],
        forced: Mapping[str, bool],
    ) -> None:
        super().__init__(traced, traced.graphs()[capture], forced)
        assert traced.info is not None
        self.tape = traced.info.captures[capture].tape
        self.labels = channels.labelling.slots[capture]
        self.facts = channels.labelling.facts[capture]
        self.masks = masks
        self.values: dict[str, torch.Tensor] = {}

    def compute(self, node: Node) -> Any:
        """One node; its ATen calls are matched with those of the capture."""
        start, stop = node.meta.get("tape", (0, 0))
        if start == stop:
            return super().compute(node)
        # Only these have to be found again: a cast, or a slice of all there is, is made or left out as data wants it.
        noted = [(self.tape.ops[i], facts) for i in range(start, stop) if (facts := self.facts.get(i)) is not None]
        calls = _MaskedCalls([(op, facts) for op, facts in noted if facts.contracted or facts.reduced], self)
        with calls:
            out = super().compute(node)
        calls.check(node)
        out = initialised(node, out)
        slot = node.meta.get("slot")
        if isinstance(out, torch.Tensor) and slot is not None and slot.index in self.labels:
            dense = out.detach()
            kept = gather_kept(dense, self.labels[slot.index], self.masks)
            # A copy: a later node may write to it in place.
            self.values[node.name] = dense.clone() if kept is dense else kept
        return out

    def keep(self, slot: Slot, dim: int) -> np.ndarray | None:
        """Mask of the kept indices of one dim, ``None`` for all."""
        return keep_mask(self.labels[slot.index][dim], self.masks)


class _MaskedCalls(TorchDispatchMode):
    def __init__(self, ops: list[tuple[TapedOp, Facts]], reference: MaskedReference) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation there
        self.ops = ops
        self.reference = reference

    def check(self, node: Node) -> None:
        """Every call that masks was found."""
        if self.ops:
            raise VerificationError(
                f"the reference can't be computed: '{node.name}' did not call {self.ops[0][0].op} as in the capture; "
                "the forward takes another path than when it was captured",
                node=node.name,
            )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.ops or self.ops[0][0].op is not func:
            return func(*args, **kwargs)
        op, facts = self.ops.pop(0)
        if facts.contracted:
            args, kwargs = self._zeroed(op, facts, args, kwargs)
        if facts.reduced and any(self.reference.keep(s, d) is not None for s, d in facts.reduced):
            if op.op._schema.name == "aten::native_group_norm":
                return self._over_groups(func, op, args, kwargs)
            return self._over_kept(func, op, facts, args, kwargs)
        return func(*args, **kwargs)

    def _zeroed(
        self, op: TapedOp, facts: Facts, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        zeroed = list(args)
        kwargs = dict(kwargs)
        for slot, dim in facts.contracted:
            mask = self.reference.keep(slot, dim)
            if mask is None:
                continue
            gone = torch.from_numpy(np.flatnonzero(~mask))
            for i, given in enumerate(op.args):  # wherever it stands: ``addmm(x, x, w)`` has it twice
                if given is slot:
                    zeroed[i] = zeroed[i].index_fill(dim, gone.to(zeroed[i].device), 0)
            for key, given in op.kwargs.items():
                if given is slot:
                    kwargs[key] = kwargs[key].index_fill(dim, gone.to(kwargs[key].device), 0)
        return tuple(zeroed), kwargs

    def _over_kept(self, func: Any, op: TapedOp, facts: Facts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operator on kept indices of the reduced dims; other indices of its outputs keep dense values."""
        ref = self.reference
        dims: dict[int, list[int]] = {}
        for slot, d in facts.reduced:
            dims.setdefault(slot.index, []).append(d)

        first = facts.reduced[0][0]
        for slot, d in facts.reduced:
            if slot.shape == first.shape and not _same(ref.keep(slot, d), ref.keep(first, d)):
                raise VerificationError(
                    f"{op.op} at node '{op.node}' reduces two operands over different units of dim {d}; its channel "
                    "rule has to tie them",
                    node=op.node,
                )

        def compress(value: Any, slot: Any) -> Any:
            if not (isinstance(value, torch.Tensor) and isinstance(slot, Slot)):
                return value
            for d in dims.get(slot.index, ()):
                mask = ref.keep(slot, d)
                if mask is not None:
                    value = value.index_select(d, torch.from_numpy(np.flatnonzero(mask)).to(value.device))
            return value

        new_args = [compress(v, s) for v, s in zip(args, op.args, strict=True)]
        name = op.op._schema.name
        if name in ("aten::native_layer_norm", "aten::_fused_rms_norm"):
            n = len(args[1])
            new_args[1] = list(new_args[0].shape[-n:])
        kept = func(*new_args, **{k: compress(v, op.kwargs[k]) for k, v in kwargs.items()})
        dense = func(*args, **kwargs)
        if isinstance(dense, torch.Tensor):
            return _merge(dense, kept, op.outs[0], ref)
        return tuple(_merge(d, k, slot, ref) for d, k, slot in zip(dense, kept, op.outs, strict=True))

    def _over_groups(self, func: Any, op: TapedOp, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A group norm, each of the dense groups by itself over the channels that it keeps: (N, G*I, *s)."""
        x, w, b, n, channels, area, groups, eps = args
        mask = self.reference.keep(op.args[0], 1)
        kept = np.ones(channels, bool) if mask is None else mask
        outs = [t.clone() for t in func(*args, **kwargs)]
        for g in range(groups):
            own = np.arange(channels // groups) + g * (channels // groups)
            at = torch.from_numpy(own[kept[own]]).to(x.device)
            if len(at):
                few = (None if t is None else t.index_select(0, at) for t in (w, b))
                y, mean, rstd = func(x.index_select(1, at), *few, n, len(at), area, 1, eps)
                outs[0][:, at] = y
                outs[1][:, g], outs[2][:, g] = mean[:, 0], rstd[:, 0]
        return tuple(outs)


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b is None or (a is not None and b is not None and np.array_equal(a, b))


def _merge(dense: torch.Tensor, kept: torch.Tensor, slot: Slot, ref: MaskedReference) -> torch.Tensor:
    if dense.shape == kept.shape:
        return kept
    out = dense.clone()
    index: list[Any] = []
    for d in range(dense.dim()):
        mask = ref.keep(slot, d) if dense.shape[d] != kept.shape[d] else None
        where = np.arange(dense.shape[d]) if mask is None else np.flatnonzero(mask)
        index.append(torch.from_numpy(where).to(dense.device))
    out[torch.meshgrid(*index, indexing="ij")] = kept
    return out
