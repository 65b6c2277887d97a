"""Arguments of a wrong type, and models and inputs in a state that nobody thought of: one clear error, or none."""

from __future__ import annotations

import copy
import os
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import ArgumentError, CaptureError, OptimizerMismatchError
from chase_fx.specs import load_spec

X = torch.ones(1, 4)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def channels() -> Any:
    return chase_fx.analyze(chase_fx.trace(net(), X))


@pytest.mark.parametrize("outputs", [1.5, True, [1.5], [None], b"output", slice(0, 1)])
def test_outputs(outputs: Any) -> None:
    """What names no output is refused with its value."""
    with pytest.raises(
        ArgumentError, match=r"outputs must be a name, an index, several of them, or a predicate.*found"
    ):
        chase_fx.prune(net(), X, outputs=outputs)


@pytest.mark.parametrize(
    ("score", "found"),
    [
        (lambda group: None, "NoneType"),
        (lambda group: torch.ones(group.size, dtype=torch.complex64), "complex"),
        (lambda group: ["a"] * group.size, "list"),
        (lambda group: torch.ones(group.size, device="meta"), "meta"),
        (lambda group: torch.ones(group.size, 1), r"\(8, 1\)"),
        (lambda group: 1.0, r"\(\)"),
    ],
)
def test_scores(score: Any, found: str) -> None:
    """Scores that are no (size,) real numbers are refused with what was found."""
    with pytest.raises(ArgumentError, match=rf"the score of '0.weight:0' must .*\(8,\).*{found}"):
        chase_fx.prune(net(), X, score=score)


def test_scores_as_people_give_them() -> None:
    """Lists, bools and sparse tensors of one number per unit are scores."""
    want = [0, 0, 1, 1, 0, 1, 0, 1]
    for score in (want, np.array(want), torch.tensor(want).bool(), torch.tensor(want).to_sparse()):
        (kept,) = channels().plan(0.5, score=lambda group, s=score: s).pruned["0.bias"]
        assert kept.tolist() == [2, 3, 5, 7]


def test_numbers_as_people_give_them() -> None:
    """Numbers of NumPy and fractions are numbers, True is none."""
    for sparsity in (np.float32(0.5), Fraction(1, 2)):
        assert channels().plan(sparsity, round_to=np.int64(2)).new_shape("0.bias") == (4,)
    with pytest.raises(ArgumentError, match="round_to must be a positive integer, found True"):
        channels().plan(0.5, round_to=True)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (None, "expected a mapping from group names to masks, found NoneType"),
        ([1, 0], "expected a mapping from group names to masks, found list"),
        ({"0.weight:0": "x"}, "mask of group '0.weight:0'"),
        ({"0.weight:0": torch.arange(8)}, "must hold one bool for each unit"),
        ({"0.weight:0": torch.full((8,), float("nan"))}, "must hold one bool for each unit"),
    ],
)
def test_masks(kept: Any, message: str) -> None:
    """Indices are no mask, even where there are as many of them as units."""
    with pytest.raises(ArgumentError, match=message):
        channels().plan_keeping(kept)


def test_plans_and_axes() -> None:
    """A plan asked for what it does not have, or composed with what is no plan."""
    plan = channels().plan(0.5)
    for call in (plan.then, lambda other: list(plan.differences(other))):
        with pytest.raises(ArgumentError, match="expected a PruningPlan, found str"):
            call(plan.to_json())
    with pytest.raises(ArgumentError, match=r"no tensor '9.weight'; it has 0.weight"):
        plan.new_shape("9.weight")
    for axis in (3, None, ("0.weight",), ("0.weight", None)):
        with pytest.raises(ArgumentError, match="axes are"):
            channels().explain(axis, "0.weight")
    with pytest.raises(ArgumentError, match="string or a Path, found NoneType"):
        channels().draw(None)


@pytest.mark.parametrize("kwargs", [3, "x", [("input", X)]])
def test_keywords(kwargs: Any) -> None:
    """Keyword inputs must be a mapping: pairs could hold one name twice."""
    with pytest.raises(ArgumentError, match="kwargs must be a mapping"):
        chase_fx.trace(net(), (), kwargs)


