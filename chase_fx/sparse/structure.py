"""What the trainer needs to know about channels: duck-typed groups, and who can cut a module down to the kept ones.

Sparse training knows parameters, masks and units, never graphs. The dependency analysis hands it objects that look like
the protocols below; the package's top level says once, with :func:`provide`, who analyses, rewrites and shrinks a
traced module when the caller of a method names nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["ChannelsLike", "GroupLike", "MemberLike", "Provider", "Rewrite", "Shrinker", "provide", "provided"]


class MemberLike(Protocol):
    """One axis that a group touches: ``positions[i]`` are the indices along ``dim`` that belong to unit ``i``."""

    @property
    def tensor(self) -> str:
        """Name of the parameter or buffer."""

    @property
    def dim(self) -> int:
        """The dimension of that tensor."""

    @property
    def positions(self) -> Tensor:
        """LongTensor (size, k)."""

    @property
    def producer(self) -> bool:
        """Whether ``dim`` is the output dimension of a contraction weight."""


class GroupLike(Protocol):
    """Coupled axes whose ``size`` units go or stay as wholes."""

    @property
    def name(self) -> str:
        """Unique and stable name."""

    @property
    def size(self) -> int:
        """Number of units."""

    @property
    def least(self) -> int:
        """Units that have to stay."""

    @property
    def multiple(self) -> int:
        """What the number of units that stay is a multiple of."""

    @property
    def members(self) -> Sequence[MemberLike]:
        """Every axis that a unit has a slice of."""


class ChannelsLike(Protocol):
    """The part of a channel graph that training uses."""

    @property
    def groups(self) -> Sequence[GroupLike]:
        """All prunable groups."""

    def plan_keeping(self, kept: Mapping[str, Tensor]) -> Any:
        """A pruning plan from group name -> BoolTensor (size,) of the units that stay."""


class Provider(Protocol):
    """Analyses and cuts traced modules; implemented by the package's top level."""

    def handles(self, module: nn.Module) -> bool:
        """Whether ``module`` is a traced module, so that the other methods apply."""

    def analyze(self, module: nn.Module) -> ChannelsLike:
        """Its channel groups."""

    def normalised(self, channels: ChannelsLike) -> Mapping[str, str]:
        """Group name -> place of a mean, a variance or a norm over its units, which zeros would change."""

    def rewrite(self, module: nn.Module, plan: Any) -> nn.Module:
        """A slim copy of ``module`` without the channels that ``plan`` removes."""

    def shrinker(self, module: nn.Module, channels: ChannelsLike) -> Shrinker:
        """What :mod:`chase_fx.sparse.shrink` calls to make the module fit its cut parameters."""


class Shrinker(Protocol):
    """Makes a module fit parameters that were just cut, in place.

    Called as ``shrinker(module, kept)`` with the units kept so far, in the numbering of the groups as they were when
    training began: buffers are cut, and size attributes and size arguments replaced. Parameters are not touched.
    """

    def __call__(self, module: nn.Module, kept: Mapping[str, Tensor]) -> None:
        """Cut buffers and sizes of ``module``."""


Rewrite = Callable[[Any, Any], nn.Module]
"""``rewrite(module, plan)``: a slim copy of the module."""

_PROVIDERS: list[Provider] = []


def provide(provider: Provider) -> None:
    """Say who analyses, rewrites and shrinks traced modules, for every method whose caller names nobody."""
    _PROVIDERS[:] = [provider]


def provided(module: nn.Module) -> Provider | None:
    """The provider for ``module``, or ``None`` when there is none or the module is not a traced one."""
    return next((provider for provider in _PROVIDERS if provider.handles(module)), None)
