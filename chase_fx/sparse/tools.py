"""Who knows the channels of a module and can cut it: the caller, or what was provided for traced modules."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from chase_fx.errors import ArgumentError
from chase_fx.sparse.distributed import rank
from chase_fx.sparse.structure import ChannelsLike, Rewrite, Shrinker, provided

__all__ = ["Tools"]

# A log rather than a Python warning: the run goes on as asked, and programs that turn warnings into errors run too.
_log = logging.getLogger("chase_fx")


@dataclass(frozen=True)
class Tools:
    """What a trainer works on channels with; ``None`` where it needs none.

    Attributes:
        channels: the groups.
        rewrite: makes a slim copy of the module.
        shrink: makes the module fit parameters that were cut.
    """

    channels: ChannelsLike | None
    rewrite: Rewrite | None
    shrink: Shrinker | None

    @classmethod
    def find(
        cls, module: nn.Module, channels: ChannelsLike | None, rewrite: Rewrite | None, shrink: Shrinker | None, *,
        removes: bool, live_shrink: bool,
    ) -> Tools:  # fmt: skip
        """The tools given, completed by the provider's where ``module`` is a traced one.

        Args:
            module: what is trained.
            channels: what the caller gave, as the next two.
            rewrite: likewise.
            shrink: likewise.
            removes: whether channels will be removed.
            live_shrink: whether they will be cut off during training.

        Raises:
            ArgumentError: one that is needed is missing.
        """
        provider = provided(module)
        if provider is not None:
            if channels is None and removes:
                channels = provider.analyze(module)
            if rewrite is None:
                rewrite = provider.rewrite
            if shrink is None and live_shrink and channels is not None:
                shrink = provider.shrinker(module, channels)
        if removes and channels is None:
            msg = (
                f"channel_sparsity above 0 needs to know which channels are coupled, but {type(module).__name__} is no "
                f"traced module. Train chase_fx.trace(model, args) or give channels="
            )
            raise ArgumentError(msg)
        if removes and live_shrink and shrink is None:
            msg = (
                f"live_shrink=True needs to cut {type(module).__name__} in place, but it is no traced module. Train "
                f"chase_fx.trace(model, args), or give shrink="
            )
            raise ArgumentError(msg)
        if provider is not None and channels is not None and removes and not live_shrink:
            _warn_of_norms(provider.normalised(channels))
        return cls(channels, rewrite, shrink)


def _warn_of_norms(normalised: Mapping[str, str]) -> None:
    if normalised and rank() == 0:
        name, place = next(iter(normalised.items()))
        _log.warning(
            "without live_shrink=True a removed channel stays in the module as a zero, which a mean, a variance or a "
            "norm over channels still counts; the slim model of finalize() counts kept channels only, so it differs "
            "from what was trained. That concerns %d groups, %r first, at %s. Train with live_shrink=True, or train "
            "the slim model for a while",
            len(normalised), name, place,
        )  # fmt: skip
