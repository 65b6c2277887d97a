"""Models by name, for the command line: ``torchvision:resnet50``, ``timm:resnet50``, ``package.module:factory``."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from chase_fx.errors import ArgumentError, ChaseError

__all__ = ["NamedModel", "load_spec", "parse_shape"]

_FORMS = "torchvision:NAME, timm:NAME or package.module:factory"
_TORCHVISION_SIDES = {"inception_v3": 299}


@dataclass(frozen=True)
class NamedModel:
    """A model with random weights in eval mode, and example inputs that it takes."""

    spec: str
    model: nn.Module
    inputs: tuple[Tensor, ...]


def load_spec(spec: str, shapes: Sequence[tuple[int, ...]] = ()) -> NamedModel:
    """Build the model that ``spec`` names; nothing is downloaded.

    Args:
        spec: ``torchvision:resnet50``, ``timm:resnet50`` or ``package.module:factory``, where ``factory()`` returns an
            ``nn.Module``. Modules of the working directory are found too.
        shapes: the shape of each input, batch first; may be left out for torchvision and timm.

    Raises:
        ArgumentError: the spec has another form, the library or the name does not exist, or a shape is missing.
        ChaseError: the factory, or the module that it is in, raised an exception, which is the cause.
    """
    library, colon, name = spec.partition(":")
    if not colon or not library or not name:
        raise ArgumentError(f"cannot read the model spec {spec!r}: expected {_FORMS}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own deprecations, which nobody can act on here
        if library == "torchvision":
            model, default = _from_torchvision(name)
        elif library == "timm":
            model, default = _from_timm(name)
        else:
            model, default = _from_factory(library, name), ()
    chosen = tuple(shapes) or default
    if not chosen:
        raise ArgumentError(
            f"the inputs of {spec!r} are not known: give each one's --input-shape, such as 1,3,224,224."
        )
    return NamedModel(spec, model.eval(), tuple(torch.randn(shape) for shape in chosen))


def parse_shape(text: str) -> tuple[int, ...]:
    """Read ``1,3,224,224`` (or ``1x3x224x224``).

    Raises:
        ArgumentError: not positive integers.
    """
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ArgumentError(f"cannot read the input shape {text!r}: expected positive integers, such as 1,3,224,224.")
    return tuple(int(part) for part in parts)


def _from_torchvision(name: str) -> tuple[nn.Module, tuple[tuple[int, ...], ...]]:
    try:
        from torchvision import models
    except ImportError as error:
        raise ArgumentError("torchvision is not installed: pip install torchvision.") from error
    try:
        # Detection and segmentation models fetch weights for their backbone, unless told otherwise.
        builder = models.get_model_builder(name)
        none = {key: None for key in inspect.signature(builder).parameters if key in ("weights", "weights_backbone")}
        model: nn.Module = builder(**none)
    except ValueError as error:
        raise ArgumentError(
            f"torchvision has no model {name!r}; its names: {', '.join(models.list_models())}."
        ) from error
    side = _TORCHVISION_SIDES.get(name, 224)
    return model, ((1, 3, side, side),)


def _from_timm(name: str) -> tuple[nn.Module, tuple[tuple[int, ...], ...]]:
    try:
        import timm
    except ImportError as error:
        raise ArgumentError("timm is not installed: pip install timm.") from error
    if not timm.is_model(name):
        raise ArgumentError(f"timm has no model {name!r}; timm.list_models() lists its names.")
    model: nn.Module = timm.create_model(name, pretrained=False)
    size = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    return model, ((1, *size),)


def _from_factory(module_name: str, factory_name: str) -> nn.Module:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ArgumentError(
            f"cannot import {error.name!r} of {module_name}:{factory_name}. Expected {_FORMS}."
        ) from error
    except Exception as error:  # somebody else's code
        raise ChaseError(f"importing {module_name} raised {_said(error)}") from error
    factory = getattr(module, factory_name, None)
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ArgumentError(f"{module_name} has no callable {factory_name!r}: expected a factory of an nn.Module.")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ArgumentError(
            f"{module_name}:{factory_name}{inspect.signature(factory)} needs arguments ({error}): expected a factory "
            "that takes none; write a function that fills them in."
        ) from error
    except ValueError:  # a builtin without a signature
        pass
    try:
        model = factory()
    except Exception as error:  # somebody else's code
        raise ChaseError(f"{module_name}:{factory_name}() raised {_said(error)}") from error
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{module_name}:{factory_name}() returned a {type(model).__name__}, expected an nn.Module.")
    return model


def _said(error: Exception) -> str:
    """What somebody else's code raised, and where."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
