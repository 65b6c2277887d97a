"""Saving and loading of slim modules: safetensors with the plan as JSON, no pickle."""

from __future__ import annotations

import copy
import errno
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from chase_fx.checksum import checksum
from chase_fx.errors import ArgumentError, CheckpointError
from chase_fx.graphs.capture import trace
from chase_fx.graphs.inputs import check_model
from chase_fx.graphs.plan import PruningPlan
from chase_fx.graphs.recurrent import join_weights
from chase_fx.graphs.traced import TracedModule, TraceInfo, capture_of
from chase_fx.passes.rewrite import rewrite

__all__ = ["load", "save"]

_FORMAT = "chase-fx-1"
_INPUT = "__input__."
_Model = TypeVar("_Model", bound=nn.Module)
_SMALL = 65536  # float inputs up to this many values are stored as they are; larger ones by shape


def save(slim: TracedModule, path: str | os.PathLike[str]) -> None:
    """Write a slim module: its tensors, the plan and the example inputs that it was captured with.

    The file is written beside ``path`` first and moved there when complete, so a crash leaves the old file.

    Raises:
        ArgumentError: ``slim`` did not come from a rewrite, or its example inputs can't be stored (then pass them to
            :func:`load`).
    """
    info, target = capture_of(slim), _file(path)
    if target.exists() and not target.is_file():
        raise ArgumentError(f"{target} is a device or a pipe, which a file would take the place of; name a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder to save to", str(target.parent))
    if slim.plan is None:
        raise ArgumentError("only slim modules can be saved; make one with chase_fx.rewrite or chase_fx.prune")
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[int, str] = {}
    for name, tensor in slim.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentError(f"the extra state '{name}' is no tensor and can't be stored in safetensors")
        if id(tensor) in seen:
            aliases[name] = seen[id(tensor)]
            continue
        seen[id(tensor)] = name
        tensors[name] = tensor.detach().contiguous().clone()
    spec = {"args": _describe(info.args, tensors, "args"), "kwargs": _describe(info.kwargs, tensors, "kwargs")}
    metadata = {
        "format": _FORMAT,
        "plan": slim.plan.to_json(),
        "inputs": json.dumps(spec),
        "aliases": json.dumps(aliases),
        "model": info.model,
        "captured": json.dumps(_captured(info, tensors)),
    }
    metadata["sha256"] = checksum(_text(metadata), tensors)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(
    path: str | os.PathLike[str], model: nn.Module, args: Any = None, kwargs: Mapping[str, Any] | None = None
) -> TracedModule:
    """Read a slim module back.

    Args:
        path: what :func:`save` wrote.
        model: the dense model, with any weights in any precision: it gives the code and the structure. It is not
            changed.
        args: example inputs of the model; by default those that the slim module was captured with.
        kwargs: example keyword inputs, likewise.

    Returns:
        The slim module, in the precision that it was saved in, on the device of ``model``.

    Raises:
        ArgumentError: ``model`` is no module, or on the meta device; ``path`` is a folder.
        CheckpointError: the file is truncated, tampered with or of another format.
        PlanMismatchError: ``model`` is not the architecture that was pruned.
    """
    check_model(model)
    file = _file(path)
    try:
        with safe_open(str(file), framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, ValueError) as e:
        raise CheckpointError(f"{path} is no complete safetensors file: {e}") from e
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: expected format {_FORMAT}, found {metadata.get('format')!r}")
    if checksum(_text(metadata), tensors) != metadata.get("sha256"):
        raise CheckpointError(f"{path} was changed after it was written: its checksum is another one")
    try:
        plan = PruningPlan.from_json(metadata["plan"])
        spec = json.loads(metadata["inputs"])
        aliases: dict[str, str] = json.loads(metadata["aliases"])
        captured = {name: _dtype(kind) for name, kind in json.loads(metadata["captured"]).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(f"{path}: metadata is damaged ({type(e).__name__}: {e})") from e
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):  # one would swallow what is loaded
        raise ArgumentError(
            "the model is on the meta device, in part at least, and can hold no values there; give it memory with "
            ".to_empty()"
        )
    if args is None and kwargs is None:
        try:
            args, kwargs = _restore(spec["args"], tensors, device), _restore(spec["kwargs"], tensors, device)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
            raise CheckpointError(f"{path}: the example inputs are damaged ({type(e).__name__}: {e})") from e
        model = _in_precision({n: t.dtype for n, t in tensors.items()} | captured, model)  # that of these inputs
    model = _with_indices_of(tensors, model)
    slim = rewrite(trace(model, () if args is None else args, kwargs), plan)
    state = {name: t for name, t in tensors.items() if not name.startswith(_INPUT)}
    state.update({alias: state[name] for alias, name in aliases.items() if name in state})
    own = slim.state_dict()
    for name in {**own, **state}:
        if name not in own or name not in state or own[name].shape != state[name].shape:
            raise CheckpointError(
                f"{path}: tensor '{name}' is {_shape(state.get(name))} in the file, {_shape(own.get(name))} by its plan"
            )
    dtypes = {t.dtype for t in state.values() if t.is_floating_point()}
    if len(dtypes) == 1:
        _set_precision(slim, dtypes.pop())
    slim = _in_precision({name: t.dtype for name, t in state.items() if t.is_complex()}, slim)
    slim.load_state_dict(state)
    join_weights(slim)  # another precision is other memory
    slim.moved()
    return slim


