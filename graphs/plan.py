"""A pruning plan: which indices of every parameter and buffer are kept. A value, not a procedure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from chase_fx.errors import ArgumentError, CheckpointError, PlanMismatchError

__all__ = ["Indices", "PruningPlan"]

Indices = tuple[torch.Tensor | None, ...]
_FORMAT = "chase-fx-plan-1"


@dataclass(frozen=True, eq=False)
class PruningPlan:
    """Kept indices of every tensor of a model.

    Attributes:
        digest: fingerprint of the structure that the plan was made for; a rewrite refuses another one.
        outputs: the outputs that keep their shape.
        shapes: dense shape of every parameter and buffer, in the model's order.
        pruned: for each tensor that changes, per dim, the kept indices in order (``None``: all).
    """

    digest: str
    outputs: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    pruned: Mapping[str, Indices] = field(default_factory=dict)

    def kept_indices(self) -> dict[str, Indices]:
        """For every parameter and buffer, per dim, the kept indices in order (``None``: all of them)."""
        return {name: self.pruned.get(name, (None,) * len(shape)) for name, shape in self.shapes.items()}

    def new_shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor ``name`` after pruning."""
        if name not in self.shapes:
            raise ArgumentError(f"the plan knows no tensor {name!r}; it has {', '.join(list(self.shapes)[:3])}, ...")
        dense = self.shapes[name]
        kept = self.pruned.get(name)
        if kept is None:
            return dense
        return tuple(n if k is None else len(k) for n, k in zip(dense, kept, strict=True))

    def explain(self) -> str:
        """One line per tensor: ``conv1.weight: (64, 3, 7, 7) -> (32, 3, 7, 7)``."""
        lines = []
        for name, dense in self.shapes.items():
            slim = self.new_shape(name)
            lines.append(f"{name}: {dense} -> {slim}" if slim != dense else f"{name}: {dense} (unchanged)")
        return "\n".join(lines)

    def differences(self, other: PruningPlan) -> Iterator[str]:
        """One line per tensor dim that the two plans keep differently."""
        if _checked(other).shapes != self.shapes:
            raise PlanMismatchError("the plans were made for different models: their tensors differ in name or shape")
        for name, dense in self.shapes.items():
            for d, n in enumerate(dense):
                mine, theirs = (set(_indices(p, name, d, n)) for p in (self, other))
                if mine != theirs:
                    yield f"{name} dim {d}: only here {sorted(mine - theirs)}, only there {sorted(theirs - mine)}"

    def then(self, later: PruningPlan) -> PruningPlan:
        """The plan that does this one and then ``later``, which was made for the model that this one gives."""
        pruned: dict[str, Indices] = {}
        _checked(later)
        for name in self.shapes:
            if later.shapes.get(name) != self.new_shape(name):
                raise PlanMismatchError(
                    f"plans don't follow each other: {name} is {self.new_shape(name)} after the first, "
                    f"the second expects {later.shapes.get(name)}"
                )
            first, second = self.kept_indices()[name], later.kept_indices()[name]
            both = tuple(_compose(a, b) for a, b in zip(first, second, strict=True))
            if any(k is not None for k in both):
                pruned[name] = both
        return PruningPlan(self.digest, self.outputs, dict(self.shapes), pruned)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PruningPlan):
            return NotImplemented
        return self.digest == other.digest and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.digest, self.to_json()))

    def to_json(self) -> str:
        """A string that :meth:`from_json` reads back."""
        pruned = {n: [None if k is None else k.tolist() for k in kept] for n, kept in self.pruned.items()}
        shapes = {n: list(s) for n, s in self.shapes.items()}
        data = {
            "format": _FORMAT,
            "digest": self.digest,
            "outputs": list(self.outputs),
            "shapes": shapes,
            "pruned": pruned,
        }
        return json.dumps(data, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> PruningPlan:
        """Read a plan. Raises :class:`CheckpointError` for anything that :meth:`to_json` did not write."""
        try:
            data: dict[str, Any] = json.loads(text)
            if data["format"] != _FORMAT:
                raise CheckpointError(f"expected a plan of format {_FORMAT}, found {data['format']!r}")
            shapes = {n: tuple(int(i) for i in s) for n, s in data["shapes"].items()}
            pruned = {n: _read_indices(n, kept, shapes[n]) for n, kept in data["pruned"].items()}
            return PruningPlan(str(data["digest"]), tuple(map(str, data["outputs"])), shapes, pruned)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            if isinstance(e, CheckpointError):
                raise
            raise CheckpointError(f"not a pruning plan: {type(e).__name__}: {e}") from e


def _checked(plan: object) -> PruningPlan:
    if not isinstance(plan, PruningPlan):
        raise ArgumentError(f"expected a PruningPlan, found {type(plan).__name__}")
    return plan


def _read_indices(name: str, kept: list[list[int] | None], shape: tuple[int, ...]) -> Indices:
    if len(kept) != len(shape):
        raise CheckpointError(f"plan of {name}: {len(kept)} dims for shape {shape}")
    for indices, n in zip(kept, shape, strict=True):
        if indices is not None and (
            not indices
            or any(type(i) is not int for i in indices)
            or indices != sorted(set(indices))
            or indices[0] < 0
            or indices[-1] >= n
        ):
            raise CheckpointError(f"plan of {name}: kept indices must be non-empty, ascending and below {n}")
    return tuple(None if k is None else torch.tensor(k, dtype=torch.long) for k in kept)


def _indices(plan: PruningPlan, name: str, dim: int, n: int) -> list[int]:
    kept = plan.kept_indices()[name][dim]
    return list(range(n)) if kept is None else kept.tolist()


def _compose(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first[second]
