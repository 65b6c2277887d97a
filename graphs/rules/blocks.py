"""Blocks of dims that hold the same elements before and after a view."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__ = ["blocks"]


def blocks(sizes: Sequence[int], shape: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Dims before and after that hold the same elements, as few as possible at a time; dims of size 1 are left out."""
    i, j = (iter([d for d, n in enumerate(given) if n != 1]) for given in (sizes, shape))
    for first, end in zip(i, j, strict=False):
        dims, ends = [first], [end]
        left, right = sizes[first], shape[end]
        while left != right:
            if left < right:
                dims.append(next(i))
                left *= sizes[dims[-1]]
            else:
                ends.append(next(j))
                right *= shape[ends[-1]]
        yield dims, ends
