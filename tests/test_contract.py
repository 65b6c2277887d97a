"""Every name of the public contract, on small nets."""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import json
import shutil
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chase_fx
from chase_fx.errors import ArgumentError, GraphvizMissingError, PlanMismatchError
from tests.oracle import assert_exact, difference, randomise


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Block(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.stem(x)).mean((2, 3)))


def images(batch: int = 3, size: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Residual(), (images(),))


@pytest.fixture
def traced(model: nn.Module) -> Any:
    return chase_fx.trace(model, images())


GOLDEN = """\
stem.weight: 8<stem.weight:0> x 3 x 3 x 3
stem.bias: 8<stem.weight:0>
block.conv1.weight: 6<block.conv1.weight:0> x 8<stem.weight:0> x 3 x 3
block.bn1.weight: 6<block.conv1.weight:0>
block.bn1.bias: 6<block.conv1.weight:0>
block.conv2.weight: 8<stem.weight:0> x 6<block.conv1.weight:0> x 3 x 3
block.bn2.weight: 8<stem.weight:0>
block.bn2.bias: 8<stem.weight:0>
fc.weight: 4 x 8<stem.weight:0>
fc.bias: 4
block.bn1.running_mean: 6<block.conv1.weight:0>
block.bn1.running_var: 6<block.conv1.weight:0>
block.bn2.running_mean: 8<stem.weight:0>
block.bn2.running_var: 8<stem.weight:0>"""


# -- signatures -------------------------------------------------------------------------------------------------------


def test_signatures() -> None:
    """The functions take the arguments that the contract names, in its order, with its defaults."""

    def of(function: Any) -> dict[str, Any]:
        return {n: p.default for n, p in inspect.signature(function).parameters.items() if n != "self"}

    none = inspect.Parameter.empty
    assert list(of(chase_fx.trace).items())[:3] == [("model", none), ("args", none), ("kwargs", None)]
    assert list(of(chase_fx.analyze).items())[:2] == [("traced", none), ("outputs", None)]
    plan = of(chase_fx.ChannelGraph.plan)
    assert list(plan.items())[:3] == [("channel_sparsity", 0.5), ("score", "magnitude"), ("round_to", 1)]
    assert list(of(chase_fx.rewrite)) == ["traced", "plan"]
    assert list(of(chase_fx.verify))[:2] == ["traced", "slim"]
    assert of(chase_fx.prune) == {
        "model": none, "args": none, "kwargs": None, "channel_sparsity": 0.5, "score": "magnitude", "round_to": 1,
        "outputs": None, "verify": True,
    }  # fmt: skip
    kinds = inspect.signature(chase_fx.prune).parameters
    assert kinds["channel_sparsity"].kind is inspect.Parameter.KEYWORD_ONLY
    assert list(of(chase_fx.save)) == ["slim", "path"]
    assert list(of(chase_fx.load))[:2] == ["path", "model"]
    assert all(hasattr(chase_fx, name) for name in chase_fx.__all__)


def test_step_by_step_is_prune(model: nn.Module, traced: Any) -> None:
    """trace, analyze, plan and rewrite give what prune gives."""
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    once = chase_fx.prune(model, images(), channel_sparsity=0.5)
    assert isinstance(slim, torch.fx.GraphModule)
    assert slim.plan == once.plan
    assert torch.equal(slim(images()), once(images()))
    assert_exact(model, once.eval(), (images(),))


def test_verify_reports(traced: Any) -> None:
    """The report says how much was compared and how far apart it was."""
    report = chase_fx.verify(traced, chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5)))
    assert report.outputs == 1
    assert report.nodes >= 8
    assert report.difference <= report.tolerance == 1e-9
    assert "exact: 1 outputs" in str(report)


