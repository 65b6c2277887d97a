"""What is measured of one model: captured, pruned at 50 % and at 90 %, and compared with two references.

The *reference* is the masked dense graph of ``chase_fx.verify``. The *oracle* knows no labels: it runs the original
model with the removed slices zeroed (:mod:`tests.oracle`).
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import ChaseError, VerificationError
from chase_fx.graphs.traced import TracedModule, capture_of
from tests import kept_means, oracle
from tests.rule_names import rules_used
from tests.zoo import Case, build

__all__ = ["EXACT", "SPARSITIES", "judge"]

EXACT = 1e-9
SPARSITIES = (0.5, 0.9)
LARGE = 60_000_000  # parameters; larger models skip what is not about pruning, and the second look of the oracle

Record = dict[str, Any]


class _Bound(nn.Module):
    """A model with its keyword arguments filled in."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model, self.kwargs = case.model, case.kwargs

    def forward(self, *args: Any) -> Any:
        return self.model(*args, **self.kwargs)


def _map(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(v, fn) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_map(v, fn) for v in value)
    if isinstance(value, dict):
        return {k: _map(v, fn) for k, v in value.items()}
    return value


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def prepared(case: Case) -> Case:
    """The model randomised and in double precision, its inputs too; in single precision if it has no other."""
    args, kwargs = _map((tuple(case.args), dict(case.kwargs)), _double)
    double = dataclasses.replace(case, model=case.model.double().eval(), args=args, kwargs=kwargs)
    oracle.randomise(_Bound(double))
    try:
        oracle.randomise(_Bound(double), args)
        with torch.no_grad():
            _run(double.model, args, kwargs)
    except RuntimeError:
        return dataclasses.replace(case, model=case.model.float())
    return double


