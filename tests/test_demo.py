"""The demo, shortened: what it prints, writes and reports."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn

import chase_fx
from chase_fx.data import Split, load_digits
from chase_fx.demo import DemoOptions, measure, run_demo, train
from chase_fx.demo import run as run_module
from chase_fx.demo.report import Column, Report
from chase_fx.models import resnet20


@pytest.fixture(scope="module")
def shortened(tmp_path_factory):
    """One run of 60 steps on the digits, without a compiler and without Graphviz."""
    output = tmp_path_factory.mktemp("demo")
    console = Console(file=io.StringIO(), width=140)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "load_images", lambda folder: load_digits())
        patch.setattr(run_module, "why_no_compiler", lambda: "no C++ compiler")
        patch.setattr(run_module.shutil, "which", lambda tool: None)
        epochs = 60 * train.BATCH / len(load_digits().train)
        report = run_demo(DemoOptions(output=output, epochs=epochs), console)
    return output, report, console.file.getvalue()


@pytest.mark.slow
def test_the_slim_model_is_smaller_in_every_measure(shortened):
    _, report, _ = shortened
    assert report.steps == 60
    assert report.dense.parameters == 272186
    assert report.slim.parameters < 0.5 * report.dense.parameters
    assert report.slim.flops < 0.6 * report.dense.flops
    assert report.slim.nonzero < 0.2 * report.dense.nonzero
    assert report.slim.accuracy > 0.2, "better than guessing one of ten digits"


@pytest.mark.slow
def test_the_demo_says_what_it_does(shortened):
    _, _, text = shortened
    for expected in (
        "in place of Fashion-MNIST",
        "channel groups",
        "layer1.2.conv2.weight",
        "no channels.svg: Graphviz's `dot` is not on this machine",
        "nnz",
        "verified against the masked model, exact",
        "n/a: no C++ compiler",
        "test accuracy",
    ):
        assert expected in text


@pytest.mark.slow
def test_the_demo_writes_the_graph_the_model_and_the_report(shortened):
    output, report, _ = shortened
    assert {path.name for path in output.iterdir()} == {"channels.dot", "report.json", "slim.safetensors"}
    written = json.loads((output / "report.json").read_text())
    assert written["slim"]["parameters"] == report.slim.parameters
    assert written["slim"]["compiled_seconds"] is None
    assert written["machine"]["torch"] == torch.__version__
    slim = chase_fx.load(output / "slim.safetensors", resnet20())
    assert measure.count_parameters(slim) == report.slim.parameters


def column(**changes):
    values = {
        "accuracy": 0.9,
        "parameters": 100,
        "nonzero": 100,
        "flops": 1000,
        "eager_seconds": 0.01,
        "compiled_seconds": 0.005,
        "training_seconds": 60.0,
    }
    return Column(**{**values, **changes})


def test_the_table_has_ratios_and_says_na_where_nothing_was_compiled():
    slim = column(accuracy=0.89, parameters=25, eager_seconds=0.004, compiled_seconds=None)
    report = Report(column(), slim, data="", steps=5, batch=1, seed=0, latency_batch=64, no_compiler="none")
    console = Console(file=io.StringIO(), width=120)
    console.print(report.table())
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:5] for line in console.file.getvalue().splitlines() if "│" in line
    }
    assert [cell.strip() for cell in rows["test accuracy"]] == ["90.00%", "89.00%", "-1.00 points"]
    assert [cell.strip() for cell in rows["parameters"]] == ["100", "25", "4.00x"]
    assert [cell.strip() for cell in rows["latency eager, 64 images"]] == ["10.00 ms", "4.00 ms", "2.50x"]
    assert [cell.strip() for cell in rows["latency compiled, 64 images"]] == ["n/a", "n/a", ""]


def test_flops_count_a_multiply_add_as_two():
    assert measure.count_flops(nn.Linear(3, 5, bias=False), torch.randn(1, 3)) == 2 * 3 * 5
    assert measure.count_parameters(nn.Linear(3, 5)) == 20


def test_latencies_are_measured_in_turns():
    order = []

    class Model(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            order.append(self.name)
            return x

    seconds = measure.median_latencies([Model("a"), Model("b")], torch.zeros(1), rounds=3)
    assert len(seconds) == 2
    assert order[-6:] == ["a", "b"] * 3


def test_a_machine_that_cannot_compile_is_told_why(monkeypatch):
    def broken(function):
        raise RuntimeError("no compiler found\nand a long trace")

    monkeypatch.setattr(torch, "compile", broken)
    assert measure.why_no_compiler() == "no compiler found"


def test_both_runs_see_the_same_images_in_the_same_order():
    data = Split(torch.arange(600.0).view(-1, 1, 1, 1), torch.zeros(600, dtype=torch.int64))
    first, second = (
        [images.flatten().tolist() for images, _ in train._batches(data, train.Recipe(7))] for _ in range(2)
    )
    assert first == second
    assert len(first) == 7
    epoch = [image for batch in first[:4] for image in batch]
    assert len(set(epoch)) == len(epoch) == 4 * train.BATCH, "an epoch shows no image twice"
    assert epoch != sorted(epoch)
    assert first[0] != first[4], "each epoch has its own order"


def test_training_lowers_the_loss_and_runs_the_hook_after_each_step():
    torch.manual_seed(0)
    data = load_digits()
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    calls = []
    before = train.accuracy(model, data.test)
    train.fit(
        model,
        train.make_optimizer(model),
        data.train,
        train.Recipe(30, max_lr=0.01),
        label="linear",
        console=Console(file=io.StringIO()),
        after_step=lambda: calls.append(None) or "",
    )
    assert len(calls) == 30
    assert train.accuracy(model, data.test) > max(0.7, before)


def test_the_running_mean_has_no_bias_at_its_start():
    mean = train.Running()
    mean.add(3.0)
    assert mean.value == pytest.approx(3.0)