def test_verify_changes_nothing(traced: Any) -> None:
    """verify leaves modes, buffers and the random state of both modules alone."""
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5)).train()
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in (traced, slim)]
    state = torch.get_rng_state()
    chase_fx.verify(traced, slim)
    for was, module in zip(before, (traced, slim), strict=True):
        assert all(torch.equal(was[n], t) for n, t in module.state_dict().items())
    assert all(m.training for m in slim.modules())
    assert not traced.training
    assert torch.equal(state, torch.get_rng_state())


# -- the channel graph ------------------------------------------------------------------------------------------------


def test_golden_text(traced: Any) -> None:
    """The text dump of a residual net names each axis and its group."""
    assert str(chase_fx.analyze(traced)) == GOLDEN


def test_groups(traced: Any) -> None:
    """The residual stream is one group over all that touches it; the inner convolution is another."""
    stream, inner = chase_fx.analyze(traced).groups
    assert (stream.name, stream.size) == ("stem.weight:0", 8)
    assert (inner.name, inner.size) == ("block.conv1.weight:0", 6)
    assert [(m.tensor, m.dim, m.producer) for m in inner.members] == [
        ("block.conv1.weight", 0, True),
        ("block.bn1.weight", 0, False),
        ("block.bn1.bias", 0, False),
        ("block.conv2.weight", 1, False),
        ("block.bn1.running_mean", 0, False),
        ("block.bn1.running_var", 0, False),
    ]
    for member in (*stream.members, *inner.members):
        size = stream.size if member in stream.members else inner.size
        assert torch.equal(member.positions, torch.arange(size)[:, None])
    assert ("fc.weight", 1) in {(m.tensor, m.dim) for m in stream.members}
    assert ("fc.weight", 0) not in {(m.tensor, m.dim) for m in stream.members}


def test_graph(traced: Any) -> None:
    """The networkx graph has every axis as a node and, on each edge, the FX node and the operator."""
    graph = chase_fx.analyze(traced).graph
    assert type(graph) is nx.MultiDiGraph
    names = {node.name for node in traced.graph.nodes}
    for name, tensor in traced.state_dict().items():
        for dim, size in enumerate(tensor.shape):
            assert graph.nodes[name, dim]["size"] == size
    assert graph.nodes["stem.weight", 0]["group"] == "stem.weight:0"
    assert graph.nodes["stem.weight", 0]["frozen"] is None
    assert graph.nodes["fc.weight", 0]["group"] is None
    assert graph.number_of_edges() > 0
    for _, _, data in graph.edges(data=True):
        assert data["node"] in names
        assert data["op"].startswith("aten.")
        assert "source" in data
    ops = {d["op"] for a, b, d in graph.edges(data=True) if {a[0], b[0]} == {"stem.weight", "block.conv2.weight"}}
    assert any("add" in op for op in ops)


def test_frozen(traced: Any) -> None:
    """Frozen axes come with the operator or the output that froze them, and live ones are not among them."""
    frozen = chase_fx.analyze(traced).frozen
    assert "output 'output' keeps its shape" in frozen["fc.weight", 0]
    assert "input" in frozen["stem.weight", 1]
    assert "kernel size" in frozen["stem.weight", 2]
    assert "aten.convolution" in frozen["stem.weight", 2]
    assert ("stem.weight", 0) not in frozen


def test_explain(traced: Any) -> None:
    """explain gives the path of couplings, line by line with operator and source, or says that there is none."""
    channels = chase_fx.analyze(traced)
    lines = channels.explain("stem.weight", ("fc.weight", 1)).splitlines()
    assert lines[0] == "stem.weight[dim 0]"
    assert lines[-1].endswith("fc.weight[dim 1]")
    assert all(" -- aten." in line and " at '" in line for line in lines[1:])
    addition = channels.explain("stem.weight", "block.conv2.weight")
    assert "aten.add" in addition
    assert f"{Path(__file__).name}:{_line_of(Block.forward, 'return')}" in addition
    assert channels.explain("stem.weight", "block.conv1.weight").endswith("are not coupled")


def _line_of(function: Any, word: str) -> int:
    lines, start = inspect.getsourcelines(function)
    return next(start + i for i, line in enumerate(lines) if word in line)


