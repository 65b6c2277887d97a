"""Each mistake of a caller is one clear ChaseError that says what, where, expected against found, and what to do."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import chase_fx
from chase_fx.checksum import checksum
from chase_fx.errors import (
    ArgumentError,
    CaptureError,
    ChaseError,
    CheckpointError,
    DeviceMismatchError,
    NothingToPruneError,
    PlanMismatchError,
    UnsupportedOpError,
    VerificationError,
)
from tests.nets import build


class Fft(nn.Module):
    """An operator without a channel rule between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.fake_quantize_per_tensor_affine(self.a(x), 0.1, 0, -128, 127))


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] == 3:
            raise LookupError("the model's own words")
        return self.a(x)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def prune(model: Any, *args: Any, **options: Any) -> Any:
    return chase_fx.prune(model, args, **options)


X = torch.ones(1, 4)
IMAGE = torch.ones(2, 3, 4, 4)


def test_every_error_is_a_chase_error() -> None:
    """Each error class derives from ChaseError, so that one except clause is enough."""
    from chase_fx import errors

    for name in errors.__all__:
        assert issubclass(getattr(errors, name), ChaseError)


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(nn.Flatten(), nn.ReLU()), nn.BatchNorm1d(4, affine=False)])
def test_no_parameters(model: nn.Module) -> None:
    """A model without parameters has nothing to prune, and the error names its class."""
    with pytest.raises(NothingToPruneError, match=f"{type(model).__name__} has no parameters"):
        prune(model, X)


def test_everything_frozen() -> None:
    """A model all of whose channels are frozen has nothing to prune, and the error says why."""
    with pytest.raises(NothingToPruneError, match=r"every channel is frozen.*output 'output' keeps its shape"):
        prune(nn.Linear(4, 2), X)


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.0, 1.5, float("nan"), float("inf"), "0.5", None, True])
def test_channel_sparsity_out_of_range(sparsity: Any) -> None:
    """A channel_sparsity that is no number in [0, 1) is refused with its value."""
    with pytest.raises(ArgumentError, match=r"channel_sparsity must be .*\[0, 1\)") as caught:
        prune(net(), X, channel_sparsity=sparsity)
    assert str(sparsity) in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("round_to", [0, -4, 1.5, "8"])
def test_round_to_out_of_range(round_to: Any) -> None:
    """A round_to that is no positive integer is refused."""
    with pytest.raises(ArgumentError, match="round_to must be a positive integer"):
        prune(net(), X, round_to=round_to)


def test_unknown_score() -> None:
    """A score that does not exist is refused, with those that do."""
    with pytest.raises(ArgumentError, match=r"unknown score 'size'.*'magnitude'.*'random'"):
        prune(net(), X, score="size")


def test_score_of_wrong_shape() -> None:
    """A score function must give one number per unit."""
    with pytest.raises(ArgumentError, match=r"'0.weight:0' must have shape \(8,\), found \(3,\)"):
        prune(net(), X, score=lambda group: torch.zeros(3))


def test_score_of_nan() -> None:
    """A score that is NaN can't be ranked."""
    with pytest.raises(ArgumentError, match="NaN"):
        prune(net(), X, score=lambda group: torch.full((group.size,), float("nan")))


@pytest.mark.parametrize("outputs", ["logits", 3, [0, "b"], lambda path: False])
def test_unknown_output(outputs: Any) -> None:
    """An output that the model does not have is refused, with those that it has."""
    with pytest.raises(ArgumentError, match="output"):
        prune(net(), X, outputs=outputs)


def test_no_module() -> None:
    """Anything but an nn.Module is refused by name of its type."""
    with pytest.raises(ArgumentError, match=r"must be a torch.nn.Module, found function"):
        chase_fx.trace(test_no_module, X)


def test_unsupported_operator_freezes() -> None:
    """An operator without a rule freezes its channels, and is reported with the line that called it."""
    channels = chase_fx.analyze(chase_fx.trace(Fft(), IMAGE))
    (first, *_) = channels.unknown
    assert "fake_quantize" in first.op
    assert first.node
    assert "test_errors.py:" in first.source
    assert "no channel rule" in channels.frozen["a.weight", 0]
    assert "test_errors.py:" in channels.frozen["a.weight", 0]


