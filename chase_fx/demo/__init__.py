"""The main job on real data: capture, train sparsely, remove channels, verify, compile, and compare with dense."""

from chase_fx.demo.run import DemoOptions, run_demo

__all__ = ["DemoOptions", "run_demo"]