def test_draw(traced: Any, tmp_path: Path) -> None:
    """draw writes Graphviz source, a page, and an SVG where Graphviz is installed; the suffix decides."""
    channels = chase_fx.analyze(traced)
    dot = channels.draw(tmp_path / "graph.dot").read_text()
    assert "graph" in dot.split("{")[0]
    for name in ("stem.weight", "block.conv1.weight", "fc.weight"):
        assert name in dot
    page = channels.draw(str(tmp_path / "graph.html")).read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "stem.weight" in page
    with pytest.raises(ArgumentError, match="suffix"):
        channels.draw(tmp_path / "graph.png")


def test_draw_svg(traced: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An SVG is drawn by Graphviz; without it the .dot is written and the error says so."""
    channels = chase_fx.analyze(traced)
    if shutil.which("dot"):
        assert "<svg" in channels.draw(tmp_path / "graph.svg").read_text()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GraphvizMissingError, match=r"wrote .*other\.dot"):
        channels.draw(tmp_path / "other.svg")
    assert "stem.weight" in (tmp_path / "other.dot").read_text()


# -- plans ------------------------------------------------------------------------------------------------------------


def test_kept_indices(model: nn.Module, traced: Any) -> None:
    """Every parameter and buffer has one entry per dim; the weights of the slim module are the dense ones there."""
    plan = chase_fx.analyze(traced).plan(0.5)
    kept = plan.kept_indices()
    state = model.state_dict()
    assert list(kept) == list(dict([*model.named_parameters(), *model.named_buffers()]))
    slim = chase_fx.rewrite(traced, plan).state_dict()
    for name, indices in kept.items():
        assert len(indices) == state[name].dim()
        expected = state[name]
        for dim, k in enumerate(indices):
            if k is not None:
                assert k.dtype is torch.long
                assert torch.equal(k, k.unique())
                expected = expected.index_select(dim, k)
        assert torch.equal(slim[name], expected)
    assert kept["fc.bias"] == (None,)
    assert kept["block.bn1.num_batches_tracked"] == ()
    assert len(kept["stem.bias"][0]) == 4
    assert len(kept["block.conv1.weight"][0]) == 3


def test_magnitude_keeps_the_large(traced: Any) -> None:
    """Units whose weights are scaled down go first."""
    small = torch.tensor([1, 4, 5])
    with torch.no_grad():
        for member in chase_fx.analyze(traced).groups[1].members:
            traced.state_dict()[member.tensor].index_fill_(member.dim, small, 1e-6)
    kept = chase_fx.analyze(traced).plan(0.5).kept_indices()["block.conv1.weight"][0]
    assert kept.tolist() == [0, 2, 3]


def test_score_function(traced: Any) -> None:
    """A function of a group gives the scores; the lowest go."""
    plan = chase_fx.analyze(traced).plan(0.5, score=lambda group: -torch.arange(group.size))
    assert plan.kept_indices()["stem.bias"][0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("sparsity", "round_to", "width"), [(0.5, 4, 4), (0.4, 4, 4), (0.99, 1, 1), (0.9, 2, 2), (0.5, 1, 4)]
)
def test_widths(traced: Any, sparsity: float, round_to: int, width: int) -> None:
    """Kept widths follow the sparsity, are multiples of round_to, and at least one unit is left."""
    plan = chase_fx.analyze(traced).plan(sparsity, round_to=round_to)
    assert len(plan.kept_indices()["stem.bias"][0]) == width


def test_zero_sparsity_keeps_all(model: nn.Module) -> None:
    """At sparsity 0 the slim module is the dense one, tensor by tensor."""
    slim = chase_fx.prune(model, images(), channel_sparsity=0)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in slim.state_dict().items())
    assert torch.equal(slim(images()), model(images()))


def test_plan_text(traced: Any) -> None:
    """explain() of a plan prints a line per tensor with both shapes."""
    lines = chase_fx.analyze(traced).plan(0.5).explain().splitlines()
    assert "stem.weight: (8, 3, 3, 3) -> (4, 3, 3, 3)" in lines
    assert "fc.bias: (4,) (unchanged)" in lines
    assert len(lines) == len(traced.state_dict())


def test_plan_is_a_value(traced: Any) -> None:
    """A plan survives JSON, equals and hashes like its copy, and differs from another by named dims."""
    channels = chase_fx.analyze(traced)
    plan = channels.plan(0.5)
    again = chase_fx.PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert json.loads(plan.to_json())["digest"] == channels.digest
    assert list(again.differences(plan)) == []
    other = channels.plan(0.75)
    assert other != plan
    lines = list(plan.differences(other))
    assert any(line.startswith("stem.weight dim 0: only here [") for line in lines)
    assert torch.equal(chase_fx.rewrite(traced, again)(images()), chase_fx.rewrite(traced, plan)(images()))


def test_plans_compose(model: nn.Module, traced: Any) -> None:
    """Pruning what was pruned is the composed plan: the same tensors, and exact."""
    first = chase_fx.analyze(traced).plan(0.25)
    slim = chase_fx.rewrite(traced, first).eval()
    second_trace = chase_fx.trace(slim, images())
    second = chase_fx.analyze(second_trace).plan(0.5)
    slimmer = chase_fx.rewrite(second_trace, second)
    both = first.then(second)
    state = model.state_dict()
    for name, indices in both.kept_indices().items():
        expected = state[name]
        for dim, k in enumerate(indices):
            expected = expected if k is None else expected.index_select(dim, k)
        assert torch.equal(slimmer.state_dict()[name], expected), name
    direct = chase_fx.rewrite(traced, both)
    assert torch.equal(direct(images()), slimmer(images()))
    with pytest.raises(PlanMismatchError, match="don't follow each other"):
        second.then(first)


def test_plan_keeping(model: nn.Module, traced: Any) -> None:
    """plan_keeping removes the named units and nothing else."""
    channels = chase_fx.analyze(traced)
    mask = torch.tensor([True, False, True, True, False, True])
    plan = channels.plan_keeping({"block.conv1.weight:0": mask})
    kept = plan.kept_indices()
    assert kept["block.conv2.weight"][1].tolist() == [0, 2, 3, 5]
    assert kept["stem.bias"] == (None,)
    assert_exact(model, chase_fx.rewrite(traced, plan).eval(), (images(),))


# -- inputs and outputs -----------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclasses.dataclass
class Named:
    logits: Tensor
    hidden: Tensor | None = None
    extra: Any = None


class Many(nn.Module):
    """Returns two tensors in a structure that the argument names."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        hidden = self.b(F.relu(self.a(x)))
        logits = self.c(hidden)
        return {
            "tuple": lambda: (logits, hidden),
            "list": lambda: [logits, hidden],
            "dict": lambda: {"logits": logits, "hidden": hidden},
            "namedtuple": lambda: Pair(logits, hidden),
            "dataclass": lambda: Named(logits, hidden, [hidden, 3]),
            "nested": lambda: (logits, {"all": [hidden, (logits,)]}),
        }[self.kind]()


KINDS = ("tuple", "list", "dict", "namedtuple", "dataclass", "nested")


@pytest.mark.parametrize("kind", KINDS)
def test_output_structures(kind: str) -> None:
    """Capture and slim module return the model's own structure, and all outputs keep their shape."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64)
    model = randomise(Many(kind), (x,))
    traced = chase_fx.trace(model, x)
    want = model(x)
    for module in (traced, copy.deepcopy(traced)):
        have = module(x)
        assert type(have) is type(want)
        assert difference(want, have) == 0
    slim = chase_fx.prune(model, x)
    assert slim.get_parameter("a.weight").shape == (4, 4)
    assert slim.get_parameter("b.weight").shape == (8, 4)
    assert_exact(model, slim.eval(), (x,))


@pytest.mark.parametrize(
    ("outputs", "kind"),
    [
        ("logits", "dict"),
        ("logits", "dataclass"),
        (0, "tuple"),
        (["logits"], "dict"),
        (lambda path: path == "logits", "dict"),
    ],
)
def test_freed_outputs(outputs: Any, kind: str) -> None:
    """Outputs that are not selected lose their channels; the selected one keeps its shape and is exact."""
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = randomise(Many(kind), (x,))
    slim = chase_fx.prune(model, x, outputs=outputs)
    have = slim(x)
    logits, hidden = {"dict": lambda: (have["logits"], have["hidden"]), "tuple": lambda: have,
                      "dataclass": lambda: (have.logits, have.hidden)}[kind]()  # fmt: skip
    assert logits.shape == (3, 2)
    assert hidden.shape == (3, 4)
    assert chase_fx.verify(chase_fx.trace(model, x), slim).outputs >= 2


class Options(nn.Module):
    """Keyword, default and non-tensor arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, scale: float = 2.0, mode: str = "relu") -> Tensor:
        y = F.relu(self.a(x)) if mode == "relu" else torch.tanh(self.a(x))
        y = self.b(y) * scale
        return y if mask is None else y * mask