def test_unsupported_operator_raises() -> None:
    """With on_unknown='raise' the same operator stops the analysis, with shape, line and remedy."""
    traced = chase_fx.trace(Fft(), IMAGE)
    for _ in range(2):  # also when an earlier analysis is known
        with pytest.raises(
            UnsupportedOpError, match=r"(?s)fake_quantize.*\(2, 8, 4, 4\).*test_errors.py:\d+.*DEFAULT_RULES.extend"
        ):
            chase_fx.analyze(traced, on_unknown="raise")
        chase_fx.analyze(traced)


def test_rule_by_value() -> None:
    """A rule given by the caller makes the operator known, and leaves the default table as it was."""
    from chase_fx.graphs.rules.pointwise import unary

    traced = chase_fx.trace(Fft(), IMAGE)
    before = dict(chase_fx.DEFAULT_RULES.table)
    rules = chase_fx.DEFAULT_RULES.extend({torch.ops.aten.fake_quantize_per_tensor_affine_cachemask: unary})
    assert not any("fake_quantize" in unknown.op for unknown in chase_fx.analyze(traced, rules=rules).unknown)
    assert dict(chase_fx.DEFAULT_RULES.table) == before


def test_on_unknown_out_of_range() -> None:
    """A mode for unknown operators that does not exist is refused."""
    with pytest.raises(ArgumentError, match="on_unknown must be 'freeze' or 'raise', found 'ignore'"):
        chase_fx.analyze(chase_fx.trace(net(), X), on_unknown="ignore")


def test_model_raises() -> None:
    """What the model itself raises on the inputs is the cause, and the line of its code is in the message."""
    with pytest.raises(
        CaptureError, match=r"Raises.forward raised LookupError.*x: \(1, 3\).*test_errors.py:\d+"
    ) as caught:
        prune(Raises(), torch.ones(1, 3))
    assert isinstance(caught.value.__cause__, LookupError)
    assert caught.value.__cause__.args == ("the model's own words",)


def test_inputs_of_wrong_shape() -> None:
    """Inputs of a shape that a layer refuses give the layer's exception as the cause, and the shapes given."""
    with pytest.raises(CaptureError, match=r"\(1, 5\)") as caught:
        prune(net(), torch.ones(1, 5))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("args", [(), (X, X)])
def test_wrong_number_of_inputs(args: tuple[Tensor, ...]) -> None:
    """Too few or too many inputs are refused with the signature of the forward."""
    with pytest.raises(CaptureError, match=r"don't fit Sequential.forward\(input") as caught:
        prune(net(), *args)
    assert isinstance(caught.value.__cause__, TypeError)


def test_unknown_keyword() -> None:
    """A keyword that the forward does not take is refused by name."""
    with pytest.raises(CaptureError, match="mask"):
        chase_fx.trace(net(), X, {"mask": X})


def test_model_state_after_a_failure() -> None:
    """A capture that fails leaves the model, its training flags and torch's hooks as they were."""
    model = Raises().train()
    before = copy.deepcopy(model.state_dict())
    call, getattribute = nn.Module.__call__, nn.Module.__getattr__
    with pytest.raises(CaptureError):
        prune(model, torch.ones(1, 3))
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert nn.Module.__call__ is call
    assert nn.Module.__getattr__ is getattribute


@pytest.mark.parametrize(("home", "given"), [("meta", "cpu"), ("cpu", "meta")])
def test_device_mismatch(home: str, given: str) -> None:
    """A model and inputs on different devices are refused with both devices."""
    with pytest.raises(DeviceMismatchError, match=f"Sequential is on {home} but its example inputs are on {given}"):
        prune(net().to(home), X.to(given))