class Own(nn.Module):
    """A leaf of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.features = nn.Parameter(torch.ones(8)), 8

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.features] * self.weight


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        (3, "found int"),
        ([Own], "found list"),
        ({3: ()}, "found the key 3"),
        ({Own: 3}, r"sizes of Own in leaves must be \(attribute, tensor, dim\) triples, found 3"),
        ({Own: (("features", "weight"),)}, "triples"),
        ({Own: (("width", "weight", 0),)}, "no attribute 'width'"),
        ({Own: (("features", "gamma", 0),)}, r"'gamma'; its tensors are \{ ?'weight': \(8,\)"),
        ({Own: (("features", "weight", 1),)}, "dim 1 of 'weight'"),
    ],
)
def test_leaves(leaves: Any, message: str) -> None:
    """Size attributes that a leaf does not have would not follow its channels, so they are refused."""
    model = nn.Sequential(nn.Linear(4, 8), Own(), nn.Linear(8, 2))
    with pytest.raises(ArgumentError, match=message):
        chase_fx.trace(model, X, leaves=leaves)
    slim = chase_fx.trace(model, X, leaves={Own: (("features", "weight", 0),)})
    assert slim(X).shape == (1, 2)


@pytest.mark.parametrize("whole", [None, torch.relu, [3], ["torch.relu"], [lambda x: x]])
def test_whole(whole: Any) -> None:
    """Functions that the model's code could not be made to call by name are refused."""
    with pytest.raises(ArgumentError, match="whole"):
        chase_fx.trace(net(), X, whole=whole)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecation
        return torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))


def test_compiled_modules() -> None:
    """TorchScript inside of a model is refused by the module's name."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(scripted()), nn.Linear(8, 2))
    with pytest.raises(CaptureError, match=r"'1\.0' of Sequential is compiled by TorchScript"):
        chase_fx.prune(model, X)


@pytest.mark.parametrize("first", [lambda: nn.LazyLinear(8), lambda: nn.LazyBatchNorm1d(affine=False)])
def test_modules_without_shapes(first: Any) -> None:
    """A lazy module that never ran is refused by name, and is captured once it ran."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: lazy modules are new
        model = nn.Sequential(nn.Linear(4, 4), first(), nn.Linear(8, 2), nn.Linear(2, 2)).eval()
        model[2] = nn.LazyLinear(2)
    with pytest.raises(CaptureError, match=r"of '1' of Sequential \(Lazy.*\) has no shape before its first forward"):
        chase_fx.prune(model, X)
    model(X)
    assert chase_fx.prune(model, X)(X).shape == (1, 2)


def test_nested_inputs() -> None:
    """Nested tensors are refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: nested tensors are new
        nested = torch.nested.nested_tensor([X[0], X[0]])
    with pytest.raises(CaptureError, match="nested tensors"):
        chase_fx.prune(net(), nested)


class Graph(nn.Module):
    """A graph convolution: neighbours by a sparse matrix, of what two layers give."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return torch.sparse.mm(adjacency, self.b(torch.relu(self.a(x))))


def test_sparse_inputs() -> None:
    """A sparse input is verified like any other."""
    adjacency = (torch.rand(6, 6) < 0.4).float().to_sparse()
    model, x = Graph(), torch.randn(6, 4)
    slim = chase_fx.prune(model, (x, adjacency))
    assert slim.get_submodule("a").out_features == 4
    assert slim(x, adjacency).shape == (6, 2)


def test_inference_mode() -> None:
    """What is made in inference mode learns like what is made outside of it."""
    with torch.inference_mode():
        made, x = net(), torch.ones(1, 4)
        slims = [chase_fx.prune(m, x) for m in (net(), made, chase_fx.trace(net(), x))]
        assert torch.is_inference_mode_enabled()
    for slim in slims:
        assert not any(t.is_inference() for t in slim.state_dict(keep_vars=True).values())
        slim(X).sum().backward()
        assert slim.get_parameter("0.weight").grad is not None


def test_meta_models() -> None:
    """A model without values can be pruned unverified, as the error says."""
    model, x = net().to("meta"), X.to("meta")
    with pytest.raises(ArgumentError, match="verify=False"):
        chase_fx.prune(model, x)


# -- files and the command line


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "slim.safetensors"
    chase_fx.save(chase_fx.prune(net(), X), path)
    return path


