"""Small nets, one for each shape of network that the model collections lack or hide.

Each ends in a head of fixed width; widths in between differ, so that dims that are not the same do not look alike.
"""

from __future__ import annotations

from tests.zoo import Case, shapes_images, shapes_other, shapes_relations, shapes_sequences, shapes_signals
from tests.zoo.nets import Builder

__all__ = ["NAMES", "build"]

_BUILDERS: dict[str, Builder] = {
    name: make
    for module in (shapes_images, shapes_sequences, shapes_signals, shapes_relations, shapes_other)
    for name, make in vars(module).items()
    if getattr(make, "is_shape", False)
}
NAMES = tuple(_BUILDERS)


def build(name: str) -> Case:
    """A net by name."""
    case = _BUILDERS[name]()
    case.model.eval()
    return case