def test_no_tensor_output() -> None:
    """A forward that returns no tensor can't be captured."""

    class Count(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> int:
            return len(self.a(x))

    with pytest.raises(CaptureError, match="returned no tensor, found int"):
        chase_fx.trace(Count(), X)


@pytest.mark.parametrize(
    "call", [chase_fx.analyze, lambda m: chase_fx.rewrite(m, None), lambda m: chase_fx.verify(m, m)]
)
def test_untraced_module(call: Any) -> None:
    """Passes refuse a module that was not traced, and name the call that is missing."""
    with pytest.raises(ArgumentError, match=r"chase_fx.trace\(model, args\) first"):
        call(net())


def test_rewrite_without_a_plan() -> None:
    """Something that is no plan is refused by its type."""
    with pytest.raises(ArgumentError, match="expected a PruningPlan, found dict"):
        chase_fx.rewrite(chase_fx.trace(net(), X), {})


def test_verify_without_a_rewrite() -> None:
    """A module that no rewrite made can't be verified."""
    traced = chase_fx.trace(net(), X)
    with pytest.raises(ArgumentError, match=r"must come from chase_fx.rewrite"):
        chase_fx.verify(traced, traced)


def test_plan_for_other_shapes() -> None:
    """A plan for a model of other widths is refused with the first tensor that differs."""
    plan = chase_fx.analyze(chase_fx.trace(net(), X)).plan(0.5)
    other = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(PlanMismatchError, match=r"'0.weight' is \(8, 4\) in the plan, \(6, 4\) in the module"):
        chase_fx.rewrite(chase_fx.trace(other, X), plan)


def test_plan_for_other_couplings() -> None:
    """A plan for the same tensors under other couplings is refused."""

    class Two(nn.Module):
        def __init__(self, *, residual: bool) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.residual = residual

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            return self.c(a + self.b(a) if self.residual else self.b(a))

    plan = chase_fx.analyze(chase_fx.trace(Two(residual=False), X)).plan(0.5)
    with pytest.raises(PlanMismatchError, match="coupled in another way"):
        chase_fx.rewrite(chase_fx.trace(Two(residual=True), X), plan)


def test_plan_of_half_a_group() -> None:
    """A plan that removes a channel of one tensor but not of those coupled with it is refused by tensor and dim."""
    traced = chase_fx.trace(net(), X)
    plan = chase_fx.analyze(traced).plan(0.5)
    (kept,) = plan.pruned["0.bias"]
    other = torch.tensor([i for i in range(8) if i not in kept.tolist()])
    broken = dataclasses.replace(plan, pruned={**plan.pruned, "0.bias": (other,)})
    with pytest.raises(PlanMismatchError, match=r"'0.bias' dim 0"):
        chase_fx.rewrite(traced, broken)


def test_a_slim_module_with_other_weights_fails_to_verify() -> None:
    """Verify finds a slim module whose weights were changed, and names the node."""
    model, args = build("residual")
    traced = chase_fx.trace(model, args)
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    with torch.no_grad():
        slim.get_parameter("b.weight").mul_(1.001)
    with pytest.raises(VerificationError, match="first node that differs is 'b'") as caught:
        chase_fx.verify(traced, slim)
    assert caught.value.node == "b"


def test_verify_on_meta() -> None:
    """A model without values can't be verified."""
    model = net().to("meta")
    traced = chase_fx.trace(model, X.to("meta"))
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan_keeping({"0.weight:0": torch.arange(8) < 4}))
    with pytest.raises(ArgumentError, match="meta"):
        chase_fx.verify(traced, slim)


def test_mask_of_wrong_shape_or_name() -> None:
    """plan_keeping refuses a group that does not exist, a mask of another length, and a mask that keeps nothing."""
    channels = chase_fx.analyze(chase_fx.trace(net(), X))
    for kept, message in (
        ({"1.weight:0": torch.ones(8)}, "no group '1.weight:0'"),
        ({"0.weight:0": torch.ones(7)}, r"has 8 units, found a mask of shape \(7,\)"),
        ({"0.weight:0": torch.zeros(8)}, "must keep at least one unit"),
    ):
        with pytest.raises(ArgumentError, match=message):
            channels.plan_keeping(kept)


def test_explain_of_an_unknown_axis() -> None:
    """explain refuses an axis that the model does not have, and shows what an axis looks like."""
    channels = chase_fx.analyze(chase_fx.trace(net(), X))
    with pytest.raises(ArgumentError, match=r"no axis .*'9.weight', 0.*axes are"):
        channels.explain("9.weight", "0.weight")


# -- files


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "slim.safetensors"
    chase_fx.save(chase_fx.prune(net(), X), path)
    return path


