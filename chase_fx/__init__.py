"""Chase-FX: channel pruning as a compiler pass over torch.fx graphs, exact on any architecture.

>>> import torch, chase_fx
>>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> chase_fx.prune(net, torch.zeros(1, 4), channel_sparsity=0.5)(torch.zeros(3, 4)).shape
torch.Size([3, 2])
"""

from chase_fx.api import prune
from chase_fx.errors import ChaseError
from chase_fx.graphs.capture import SpecializationWarning, trace
from chase_fx.graphs.channels import ChannelGraph, Group, analyze
from chase_fx.graphs.plan import PruningPlan
from chase_fx.graphs.rules import DEFAULT_RULES
from chase_fx.io import load, save
from chase_fx.passes.rewrite import rewrite
from chase_fx.passes.verify import VerificationReport, verify
from chase_fx.training import Chase
from chase_fx.version import __version__

__all__ = [
    "DEFAULT_RULES",
    "ChannelGraph",
    "Chase",
    "ChaseError",
    "Group",
    "PruningPlan",
    "SpecializationWarning",
    "VerificationReport",
    "__version__",
    "analyze",
    "load",
    "prune",
    "rewrite",
    "save",
    "trace",
    "verify",
]
