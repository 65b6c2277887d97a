"""The command line: ``chase-fx demo`` and ``chase-fx inspect SPEC``.

Commands import what they need when they run, so that ``--help`` needs no optional dependency.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from chase_fx.errors import ArgumentError, ChaseError
from chase_fx.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="chase-fx",
    help="Channel-level sparse training and exact structured pruning for PyTorch models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line.

    Exits with 0 on success, 1 when the work failed, and 2 when the command was called wrongly; a ``ChaseError`` is
    printed as one message without a traceback, and so is a file that can't be read or written.
    """
    try:
        app()
    except (ChaseError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, ArgumentError) else 1)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"chase-fx {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Channel-level sparse training and exact structured pruning for PyTorch models."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the graph, the slim model and the report.")] = Path(
        "demo-output"
    ),
    data: Annotated[Path | None, typer.Option(help="Folder with the four Fashion-MNIST files.")] = None,
    epochs: Annotated[float, typer.Option(min=0.01, help="Passes over the training images, for each model.")] = 3.0,
    training_seconds: Annotated[
        float, typer.Option(min=1, help="Train fewer steps if both models together would take longer than this.")
    ] = 210.0,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the masks and the order of the images.")] = 0,
) -> None:
    """Train a ResNet-20 sparsely, remove its channels, verify and compile it, and compare it with the dense one."""
    from chase_fx.demo import DemoOptions, run_demo

    run_demo(DemoOptions(output=output, data=data, epochs=epochs, training_seconds=training_seconds, seed=seed))


@app.command()
def inspect(
    spec: Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME or package.module:factory.")],
    input_shape: Annotated[
        list[str] | None,
        typer.Option(help="Shape of an input, such as 1,3,224,224; once for each input of the model."),
    ] = None,
    draw: Annotated[Path | None, typer.Option(help="Write the graph there: .dot, .svg or .html.")] = None,
    channel_sparsity: Annotated[float, typer.Option(help="Share of the channels that the plan removes.")] = 0.5,
) -> None:
    """Print a model's channel groups, its frozen axes with the reasons, and what a plan would leave."""
    import chase_fx
    from chase_fx.inspection import frozen_table, group_table, plan_table
    from chase_fx.specs import load_spec, parse_shape

    named = load_spec(spec, [parse_shape(text) for text in input_shape or ()])
    channels = chase_fx.analyze(chase_fx.trace(named.model, named.inputs))
    plan = channels.plan(channel_sparsity=channel_sparsity)
    console = Console()
    console.print(group_table(channels))
    if channels.frozen:
        console.print(frozen_table(channels))
    console.print(plan_table(channels, plan, named.model))
    if draw is not None:
        channels.draw(draw)
        console.print(f"wrote {draw}", markup=False)