def test_save_of_a_dense_module(tmp_path: Path) -> None:
    """Only slim modules can be saved, and a refused save leaves no file."""
    with pytest.raises(ArgumentError, match="only slim modules"):
        chase_fx.save(chase_fx.trace(net(), X), tmp_path / "dense.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_truncated_file(saved: Path, size: int) -> None:
    """A file that was cut off anywhere is a CheckpointError with its path."""
    data = saved.read_bytes()
    saved.write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=str(saved)):
        chase_fx.load(saved, net())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"chase-fx-1", b"chase-fx-9"),
        (b"chase-fx-plan-1", b"chase-fx-plan-7"),
        (b'\\"pruned\\"', b'\\"prUned\\"'),
        (b'\\"shapes\\"', b'\\"shApes\\"'),
        (b'"plan":', b'"plAn":'),
        (b'"inputs":', b'"inpUts":'),
        (b'"aliases":', b'"aliAses":'),
        (b'"0.weight":{"dtype"', b'"9.weight":{"dtype"'),
        (b'\\"t\\": \\"stored\\"', b'\\"t\\": \\"nothng\\"'),
        (b'\\"name\\"', b'\\"nAme\\"'),
    ],
)
def test_tampered_file(saved: Path, old: bytes, new: bytes) -> None:
    """A header that was changed in any part that we read is a CheckpointError, also with a new checksum."""
    data = saved.read_bytes()
    assert data.count(old) >= 1
    saved.write_bytes(data.replace(old, new, 1))
    with pytest.raises(CheckpointError, match=r"changed after it was written|expected format"):
        chase_fx.load(saved, net())
    with safe_open(str(saved), framework="pt") as f:
        metadata, tensors = f.metadata(), {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118  (no mapping)
    del metadata["sha256"]
    metadata["sha256"] = checksum(json.dumps(metadata, sort_keys=True), tensors)
    save_file(tensors, str(saved), metadata)
    with pytest.raises(CheckpointError, match=r"^(?!.*changed after it was written)"):
        chase_fx.load(saved, net())


def test_flipped_bit_of_a_weight(saved: Path) -> None:
    """Weights that were damaged are noticed."""
    data = bytearray(saved.read_bytes())
    data[-5] ^= 1
    saved.write_bytes(data)
    with pytest.raises(CheckpointError, match="changed after it was written"):
        chase_fx.load(saved, net())


def test_missing_file(tmp_path: Path) -> None:
    """A file that does not exist is Python's own FileNotFoundError."""
    with pytest.raises(FileNotFoundError):
        chase_fx.load(tmp_path / "none.safetensors", net())


def test_load_on_another_model(saved: Path) -> None:
    """A file for a model of other widths is refused."""
    other = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(PlanMismatchError, match="another model"):
        chase_fx.load(saved, other)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"format":"chase-fx-plan-1"}',
        '{"format":"chase-fx-plan-1","digest":"d","outputs":[],"shapes":{"a":[4]},"pruned":{"a":[[]]}}',
        '{"format":"chase-fx-plan-1","digest":"d","outputs":[],"shapes":{"a":[4]},"pruned":{"a":[[1,0]]}}',
        '{"format":"chase-fx-plan-1","digest":"d","outputs":[],"shapes":{"a":[4]},"pruned":{"a":[[4]]}}',
        '{"format":"chase-fx-plan-1","digest":"d","outputs":[],"shapes":{"a":[4]},"pruned":{"a":[[0],[1]]}}',
        '{"format":"chase-fx-plan-1","digest":"d","outputs":[],"shapes":{"a":[4]},"pruned":{"b":[[0]]}}',
        '{"format":"chase-fx-plan-1","digest":"d","outputs":[],"shapes":{"a":4},"pruned":{}}',
        '{"format":"chase-fx-plan-1","digest":"d","outputs":[],"shapes":{"a":[4]},"pruned":{"a":["01"]}}',
        '{"format":"chase-fx-plan-1","digest":"d","outputs":[],"shapes":{"a":[4]},"pruned":{"a":[[0.5]]}}',
        '{"format":"chase-fx-plan-1","digest":"d","outputs":[],"shapes":{"a":[4]},"pruned":{"a":[[true]]}}',
    ],
)
def test_damaged_plan(text: str) -> None:
    """A plan that to_json did not write is a CheckpointError."""
    with pytest.raises(CheckpointError):
        chase_fx.PruningPlan.from_json(text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bias_hides_no_difference(dtype: torch.dtype) -> None:
    """A slim module with a wrong inner weight is refused, also where the last bias is all that its output shows."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype)
    with torch.no_grad():
        net[2].bias.fill_(1e12)
    traced = chase_fx.trace(net, torch.randn(3, 4, dtype=dtype))
    slim = chase_fx.rewrite(traced, chase_fx.analyze(traced).plan(0.5))
    chase_fx.verify(traced, slim)
    with torch.no_grad():
        slim.get_parameter("0.weight").mul_(2)
    with pytest.raises(VerificationError) as caught:
        chase_fx.verify(traced, slim)
    assert caught.value.node == "_0"


def test_cancelled_values_are_no_difference() -> None:
    """Values that cancel to nothing but rounding, here the mean of what an instance norm centred, are not compared."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1),
        nn.Conv2d(8, 12, 1),
        nn.InstanceNorm2d(12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 2),
    ).double()
    slim = chase_fx.prune(net, torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert slim.get_submodule("5").in_features == 6
