"""The command line: what it prints, and how it fails."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from chase_fx import cli
from chase_fx.errors import ArgumentError, ChaseError
from chase_fx.specs import load_spec, parse_shape
from chase_fx.version import __version__


@pytest.fixture
def call(monkeypatch, capsys):
    """Call the command line in this process; gives its exit code, standard output and standard error."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["chase-fx", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr()
        return stopped.value.code, said.out, said.err

    return run


def test_help_names_the_commands(call):
    code, out, _ = call("--help")
    assert code == 0
    assert "demo" in out
    assert "inspect" in out


def test_version_is_the_packages(call):
    assert call("--version")[:2] == (0, f"chase-fx {__version__}\n")


def test_inspect_prints_groups_frozen_axes_and_what_a_plan_leaves(call, tmp_path):
    drawing = tmp_path / "graph.dot"
    code, out, err = call("inspect", "chase_fx.models:resnet20", "--input-shape", "2,1,28,28", "--draw", str(drawing))
    assert (code, err) == (0, "")
    assert "channel groups" in out
    assert "layer1.0.conv2.weight" in out
    assert "frozen axes" in out
    assert "fc.weight:0" in out
    assert "272,186 parameters" in out
    assert drawing.read_text().lstrip().startswith(("digraph", "graph", "strict"))


def test_inspect_leaves_less_at_a_higher_sparsity(call):
    left = []
    for sparsity in ("0.25", "0.75"):
        _, out, _ = call(
            "inspect", "chase_fx.models:resnet20", "--input-shape", "1,1,28,28", "--channel-sparsity", sparsity
        )
        left.append(int(re.search(r"leaves ([\d,]+) of", out)[1].replace(",", "")))
    assert 0 < left[1] < left[0] < 272186


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet50"], "cannot read the model spec 'resnet50'"),
        (["torchvision:"], "cannot read the model spec"),
        (["torchvision:resnet51"], "torchvision has no model 'resnet51'"),
        (["no_such_package.models:net"], "cannot import 'no_such_package'"),
        (["chase_fx.models:resnet21"], "chase_fx.models has no callable 'resnet21'"),
        (["builtins:dict"], "builtins:dict() returned a dict, expected an nn.Module"),
        (["chase_fx.models:resnet20"], "give each one's --input-shape"),
        (["chase_fx.models:resnet20", "--input-shape", "1,-1"], "cannot read the input shape '1,-1'"),
        (["chase_fx.models:resnet20", "--input-shape", "1,1,28,28", "--channel-sparsity", "1.5"], "1.5"),
    ],
)
def test_a_wrong_argument_is_one_message_and_exit_code_2(call, arguments, message):
    code, out, err = call("inspect", *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err


def test_an_input_that_does_not_fit_the_model_is_one_message_and_exit_code_1(call):
    code, _, err = call("inspect", "chase_fx.models:resnet20", "--input-shape", "1,3,28,28")
    assert code == 1
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_a_drawing_that_cannot_be_written_is_one_message(call, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "nowhere" / "graph.dot", tmp_path / "file" / "graph.dot"):
        code, _, err = call("inspect", "chase_fx.models:resnet20", "--input-shape", "1,1,28,28", "--draw", str(place))
        assert code == 1
        assert err.startswith("error: ")
        assert str(place) in err
    assert (tmp_path / "file").read_text() == "mine"


def test_code_that_raises_is_named_with_its_line(call, tmp_path, monkeypatch):
    """The factory's exception is told with its place, and so is that of the module that it is in."""
    (tmp_path / "raising_factory.py").write_text("def net():\n    raise KeyError('depth')\n")
    (tmp_path / "raising_module.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    code, _, err = call("inspect", "raising_factory:net", "--input-shape", "1,3")
    assert code == 1
    assert err.startswith("error: raising_factory:net() raised KeyError: 'depth' (")
    assert "raising_factory.py:2)" in err
    code, _, err = call("inspect", "raising_module:net", "--input-shape", "1,3")
    assert code == 1
    assert err.startswith("error: importing raising_module raised ZeroDivisionError: division by zero (")


def test_a_backbone_gets_no_weights(monkeypatch):
    """Detection models of torchvision fetch weights for their backbone by default."""

    def fetch(*args, **kwargs):
        raise AssertionError("nothing is downloaded")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", fetch)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    load_spec("torchvision:lraspp_mobilenet_v3_large")


def test_an_error_is_printed_as_it_is_even_with_brackets(call, monkeypatch):
    def fail():
        raise ChaseError("[red] is no colour here")

    monkeypatch.setattr(cli, "app", fail)
    assert call() == (1, "", "error: [red] is no colour here\n")


def test_an_unknown_command_is_a_usage_error(call):
    code, _, err = call("prune-everything")
    assert code == 2
    assert "prune-everything" in err


@pytest.mark.parametrize(("text", "shape"), [("1,3,224,224", (1, 3, 224, 224)), ("1x3x8x8", (1, 3, 8, 8)), ("7", (7,))])
def test_shapes_are_read_with_commas_or_crosses(text, shape):
    assert parse_shape(text) == shape


@pytest.mark.parametrize("text", ["", "1,,2", "a", "0,3", "1.5", "-1"])
def test_other_shapes_are_refused(text):
    with pytest.raises(ArgumentError, match="expected positive integers"):
        parse_shape(text)


def test_a_torchvision_model_comes_in_eval_mode_with_its_own_input_size():
    named = load_spec("torchvision:squeezenet1_1")
    assert not named.model.training
    assert [tuple(x.shape) for x in named.inputs] == [(1, 3, 224, 224)]


def test_a_factory_of_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "their_models.py").write_text("from torch import nn\ndef net(): return nn.Linear(3, 4)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    named = load_spec("their_models:net", [(2, 3)])
    assert isinstance(named.model, nn.Linear)
    assert named.model(*named.inputs).shape == torch.Size([2, 4])