def _file(path: object) -> Path:
    try:
        found = Path(path)  # type: ignore[arg-type]  # that is the question
    except TypeError as e:
        raise ArgumentError(f"the path of a file must be a string or a Path, found {type(path).__name__}") from e
    if found.is_dir():
        raise ArgumentError(f"{found} is a folder; name a file in it")
    return found


def _set_precision(slim: TracedModule, dtype: torch.dtype) -> None:
    """``slim.to(dtype)``, which would make complex tensors real, of real tensors alone."""
    for tensor in (*slim.parameters(), *slim.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _in_precision(dtypes: Mapping[str, torch.dtype], model: _Model) -> _Model:
    """``model``, or a copy of it if one of its tensors has another precision than the one told for its name."""
    state = model.state_dict(keep_vars=True)
    other = [n for n, t in state.items() if isinstance(t, torch.Tensor) and n in dtypes and t.dtype != dtypes[n]]
    if not other:
        return model
    model = copy.deepcopy(model)
    state = model.state_dict(keep_vars=True)
    for name in other:
        state[name].data = state[name].data.to(dtypes[name])
    return model


def _captured(info: TraceInfo, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The precision that tensors had in the capture, as the example inputs have, where they were moved since."""
    slots = [slot for capture in info.captures for slot in capture.tape.slots]
    dtypes = {slot.name: slot.dtype for slot in slots if slot.kind in ("parameter", "buffer")}
    moved = {name for name, tensor in tensors.items() if dtypes.get(name, tensor.dtype) != tensor.dtype}
    return {name: str(dtypes[name]).removeprefix("torch.") for name in sorted(moved)}


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name!r} is no dtype")
    return found


def _text(metadata: Mapping[str, str]) -> str:
    return json.dumps({name: text for name, text in metadata.items() if name != "sha256"}, sort_keys=True)


def _with_indices_of(stored: Mapping[str, torch.Tensor], model: _Model) -> _Model:
    """``model``, or a copy of it with the stored whole numbers: an order of channels decides which are coupled."""
    other = {
        name: stored[name]
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.dim() and not (tensor.is_floating_point() or tensor.is_complex()) and name in stored
        if stored[name].shape == tensor.shape and not torch.equal(stored[name], tensor.cpu())
    }
    if not other:
        return model
    model = copy.deepcopy(model)
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in other.items():
        own[name].data.copy_(tensor)
    return model


def _shape(tensor: torch.Tensor | None) -> object:
    return "missing" if tensor is None else tuple(tensor.shape)


def _describe(value: Any, tensors: dict[str, torch.Tensor], path: str) -> Any:
    """Example inputs as JSON; tensors whose values matter (indices, masks) go to the file."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.numel() > _SMALL:
            return {"t": "tensor", "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        tensors[f"{_INPUT}{path}"] = value.detach().contiguous().clone()
        return {"t": "stored", "name": f"{_INPUT}{path}"}
    if type(value) in (tuple, list):
        return {"t": type(value).__name__, "v": [_describe(v, tensors, f"{path}.{i}") for i, v in enumerate(value)]}
    if type(value) is dict:
        return {"t": "dict", "v": {k: _describe(v, tensors, f"{path}.{k}") for k, v in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"t": "value", "v": value}
    raise ArgumentError(f"example input {path} of type {type(value).__name__} can't be stored in a file")


def _restore(spec: Any, tensors: Mapping[str, torch.Tensor], device: torch.device) -> Any:
    kind = spec["t"]
    if kind == "tensor":
        generator = torch.Generator().manual_seed(0)
        return torch.randn(spec["shape"], generator=generator).to(device, _dtype(spec["dtype"]))
    if kind == "stored":
        return tensors[spec["name"]].to(device)
    if kind == "dict":
        return {k: _restore(v, tensors, device) for k, v in spec["v"].items()}
    if kind in ("tuple", "list"):
        items = [_restore(v, tensors, device) for v in spec["v"]]
        return tuple(items) if kind == "tuple" else items
    if kind != "value":
        raise ValueError(f"unknown kind of input {kind!r}")
    return spec["v"]