@pytest.mark.parametrize("model", [nn.Linear, net, None])
def test_load_without_a_model(saved: Path, model: Any) -> None:
    """A class or a function in the place of a model is refused by what it is."""
    with pytest.raises(ArgumentError, match=r"model must be a torch.nn.Module, found (type; call|function|NoneType)"):
        chase_fx.load(saved, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_load_into_another_precision(saved: Path, dtype: torch.dtype) -> None:
    """A file keeps its precision, whatever that of the model is, and the model stays as it is."""
    model = net().to(dtype)
    before = copy.deepcopy(model.state_dict())
    slim, same = chase_fx.load(saved, model), chase_fx.load(saved, net())
    assert torch.equal(slim(X), same(X))
    assert all(torch.equal(t, before[n]) and t.dtype is dtype for n, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_load_of_a_module_that_was_moved(tmp_path: Path, dtype: torch.dtype) -> None:
    """A slim module that was moved to another precision is loaded in that, with inputs in that of its capture."""
    slim = chase_fx.prune(net(), X).to(dtype)
    chase_fx.save(slim, tmp_path / "moved.safetensors")
    for model in (net(), net().to(dtype)):
        assert torch.equal(chase_fx.load(tmp_path / "moved.safetensors", model)(X.to(dtype)), slim(X.to(dtype)))


def test_load_of_a_module_that_decides_by_precision(tmp_path: Path) -> None:
    """What the model does in the precision of the file is what the loaded module does."""

    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.b(self.a(x))
            return y * 2 if x.dtype is torch.bfloat16 else y

    x = torch.randn(3, 4)
    slim = chase_fx.prune(Doubling(), x).bfloat16()
    chase_fx.save(slim, tmp_path / "moved.safetensors")
    loaded = chase_fx.load(tmp_path / "moved.safetensors", Doubling())
    assert torch.equal(loaded(x.bfloat16()), slim(x.bfloat16()))


def test_load_with_inputs_of_the_model(saved: Path) -> None:
    """Inputs that are given have the model's precision, the slim module that of its file."""
    assert chase_fx.load(saved, net().double(), X.double())(X).dtype is torch.float32


@pytest.mark.parametrize("path", [None, 3, b"slim.safetensors"])
def test_paths(path: Any) -> None:
    """What is no path is refused before anything is written."""
    for call in (lambda: chase_fx.load(path, net()), lambda: chase_fx.save(chase_fx.prune(net(), X), path)):
        with pytest.raises(ArgumentError, match="must be a string or a Path"):
            call()


def test_folders(tmp_path: Path) -> None:
    """A folder is no file, and a folder that is missing is named."""
    slim = chase_fx.prune(net(), X)
    for call in (lambda: chase_fx.load(tmp_path, net()), lambda: chase_fx.save(slim, tmp_path)):
        with pytest.raises(ArgumentError, match="is a folder"):
            call()
    with pytest.raises(FileNotFoundError, match=r"no such folder.*missing'"):
        chase_fx.save(slim, tmp_path / "missing" / "slim.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def make(width): return torch.nn.Linear(width, 2)", r"make\(width\) needs arguments.*expected a factory"),
        ("make = torch.nn.Linear", r"make\(in_features: int.* needs arguments"),
        ("make = torch.nn.Linear(4, 2)", "expected a factory"),
    ],
)
def test_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str) -> None:
    """A factory that needs arguments is refused with its signature."""
    home = f"factories_{abs(hash(body))}"
    (tmp_path / f"{home}.py").write_text(f"import torch\n{body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ArgumentError, match=message):
        load_spec(f"{home}:make", [(1, 4)])


def test_a_device_is_no_file(tmp_path: Path) -> None:
    """What is no plain file stays what it is: a rename would put a file in its place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ArgumentError, match="pipe is a device or a pipe"):
        chase_fx.save(chase_fx.prune(net(), X), pipe)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_load_into_a_model_without_memory(saved: Path) -> None:
    """A tensor on the meta device would swallow what is loaded, be it one of many."""
    model = net()
    model[2].to("meta")
    with pytest.raises(ArgumentError, match=r"meta device, in part at least.*to_empty"):
        chase_fx.load(saved, model)


def test_runs_saved_to_no_file(tmp_path: Path) -> None:
    """Neither a folder nor what lies beside it is touched, and a missing folder is named."""
    traced = chase_fx.trace(net(), X)
    optimizer = torch.optim.SGD(traced.parameters(), lr=0.1)
    trainer = chase_fx.Chase(traced, optimizer, total_steps=10, sparsity=0.5)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ArgumentError, match="folder is a folder or a device; name a file"):
        trainer.save(folder)
    with pytest.raises(FileNotFoundError, match=r"no such folder to save to: .*nowhere'"):
        trainer.save(tmp_path / "nowhere" / "run")
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD, [0.1]])
def test_no_optimizer(optimizer: Any) -> None:
    """What is no optimizer is named."""
    found = type(optimizer).__name__
    with pytest.raises(OptimizerMismatchError, match=f"expected a torch.optim.Optimizer, found {found}"):
        chase_fx.Chase(chase_fx.trace(net(), X), optimizer, total_steps=10, sparsity=0.5)
