"""Train and eval mode: which of the captured forwards runs, and what ``train()`` of the model does.

Modules that are taken apart leave their ``training`` to the graph, so a graph is that of the modes in which they were
captured. The modes that they have at each call decide which capture runs. Where there is none for them, as for a
backbone in eval mode inside a model that was captured in train mode throughout, the call is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from chase_fx.errors import CaptureError, OtherPathError
from chase_fx.graphs.walk import modules_of, parameters_in

__all__ = ["FLAG", "Modes", "TrainingFlag", "enter_mode", "has_own_train", "modes_by_train", "set_modes"]

FLAG = "_chase_training"  # the module that tells which capture runs


class TrainingFlag(nn.Module):
    """Tells whether the modules are in the modes of the train capture or in those of the eval capture.

    Args:
        modules: the modules whose mode the forward reads, by name, without the model itself.
        captured: (in the eval capture, in the train capture) for each name; ``""`` is the model.
    """

    def __init__(self, modules: Mapping[str, nn.Module], captured: Mapping[str, tuple[bool, bool]]) -> None:
        super().__init__()
        self.names = list(captured)
        self.readers = [modules[name] if name else self for name in self.names]  # a list: no children of this module
        self.captured = [[pair[k] for pair in captured.values()] for k in (False, True)]

    def forward(self) -> bool:
        """Whether it is the train capture that runs."""
        found = [module.training for module in self.readers]
        for training in (self.training, not self.training):
            if found == self.captured[int(training)]:  # Dynamo of torch 2.11 takes no bool there
                return training
        wrong = [n for n, a, b in zip(self.names, found, self.captured[self.training], strict=True) if a is not b]
        raise OtherPathError(
            f"the model decides by the mode of {', '.join(repr(name) for name in wrong[:3])}"
            f"{' and others' if len(wrong) > 3 else ''}, and had another one there when the graph was captured; call "
            "train() or eval() of the whole module, or trace again with the model in train mode and these modules in "
            "the mode that they are to have in it",
            wrong[0],
        )


@dataclass(frozen=True)
class Modes:
    """What one call of ``train(mode)`` leaves: the mode of each module, and ``requires_grad`` where it sets that."""

    training: dict[str, bool]
    trainable: dict[str, bool]


def enter_mode(model: nn.Module, *, training: bool) -> None:
    """Put a copy of a model in the mode of a capture; modules of a model in train mode keep what they have there."""
    if not training:
        model.eval()
    elif not model.training:
        model.train()


def has_own_train(model: nn.Module) -> bool:
    """Whether the model has a ``train`` or ``eval`` of its own, which a graph module would not inherit."""
    methods = (getattr(model.train, "__func__", None), getattr(model.eval, "__func__", None))
    return methods != (nn.Module.train, nn.Module.eval)


def modes_by_train(model: nn.Module) -> dict[bool, Modes]:
    """What ``train()`` and ``eval()`` of the model do; ``model`` is changed by it.

    Raises:
        CaptureError: they change the value of a tensor.
    """
    found = {}
    for mode in (True, False):
        nn.Module.train(model, mode)
        parameters = parameters_in(modules_of(model))
        before = {name: p.requires_grad for name, p in parameters.items()}
        versions = [(t, t._version) for t in (*model.parameters(), *model.buffers())]
        model.train() if mode else model.eval()
        if any(t._version != version for t, version in versions):
            raise CaptureError(
                f"{type(model).__name__}.{'train' if mode else 'eval'}() changes the values of tensors, which a graph "
                "can't do; do it elsewhere"
            )
        changed = {name: p.requires_grad for name, p in parameters.items() if p.requires_grad is not before[name]}
        found[mode] = Modes({name: m.training for name, m in modules_of(model)}, changed)
    return found


def set_modes(module: nn.Module, modes: Modes) -> None:
    """Do to ``module`` what its model's own ``train()`` did."""
    for name, child in modules_of(module):
        child.training = modes.training.get(name, modes.training[""])
    parameters = parameters_in(modules_of(module))
    for name, trainable in modes.trainable.items():
        parameters[name].requires_grad = trainable
