"""A killed run resumes to the bit-identical end, and a damaged checkpoint is refused while the one before it loads."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from chase_fx.errors import ArgumentError, CheckpointError
from chase_fx.sparse import Chase, RigL
from chase_fx.sparse.checkpoint_file import previous_of, read, write
from chase_fx.sparse.codec import Encoder, decode
from tests.sparse.hand_net import ResidualNet, channels_of, rewrite

HERE = Path(__file__).parent
OPTIONS = {"sparsity": 0.7, "channel_sparsity": 0.5, "update_interval": 3, "channel_interval": 4}


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    root = str(HERE.parents[1])
    return subprocess.Popen(
        [sys.executable, str(HERE / "killed.py"), str(folder), *arguments], cwd=root, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=300)
    return process.returncode


def ends_equal(a: Path, b: Path) -> None:
    one, two = (load_file(folder / "end.safetensors") for folder in (a, b))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mask", "shrink"])
def test_a_run_killed_again_and_again_ends_bit_identical(mode, tmp_path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    assert finish(start(straight, mode)) == 0
    # At every place of a save: the new file half written, before the old one is kept, between, and right after.
    for place, at in (("writing", 3), ("move 1", 6), ("move 2", 9), ("writing", 12)):
        assert finish(start(killed, mode, place, str(at))) == -signal.SIGKILL
    generator = random.Random(mode)
    process = start(killed, mode)
    assert process.stdout is not None
    for _ in range(generator.randint(1, 4)):
        process.stdout.readline()
    process.kill()  # wherever it is now
    finish(process)
    assert finish(start(killed, mode)) == 0
    ends_equal(straight, killed)
    assert (load_file(killed / "end.safetensors")["net.conv1.weight"].numel() < 12 * 8 * 9) == (mode == "shrink")


def test_restoring_continues_bit_identical_with_every_optimizer(run, tmp_path) -> None:
    for name in ("sgd", "adam", "rmsprop", "adagrad", "nadam", "adafactor"):
        straight = run(Chase, name, **OPTIONS, live_shrink=True).step(17)
        straight.trainer.save(tmp_path / "run.ckpt")
        straight.step(23)
        resumed = run(Chase, name, seed=9, **OPTIONS, live_shrink=True)
        resumed.trainer.restore(tmp_path / "run.ckpt")
        resumed.steps = 17
        resumed.step(23)
        for (key, a), b in zip(straight.net.state_dict().items(), resumed.net.state_dict().values(), strict=True):
            assert torch.equal(a, b), (name, key)
        for p, q in zip(straight.net.parameters(), resumed.net.parameters(), strict=True):
            one, two = straight.optimizer.state[p], resumed.optimizer.state[q]
            assert one.keys() == two.keys()
            assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(two[k])) for k in one), name
        assert straight.trainer.channel_history == resumed.trainer.channel_history


def test_the_class_builds_the_trainer_of_the_run(run, tmp_path) -> None:
    first = run(Chase, sparsity=0.7, channel_sparsity=0.5).step(20)
    first.trainer.save(tmp_path / "run.ckpt")
    net = ResidualNet().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.1)
    trainer = Chase.restore(tmp_path / "run.ckpt", net, optimizer, channels=channels_of(net), rewrite=rewrite)
    assert (type(trainer), trainer.steps_done, trainer.nnz) == (Chase, 20, first.trainer.nnz)
    assert all(torch.equal(mask, first.trainer.masks[name]) for name, mask in trainer.masks.items())
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert torch.equal(net.fc.weight, first.net.fc.weight)
    assert torch.equal(optimizer.state[net.fc.weight]["momentum_buffer"],
                       first.optimizer.state[first.net.fc.weight]["momentum_buffer"])  # fmt: skip


def test_optimizer_state_goes_by_name_and_keeps_its_dtype(tmp_path) -> None:
    def build(order):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).bfloat16()
        named = dict(net.named_parameters())
        optimizer = torch.optim.SGD([named[name] for name in order], lr=0.1, momentum=0.9)
        return net, optimizer, RigL(net, optimizer, total_steps=9, sparsity=0.5)

    order = ["0.weight", "0.bias", "1.weight", "1.bias"]
    net, optimizer, trainer = build(order)
    for name, p in net.named_parameters():
        optimizer.state[p]["momentum_buffer"] = torch.full(p.shape, 1.0 + len(name) + p.numel() / 1024)  # float32
    trainer.save(tmp_path / "run.ckpt")
    other, theirs, new = build(order[::-1])
    new.restore(tmp_path / "run.ckpt")
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert theirs.state[q]["momentum_buffer"].dtype == torch.float32
        assert torch.equal(theirs.state[q]["momentum_buffer"], optimizer.state[p]["momentum_buffer"])


def test_global_generators_continue(run, tmp_path) -> None:
    done = run(Chase).step(2)
    done.trainer.save(tmp_path / "run.ckpt")
    expected = torch.rand(3), random.random()
    done.trainer.restore(tmp_path / "run.ckpt")
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]


def test_a_file_holds_no_pickle(run, tmp_path) -> None:
    run(Chase).step(2).trainer.save(tmp_path / "run.ckpt")
    content = (tmp_path / "run.ckpt").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["content"])["trainer"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.ckpt"]


@pytest.fixture
def two_saves(run, tmp_path):
    done = run(Chase, **OPTIONS).step(4)
    done.trainer.save(tmp_path / "run.ckpt")
    done.step(4).trainer.save(tmp_path / "run.ckpt")
    return tmp_path / "run.ckpt"


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "empty":
        content.clear()
    elif how == "truncated":
        del content[len(content) // 2 :]
    elif how == "one byte less":
        del content[-1]
    elif how == "tensor":
        content[-3] ^= 1
    elif how == "number":  # one digit of the state, the file otherwise well formed
        place = content.index(b'\\"step\\",8') + len(b'\\"step\\",')
        content[place : place + 1] = b"7"
    elif how == "checksum":
        place = content.index(b'"sha256":"') + len(b'"sha256":"')
        content[place] = ord("0") if content[place] != ord("0") else ord("1")
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["empty", "truncated", "one byte less", "tensor", "number", "checksum"])
def test_a_damaged_checkpoint_is_refused_and_the_previous_one_loads(run, two_saves, how) -> None:
    damage(two_saves, how)
    fresh = run(Chase, seed=3, **OPTIONS)
    before = {name: p.clone() for name, p in fresh.net.named_parameters()}
    with pytest.raises(CheckpointError, match=r"run\.ckpt.*(truncated|changed after).*previous=True"):
        fresh.trainer.restore(two_saves)
    assert fresh.trainer.steps_done == 0
    assert all(torch.equal(p, before[name]) for name, p in fresh.net.named_parameters())
    fresh.trainer.restore(two_saves, previous=True)
    assert fresh.trainer.steps_done == 4
    # A damaged file never becomes the previous one: a crash in the next save would leave nothing.
    fresh.steps = 4
    fresh.step().trainer.save(two_saves)
    again = run(Chase, **OPTIONS).trainer
    assert again.restore(two_saves).steps_done == 5
    assert again.restore(two_saves, previous=True).steps_done == 4


def test_no_change_of_a_file_goes_unnoticed(two_saves, tmp_path) -> None:
    content, generator = two_saves.read_bytes(), random.Random(0)
    (header,) = struct.unpack("<Q", content[:8])
    broken = tmp_path / "broken.ckpt"
    inside, data = range(8, 8 + header), range(8 + header, len(content))
    places = [*range(8), *generator.sample(inside, 100), *generator.sample(data, 50)]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << generator.randrange(7)
        broken.write_bytes(changed)
        with pytest.raises(CheckpointError):
            read(broken)
    for length in (0, 1, 8, 9, header, header + 8, len(content) - 1):
        broken.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read(broken)


def test_errors_say_what_is_wrong(run, two_saves, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        run(Chase).trainer.restore(tmp_path / "nowhere.ckpt")
    torch.save({}, tmp_path / "pickle.ckpt")
    with pytest.raises(CheckpointError, match="no complete safetensors"):
        run(Chase).trainer.restore(tmp_path / "pickle.ckpt")
    damage(two_saves, "truncated")
    damage(previous_of(two_saves), "truncated")
    with pytest.raises(CheckpointError, match="is damaged as well"):
        run(Chase).trainer.restore(two_saves)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda run: run(Chase, "adam", **OPTIONS), "SGD"),
        (lambda run: run(Chase, **{**OPTIONS, "update_interval": 2}), "schedule"),
        (lambda run: run(Chase, **{**OPTIONS, "round_to": 2}), "channel_rule"),
        (lambda run: run(RigL, **OPTIONS), "method"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused_before_anything_changes(run, two_saves, build, words) -> None:
    other = build(run)
    before = {name: value.clone() for name, value in other.net.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        other.trainer.restore(two_saves)
    assert other.trainer.steps_done == 0
    assert all(torch.equal(value, before[name]) for name, value in other.net.state_dict().items())


@pytest.mark.parametrize(
    ("net", "options", "optimizer", "words"),
    [
        (ResidualNet().double(), {}, torch.optim.SGD, "schedule"),  # built with other intervals
        (ResidualNet().double(), {"update_interval": 3, "channel_interval": 4}, torch.optim.Adam, "SGD"),
        (ResidualNet(), {"update_interval": 3, "channel_interval": 4}, torch.optim.SGD, "float32"),
    ],
)
def test_the_class_leaves_the_module_alone_where_the_run_does_not_fit(two_saves, net, options, optimizer, words):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        Chase.restore(two_saves, net, optimizer(net.parameters()), channels=channels_of(net), rewrite=rewrite,
                      channel_score="activation" if words == "schedule" else "umm", **options)  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(part._forward_hooks for part in net.modules())


def test_other_shapes_of_the_same_size_are_refused_before_anything_changes(tmp_path) -> None:
    def build(*widths: int) -> Chase:
        net = nn.Sequential(nn.Linear(widths[0], widths[1]), nn.Linear(widths[1], widths[0]))
        return Chase(net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=9, channel_sparsity=0.0)

    build(4, 6).save(tmp_path / "run.ckpt")
    other = build(6, 4)
    before = {name: value.clone() for name, value in other.module.state_dict().items()}
    masks = {name: mask.clone() for name, mask in other.masks.items()}
    with pytest.raises(CheckpointError, match=r"mask of '0.weight' has shape \(6, 4\)"):
        other.restore(tmp_path / "run.ckpt")
    assert all(torch.equal(value, before[name]) for name, value in other.module.state_dict().items())
    assert all(torch.equal(mask, masks[name]) for name, mask in other.masks.items())


def test_units_of_another_module_are_refused_before_anything_changes(run) -> None:
    state = run(Chase, **OPTIONS, live_shrink=True).step(20).trainer.state_dict()
    name, kept = next(iter(state["kept"].items()))
    for wrong, words in ((torch.cat([kept, kept]), "units in group"), (~kept, "mask of")):
        other = run(Chase, **OPTIONS, live_shrink=True)
        shapes = [p.shape for p in other.net.parameters()]
        with pytest.raises(CheckpointError, match=words):
            other.trainer.load_state_dict({**state, "kept": {**state["kept"], name: wrong}})
        assert [p.shape for p in other.net.parameters()] == shapes
        assert all(bool(mask.all()) for mask in other.trainer.kept.values())


def test_named_parts_must_be_the_same(run, tmp_path) -> None:
    done = run(Chase).step(2)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(done.optimizer, [3, 5])
    done.trainer.save(tmp_path / "run.ckpt", scheduler=scheduler)
    with pytest.raises(CheckpointError, match="scheduler"):
        done.trainer.restore(tmp_path / "run.ckpt")
    scheduler.milestones = Counter()
    done.trainer.restore(tmp_path / "run.ckpt", scheduler=scheduler)
    assert scheduler.milestones == Counter({3: 1, 5: 1})


def test_values_come_back_exactly() -> None:
    weight = torch.randn(3, 4)
    value = {
        "a": (1, 2.5, None, "x", [True, {"nested": weight}]),
        3: {"inf": float("inf"), "third": 1 / 3},
        "tied": weight,
        "view": weight[:, 1],
        "half": torch.ones(2, dtype=torch.bfloat16),
        "scalar": torch.tensor(7),
        "count": Counter({5: 2}),
    }
    encoder = Encoder()
    text = json.dumps(encoder.encode(value, "v"))
    back = decode(json.loads(text), encoder.tensors)
    assert len(encoder.tensors) == 4
    assert back["a"][:4] == value["a"][:4]
    assert isinstance(back["a"], tuple)
    assert torch.equal(back["a"][4][1]["nested"], weight)
    assert back[3] == value[3]
    assert torch.equal(back["view"], weight[:, 1])
    assert type(back["count"]) is Counter


def test_what_needs_pickle_is_refused_by_name() -> None:
    with pytest.raises(ArgumentError, match=r"others\.sampler\.rng is a Random"):
        Encoder().encode({"rng": random.Random()}, "others.sampler")


def test_tensors_that_share_memory_are_written(tmp_path) -> None:
    base = torch.arange(12.0)
    encoder = Encoder()
    content = encoder.encode([base[:6], base[3:9], base.view(3, 4).t()], "t")
    write(tmp_path / "f", content, encoder.tensors)
    back = decode(*read(tmp_path / "f"))
    assert [t.tolist() for t in back] == [base[:6].tolist(), base[3:9].tolist(), base.view(3, 4).t().tolist()]
