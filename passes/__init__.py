"""Passes over a captured graph: rewrite by a plan, and verify the result."""

from __future__ import annotations

if __name__ != "chase_fx.passes":  # a checkout's top folder on sys.path would otherwise give two copies of every class
    raise ImportError("import this package as 'chase_fx.passes', not as a top-level 'passes'")