def test_keyword_arguments() -> None:
    """Keywords and defaults are called as the model's own, and are named in the signature."""
    x, mask = torch.randn(3, 4).double(), torch.randn(3, 1).double()
    model = randomise(Options(), (x,))
    slim = chase_fx.prune(model, x, {"mask": mask, "scale": 3.0}).eval()
    assert_exact(model, slim, (x,), {"mask": mask, "scale": 3.0})
    traced = chase_fx.trace(model, x)
    assert torch.equal(traced(x), model(x))
    assert torch.equal(traced(x=x), model(x))
    assert torch.equal(traced(x, scale=2.0, mode="relu"), model(x))


@pytest.mark.parametrize(
    ("options", "name"), [({"mode": "tanh"}, "mode"), ({"scale": 4.0}, "scale"), ({"mask": torch.ones(3, 1)}, "mask")]
)
def test_other_arguments_are_refused(options: dict[str, Any], name: str) -> None:
    """A non-tensor argument, or a None, that differs from the captured one is refused by name."""
    x = torch.randn(3, 4).double()
    model = Options().double()
    for module in (chase_fx.trace(model, x), chase_fx.prune(model, x)):
        with pytest.raises(ArgumentError, match=f"(?s)'{name}' was .* when the graph was captured.*trace again"):
            module(x, **options)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: [x]])
