"""Sparse training: masks that move while the model trains, and channels that go for good.

Knows parameters, masks and units, never graphs; see DESIGN.md. Orthogonal pieces (distribution, score, drop, grow,
schedule, channel rule), one engine, and the named methods that combine them.
"""

from chase_fx.sparse.chase import Chase
from chase_fx.sparse.distributed import RanksDisagreeError
from chase_fx.sparse.methods import ACDC, GMP, MEST, SET, SNIP, GraNet, RigL, RigLITOP, SRigL, Static
from chase_fx.sparse.structure import provide
from chase_fx.sparse.trainer import SparseTrainer

__all__ = [
    "ACDC",
    "GMP",
    "MEST",
    "SET",
    "SNIP",
    "Chase",
    "GraNet",
    "RanksDisagreeError",
    "RigL",
    "RigLITOP",
    "SRigL",
    "SparseTrainer",
    "Static",
    "provide",
]
