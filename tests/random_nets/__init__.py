"""Random networks: blocks of every usual kind, drawn by hypothesis and put together in any order that fits.

Feature maps are (N, C, *s) with one to three dims of space, sequences are (N, L, C).
"""

from tests.random_nets.draw import Drawn, nets

__all__ = ["Drawn", "nets"]