def test_example_inputs(model: nn.Module, wrap: Any) -> None:
    """Example inputs are a tensor, a tuple or a list."""
    assert torch.equal(chase_fx.trace(model, wrap(images()))(images()), model(images()))


# -- the emitted module -----------------------------------------------------------------------------------------------


class Regular(nn.Module):
    """Dropout by module and by function, a batch norm, and a branch that only training takes."""

    def __init__(self, *, auxiliary: bool) -> None:
        super().__init__()
        self.auxiliary = auxiliary
        self.a, self.bn, self.drop, self.b = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2)
        self.aux = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        hidden = F.dropout(self.drop(F.relu(self.bn(self.a(x)))), 0.2, self.training)
        if self.auxiliary and self.training:
            return self.b(hidden), self.aux(hidden)
        return self.b(hidden)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_one_capture_serves_both_modes(auxiliary: bool) -> None:
    """Under one seed, a capture switched between the modes does what the model does, statistics included."""
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = randomise(Regular(auxiliary=auxiliary), None)
    traced = chase_fx.trace(model, x)
    assert (traced.train_graph is not None) == auxiliary
    for training in (True, False, True):
        outs = []
        for module in (model, traced):
            torch.manual_seed(1)
            outs.append(module.train(training)(x))
        assert type(outs[0]) is type(outs[1])
        assert difference(*outs) == 0
    assert all(torch.equal(traced.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert traced.state_dict()["bn.num_batches_tracked"] == 2
    slim = chase_fx.prune(model, x)
    outs = slim.train()(x), slim.eval()(x)
    assert isinstance(outs[0], tuple) == auxiliary
    assert slim.get_parameter("aux.weight").shape[1] == (4 if auxiliary else 8)


def test_modes_survive(model: nn.Module) -> None:
    """A model that is partly in train mode gives a capture and a slim module in the same modes."""
    model.train()
    model.block.bn1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    for module in (chase_fx.trace(model, images()), chase_fx.prune(model, images())):
        assert {name: m.training for name, m in module.named_modules() if name in modes} == modes


def test_meta_capture_of_a_single_value_per_channel() -> None:
    """On the meta device too, a batch norm that sees one value per channel can be captured."""
    model = nn.Sequential(nn.Linear(4, 8), Regular(auxiliary=True).bn, nn.Dropout(), nn.Linear(8, 2))

    class ReadsTraining(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.body(x), 0.2, self.training)

    plans = []
    for device in ("cpu", "meta"):
        traced = chase_fx.trace(ReadsTraining().to(device), torch.ones(1, 4, device=device))
        plans.append(str(chase_fx.analyze(traced)))
    assert plans[0] == plans[1]


def test_hooks_run(traced: Any) -> None:
    """Forward hooks on leaf modules run in the capture and in the slim module, and see the slim widths."""
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    for module, width in ((traced, 8), (slim, 4)):
        seen = []
        handle = module.get_submodule("stem").register_forward_hook(
            lambda m, args, out, seen=seen: seen.append(out.shape)
        )
        module(images(2))
        handle.remove()
        assert seen == [(2, width, 6, 6)]


def test_module_tree(model: nn.Module, traced: Any) -> None:
    """Module types and state_dict keys are the model's, and size attributes tell the slim widths."""
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    for module in (traced, slim):
        assert list(module.state_dict()) == list(model.state_dict())
        for name, child in model.named_modules():
            if name and not list(child.children()):
                assert type(module.get_submodule(name)) is type(child)
    assert (slim.get_submodule("block.conv1").in_channels, slim.get_submodule("block.conv1").out_channels) == (4, 3)
    assert slim.get_submodule("block.bn1").num_features == 3
    assert slim.get_submodule("fc").in_features == 4
    assert slim.get_submodule("fc").out_features == 4


def test_tied_and_unused_parameters_keep_their_keys() -> None:
    """A tied weight stays one parameter under both names; an unused one keeps its key and shape."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.c.weight
            self.unused = nn.Linear(8, 8)
            self.d = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.d(self.c(F.relu(self.b(F.relu(self.a(x))))))

    x = torch.randn(3, 4, dtype=torch.float64)
    model = randomise(Tied(), (x,))
    slim = chase_fx.prune(model, x).eval()
    assert list(slim.state_dict()) == list(model.state_dict())
    assert slim.get_parameter("b.weight") is slim.get_parameter("c.weight")
    assert slim.get_parameter("c.weight").shape == (4, 4)
    assert slim.get_parameter("unused.weight").shape == (8, 8)
    assert_exact(model, slim, (x,))


def test_dtype_and_device_moves(traced: Any) -> None:
    """A slim module moves to another precision and to the meta device like any module."""
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5)).eval()
    assert slim.float()(images().float()).dtype is torch.float32
    assert slim.to("meta")(images().float().to("meta")).shape == (3, 4)


def test_slim_shares_nothing_with_the_capture(traced: Any) -> None:
    """Writing to the slim module's tensors leaves the capture's alone, and its graph too."""
    before, code = traced(images()), traced.code
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0))
    with torch.no_grad():
        for tensor in slim.state_dict().values():
            tensor.zero_()
    assert torch.equal(traced(images()), before)
    assert traced.code == code


def test_slim_lets_go_of_the_dense_weights(model: nn.Module) -> None:
    """Once the capture is forgotten, a slim module does not keep its dense parameters in memory."""
    traced = chase_fx.trace(model, images())
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    dense = weakref.ref(traced.get_parameter("stem.weight"))
    del traced
    gc.collect()
    assert dense() is None
    assert slim(images()).shape == (3, 4)


def test_compile(traced: Any) -> None:
    """torch.compile(fullgraph=True) takes capture and slim module, also at another batch size."""
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5)).eval()
    for module in (traced, slim):
        torch.compiler.reset()
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        for batch in (3, 5):
            assert torch.equal(compiled(images(batch)), module(images(batch)))


def test_live_sizes() -> None:
    """Batch and image sizes that the forward computes with stay free, channel sizes become the slim ones."""

    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            n, c, h, w = self.a(x).shape
            y = self.a(x).reshape(n, c, h * w).permute(0, 2, 1)
            return self.b(y.reshape(n * h * w, c)).view(n, h, w, -1).mean((1, 2)) * (h / w)

    model = randomise(Sizes(), (images(),))
    slim = chase_fx.prune(model, images()).eval()
    assert_exact(model, slim, (images(),))
    assert_exact(model, slim, (images(5, 9),))
    assert_exact(model, slim, (torch.randn(2, 3, 4, 7, dtype=torch.float64),))


def test_read_data_is_reported() -> None:
    """A branch on tensor data is captured as the example inputs took it, and the capture warns, with the line."""

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(-y if x.sum() > 0 else y)

    x = torch.ones(3, 4)
    model = Branch()
    with pytest.warns(chase_fx.SpecializationWarning, match=r"__bool__ at .*test_contract.py:\d+"):
        traced = chase_fx.trace(model, x)
    assert torch.equal(traced(x), model(x))


# -- files


def test_save_and_load(model: nn.Module, tmp_path: Path) -> None:
    """A file restores weights, plan and outputs bit for bit, and holds no pickle."""
    slim = chase_fx.prune(model, images()).eval()
    path = tmp_path / "slim.safetensors"
    chase_fx.save(slim, path)
    loaded = chase_fx.load(path, Residual().double()).eval()
    assert loaded.plan == slim.plan
    assert torch.equal(loaded(images(5)), slim(images(5)))
    assert list(tmp_path.iterdir()) == [path]
    header = int.from_bytes(path.read_bytes()[:8], "little")
    metadata = json.loads(path.read_bytes()[8 : 8 + header])["__metadata__"]
    assert chase_fx.PruningPlan.from_json(metadata["plan"]) == slim.plan
    stored = json.loads(path.read_bytes()[8 : 8 + header])
    assert all(type(value) is str for value in stored.pop("__metadata__").values())
    assert sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in stored.values()) == (
        path.stat().st_size - 8 - header
    ), "the file holds more than its header and the tensors"


def test_load_gives_explicit_inputs_priority(model: nn.Module, tmp_path: Path) -> None:
    """Example inputs given to load are those that the model is captured with."""
    chase_fx.save(chase_fx.prune(model, images()), tmp_path / "slim.safetensors")
    loaded = chase_fx.load(tmp_path / "slim.safetensors", Residual().double(), images(2, 10))
    assert loaded.info.args[0].shape == (2, 3, 10, 10)


def test_load_keeps_the_precision_of_the_file(model: nn.Module, tmp_path: Path) -> None:
    """A double precision file on a single precision model gives a double precision module."""
    slim = chase_fx.prune(model, images()).eval()
    chase_fx.save(slim, tmp_path / "slim.safetensors")
    loaded = chase_fx.load(tmp_path / "slim.safetensors", Residual().double().float(), images().float()).eval()
    assert torch.equal(loaded(images()), slim(images()))


def test_save_replaces_a_file_whole(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that fails half way leaves the file that was there, and no other."""
    path = tmp_path / "slim.safetensors"
    slim = chase_fx.prune(model, images())
    chase_fx.save(slim, path)
    before = path.read_bytes()

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("chase_fx.io.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        chase_fx.save(slim, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