def flat(value: Any, *, objects: bool = True, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor in a result, in order; with ``objects`` also those in caches and other objects."""
    seen = set() if seen is None else seen
    items: Iterable[Any] = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, (tuple, list, set)):
        items = value
    elif _open(value, objects) and id(value) not in seen:
        seen.add(id(value))
        items = [getattr(value, name) for name in _attributes(value)]
    for item in items:
        yield from flat(item, objects=objects, seen=seen)


def _attributes(value: Any) -> list[str]:
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    return list(vars(value))


def _open(value: Any, objects: bool) -> bool:
    """Whether to look for tensors among the attributes of ``value``."""
    if isinstance(value, (type, nn.Module)):
        return False
    return dataclasses.is_dataclass(value) or (objects and hasattr(value, "__dict__"))


def difference(want: Any, have: Any, *, objects: bool = True) -> float:
    """Largest difference of any output, relative to the largest absolute value of that output."""
    ours, theirs = list(flat(want, objects=objects)), list(flat(have, objects=objects))
    if len(ours) != len(theirs):
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if not a.numel():
            continue
        if not a.is_floating_point() and not a.is_complex():
            worst = max(worst, 0.0 if torch.equal(a, b) else float("inf"))
            continue
        same = (a == b) | (a.isnan() & b.isnan())
        gap = torch.where(same, torch.zeros_like(a), a - b).abs().max().item()
        finite = a[a.isfinite()].abs()
        scale = finite.max().item() if finite.numel() else 1.0
        worst = max(worst, gap / max(scale, 1e-12) if math.isfinite(gap) else math.inf)
    return worst


def _timed(fn: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    out = fn()
    return out, time.perf_counter() - start


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


def judge(name: str) -> Record:
    """Everything that the table says of one model. Never raises."""
    torch.set_num_threads(1)
    record: Record = {"name": name, "state": "unbuilt", "warnings": []}
    start = time.process_time()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            case = prepared(build(name))
            record["state"] = "crashed"
            del caught[:]
            _judge(case, record)
        record["warnings"] = sorted({str(w.message)[:300] for w in caught if "chase_fx" in type(w.message).__module__})
    except VerificationError as e:
        record["state"], record["reason"] = "mismatch", _reason(e)
    except ChaseError as e:
        record["state"], record["reason"] = "refused", _reason(e)
    except Exception as e:  # noqa: BLE001 - whatever happens is the finding
        record["reason"] = _reason(e)
        record["traceback"] = traceback.format_exc()[-2500:]
    record["cpu_seconds"] = time.process_time() - start
    return record


def _judge(case: Case, record: Record) -> None:
    model, args, kwargs = case.model, case.args, dict(case.kwargs)
    single = not any(p.dtype is torch.float64 for p in model.parameters())
    record["precision"], exact = ("single", 1e-4) if single else ("double", EXACT)
    total = sum(p.numel() for p in model.parameters())
    record["parameters"] = total
    before = {n: t.clone() for n, t in model.state_dict().items()} if total < LARGE else {}
    with torch.no_grad():
        dense, _ = _timed(lambda: _run(model, args, kwargs))
        record["forward"] = min(_timed(lambda: _run(model, args, kwargs))[1] for _ in range(2))
    traced, record["trace"] = _timed(lambda: chase_fx.trace(model, args, kwargs))
    channels, record["analyze"] = _timed(lambda: chase_fx.analyze(traced))
    record["rules"] = rules_used(traced)
    record["unknown"] = sorted({f"{u.op}: {u.reason[:160]} ({u.source})" for u in channels.unknown})
    live = {m.tensor for group in channels.groups for m in group.members}
    record["prunable"] = sum(p.numel() for n, p in model.named_parameters() if n in live) / max(total, 1)
    record["frozen"] = _frozen(model, channels, live)
    contract = {n for (n, _), why in channels.frozen.items() if why.startswith(("output ", "not used by"))}
    record["free"] = sum(p.numel() for n, p in model.named_parameters() if n in live | contract) / max(total, 1)
    with torch.no_grad():
        record["traced"] = difference(dense, _run(traced, args, kwargs))
    slims = {}
    for sparsity in SPARSITIES:
        key = f"{sparsity:g}"
        plan, seconds = _timed(lambda s=sparsity: channels.plan(s))
        slim, more = _timed(lambda p=plan: chase_fx.rewrite(traced, p))
        record.setdefault("rewrite", seconds + more)
        record[f"left {key}"] = sum(p.numel() for p in slim.parameters()) / max(total, 1)
        report = chase_fx.verify(traced, slim)
        record[f"reference {key}"] = report.difference
        exact = record["tolerance"] = max(exact, report.tolerance)  # more in single precision, or parts of it
        if total < LARGE or sparsity == SPARSITIES[0]:
            gap = record[f"oracle {key}"] = _oracle(model, args, kwargs, slim)
            if isinstance(gap, float) and gap > exact:
                record[f"rounding {key}"] = _rounding(model, args, kwargs, slim)
        slims[key] = slim
    record["batch"] = _batches(case, traced, slims["0.5"], dense, exact) if case.batch and total < LARGE else "fixed"
    if total < LARGE:
        record["size"] = _sizes(case, traced, slims["0.5"], record, exact)
        record["train"] = _train(case, traced, exact)
        after = model.state_dict()
        record["untouched"] = all(torch.equal(t, after[n]) or bool(t.isnan().any()) for n, t in before.items())
    ours = [record[f"reference {s:g}"] for s in SPARSITIES] + [record["traced"]]
    record["state"] = "exact" if max(ours) <= exact else "mismatch"
    if record["state"] == "mismatch":
        record["reason"] = f"the traced graph differs from the model by {record['traced']:.1e}"


def _run(root: nn.Module, args: Any, kwargs: Any) -> Any:
    """The result on copies of the inputs; a forward that draws numbers draws the same ones every time."""
    torch.manual_seed(0)
    return root(*_clone(args), **_clone(kwargs))


def _clone(value: Any) -> Any:
    return _map(value, torch.clone)


def _frozen(model: nn.Module, channels: Any, live: set[str]) -> list[str]:
    """The largest parameters that can't shrink, and why."""
    sizes = sorted(((p.numel(), n) for n, p in model.named_parameters() if n not in live), reverse=True)[:4]
    out = []
    for numel, name in sizes:
        reasons = {f"dim {d}: {why[:200]}" for (n, d), why in channels.frozen.items() if n == name}
        out.append(f"{name} ({numel}): " + ("; ".join(sorted(reasons)) or "unused"))
    return out


def _oracle(model: nn.Module, args: Any, kwargs: Any, slim: nn.Module) -> float | str:
    try:
        with torch.no_grad():
            expected = kept_means.expected_output(model, slim, _clone(args), _clone(kwargs))
            # Caches hold what the layers hand to themselves: no output keeps its shape for them.
            return difference(expected, _run(slim, args, kwargs), objects=False)
    except Exception as e:  # noqa: BLE001 - the oracle's own limits are reported, not hidden
        return _reason(e)


def _rounding(model: nn.Module, args: Any, kwargs: Any, slim: TracedModule) -> float:
    """How far the masked model itself moves when each weight moves by about half a unit in its last place.

    A model that amplifies that says as little about the other order in which a slim module adds.
    """
    assert slim.plan is not None
    masked = oracle.masked_copy(model, slim.plan.kept_indices())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = _run(masked, args, kwargs)
        for p in masked.parameters():
            if p.is_floating_point():
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.mul_((1 + noise * torch.finfo(p.dtype).eps / 2).to(p.dtype))
        return difference(before, _run(masked, args, kwargs), objects=False)


def _more(value: Any, batch: int) -> Any:
    """One more sample: the first one again."""
    return _map(value, lambda t: torch.cat([t, t[:1]]) if t.dim() and t.shape[0] == batch else t)


def _batches(case: Case, traced: nn.Module, slim: nn.Module, dense: Any, exact: float) -> str:
    """Whether the traced graph follows the model to one more and to one sample, and the slim one follows itself."""
    batch = next((t.shape[0] for t in flat((case.args, dict(case.kwargs))) if t.dim()), 0)
    inputs = (case.args, dict(case.kwargs))
    for what, change in (("more", lambda v: _more(v, batch)), ("one", lambda v: _map(v, lambda t: _first(t, batch)))):
        args, kwargs = change(inputs)
        with torch.no_grad():
            try:
                want = _run(case.model, args, kwargs)
            except Exception:  # noqa: BLE001 - the model itself can't
                continue
            try:
                gap = difference(want, _run(traced, args, kwargs))
                if gap > exact:
                    return f"traced differs at {what}: {gap:.1e}"
                if difference(_map(list(flat(dense)), lambda t: t), list(flat(dense))) == 0:
                    have = list(flat(_run(slim, args, kwargs)))
                    base = list(flat(_run(slim, *inputs)))
                    consistent = difference(change(list(flat(dense))), list(flat(want))) <= exact
                    gap = difference(change(base), have)
                    if consistent and gap > exact:
                        return f"slim differs at {what}: {gap:.1e}"
            except ChaseError as e:
                return f"refused at {what}: {_reason(e)}"
            except Exception as e:  # noqa: BLE001
                return f"at {what}: {_reason(e)}"
    return "ok"


def _first(t: Tensor, batch: int) -> Tensor:
    return t[:1] if t.dim() and t.shape[0] == batch else t


def _other_sizes(case: Case) -> Iterator[tuple[str, Any]]:
    """The inputs at another resolution or length: every dim of one size is cut or repeated to another one."""
    inputs = (case.args, dict(case.kwargs))
    first = 1 if case.batch else 0
    sizes = dict.fromkeys(n for t in flat(inputs) for n in t.shape[first:] if n > 1)
    for size in sizes:
        for new in (size + size // 2, 2 * size, size + 1, size - 1):
            yield f"{size} -> {new}", _map(inputs, lambda t, n=size, m=new: _resized(t, n, m, first))


def _resized(t: Tensor, size: int, new: int, first: int) -> Tensor:
    for dim in range(first, t.dim()):
        if t.shape[dim] == size:
            t = t.index_select(dim, torch.arange(new) % size)
    return t


def _sizes(case: Case, traced: nn.Module, slim: nn.Module, record: Record, exact: float) -> str:
    """Whether the traced graph follows the model to other sizes of its inputs, and the slim one the oracle.

    At most two other values of each size that the model itself accepts are tried.
    """
    tried: dict[str, int] = {}
    for what, (args, kwargs) in _other_sizes(case):
        size = what.partition(" ")[0]
        if tried.get(size, 0) == 2:
            continue
        with torch.no_grad():
            try:
                want = _run(case.model, args, kwargs)
            except Exception:  # noqa: BLE001 - the model itself can't
                continue
            tried[size] = tried.get(size, 0) + 1
            try:
                gap = difference(want, _run(traced, args, kwargs))
            except ChaseError as e:
                return f"refused at {what}: {_reason(e)}"
            except Exception as e:  # noqa: BLE001
                return f"fails at {what}: {_reason(e)}"
        if gap > exact:
            warned = " (after a warning)" if capture_of(traced).specialised else ""
            return f"traced differs at {what}: {gap:.1e}{warned}"
        known = record.get("oracle 0.5")
        if isinstance(known, float) and known <= exact:
            gap = _oracle(case.model, args, kwargs, slim)
            if not isinstance(gap, float) or gap > exact:
                refused = isinstance(gap, str) and gap.startswith("Other")
                return f"slim {'refused' if refused else 'differs'} at {what}: {gap}"
    return f"ok, {sum(tried.values())} tried" if tried else "fixed"


def _train(case: Case, traced: nn.Module, exact: float) -> str:
    """Whether the traced graph in train mode returns the model's outputs, gradients and buffers, dropout included."""
    ours, theirs = (_trained(case, copy.deepcopy(root)) for root in (case.model, traced))
    if isinstance(ours, str):
        return "the model itself: " + ours
    if capture_of(traced).train_error is not None:
        return f"refused: {theirs}"
    if isinstance(theirs, str):
        return theirs
    state = {n: t for n, t in ours[2].items() if n not in theirs[2] or difference(t, theirs[2][n]) > exact}
    idle = sorted(n for n in set(theirs[1]) - set(ours[1]) if not theirs[1][n].any())
    gradients = max((difference(g, theirs[1][n]) for n, g in ours[1].items() if n in theirs[1]), default=0.0)
    findings = (
        (difference(ours[0], theirs[0]) > exact, f"outputs differ: {difference(ours[0], theirs[0]):.1e}"),
        (
            set(ours[1]) | set(idle) != set(theirs[1]),
            f"gradients missing or added: {sorted(set(ours[1]) ^ set(theirs[1]))[:3]}",
        ),
        (gradients > 100 * exact, f"gradients differ: {gradients:.1e}"),
        (bool(state), f"state differs: {sorted(state)[:3]}"),
    )
    same = f"ok, with zeros for gradients that the model leaves out: {idle[:3]}" if idle else "ok"
    return next((text for found, text in findings if found), same)


def _trained(case: Case, root: nn.Module) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]] | str:
    root.train()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    try:
        with mock.patch.object(torch, "seed", _same_seed):
            out = root(*_clone(case.args), **_clone(dict(case.kwargs)))
        loss = [_weighted(t) for t in flat(out) if t.requires_grad]
        if loss:
            torch.stack(loss).sum().backward()
    except Exception as e:  # noqa: BLE001
        return _reason(e)
    return out, {n: p.grad for n, p in root.named_parameters() if p.grad is not None}, dict(root.state_dict())


def _same_seed() -> int:
    """Instead of a seed from the system, which would be another one in every run."""
    torch.manual_seed(11)
    return 11


def _weighted(t: Tensor) -> Tensor:
    """A scalar to which every element contributes differently."""
    return (t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view(t.shape)).sum()
