"""What a forward changes in the containers that it was given: the graph does the same, when all else is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.fx.node import has_side_effect

from chase_fx.errors import CaptureError
from chase_fx.graphs.trees import SEQUENCES, attributes_of, named_tensors

if TYPE_CHECKING:
    from chase_fx.graphs.arguments import Arguments

__all__ = ["PUTS", "Given", "given_container", "put_attribute", "put_back", "put_items"]


@dataclass(frozen=True)
class Given:
    """A container among the inputs, and what was in it before the forward.

    Attributes:
        node: the node that gives it.
        path: where it is among the inputs.
        items: of a dict, its pairs.
        attributes: by name.
    """

    value: Any
    node: Node
    path: str
    items: list[Any]
    attributes: dict[str, Any]


def given_container(value: Any, node: Node, path: str) -> Given:
    """``value``, which ``node`` gives, as it is now."""
    return Given(value, node, path, _items(value), dict(attributes_of(value)))


def item_at(container: Any, place: int) -> Any:
    """What a container has at a place; of a dict, the value."""
    return list(container.values() if isinstance(container, dict) else container)[place]


def put_items(container: Any, items: list[Any]) -> None:
    """Let ``container`` hold these items alone; of a dict, these pairs."""
    container.clear()
    if not isinstance(container, dict):
        container.extend(items)
        return
    for key, item in items:
        container[key] = item


def put_attribute(container: Any, name: str, item: Any) -> None:
    """Let ``container`` have this attribute."""
    setattr(container, name, item)


PUTS = frozenset({has_side_effect(put_items), has_side_effect(put_attribute)})


def put_back(arguments: Arguments, to_fx: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Write nodes for what the forward changed; the tensors that the caller finds there, with their paths.

    Raises:
        CaptureError: the forward deleted an attribute.
    """
    for given in arguments.containers.values():
        items, attributes = _items(given.value), dict(attributes_of(given.value))
        if not _same(items, given.items):
            arguments.call(put_items, (given.node, _written(arguments, to_fx, given, items)), plain=True)
            yield from named_tensors(given.value, given.path)
        for name in given.attributes.keys() - attributes.keys():
            raise CaptureError(
                f"the forward deletes attribute '{name}' of its argument '{given.path}', which a graph would not do"
            )
        for name, item in attributes.items():
            if name not in given.attributes or item is not given.attributes[name]:
                arguments.call(put_attribute, (given.node, name, to_fx(arguments, item)), plain=True)
                yield from named_tensors(item, f"{given.path}.{name}")


def _written(arguments: Arguments, to_fx: Any, given: Given, items: list[Any]) -> list[Any]:
    """The items as arguments; an object that was there before stays the caller's own."""
    single = [pair[1] for pair in given.items] if isinstance(given.value, dict) else given.items
    places = {id(item): place for place, item in enumerate(single) if not isinstance(item, torch.Tensor)}

    def write(item: Any) -> Any:
        if id(item) in places and id(item) not in arguments.containers:
            return arguments.call(item_at, (given.node, places[id(item)]), plain=True)
        return to_fx(arguments, item)

    if isinstance(given.value, dict):
        return [(to_fx(arguments, key), write(item)) for key, item in items]
    return [write(item) for item in items]


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.items())
    return list(value) if isinstance(value, SEQUENCES) else []


def _same(items: list[Any], before: list[Any]) -> bool:
    """Whether the same objects are in the same places; pairs are made anew each time."""
    if len(items) != len(before):
        return False
    pairs = all(type(item) is tuple and len(item) == 2 for item in (*items, *before))
    return all(a is b or (pairs and a[0] is b[0] and a[1] is b[1]) for a, b in zip(items, before, strict=True))
