"""Capture of a model into a graph, and the dependency analysis of its channels."""

from __future__ import annotations

if __name__ != "chase_fx.graphs":  # a checkout's top folder on sys.path would otherwise give two copies of every class
    raise ImportError("import this package as 'chase_fx.graphs', not as a top-level 'graphs'")
