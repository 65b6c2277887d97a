"""The pieces of `make bench-accuracy` that its numbers rest on."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import chase_fx
from benchmarks.accuracy import contestants
from benchmarks.accuracy.page import write_page
from benchmarks.accuracy.records import Folder
from benchmarks.accuracy.runs import RIVALS, all_runs
from chase_fx.data import load_digits
from chase_fx.demo.measure import count_flops


@pytest.fixture(scope="module")
def digits():
    return load_digits(validation=100)


@pytest.fixture
def contest(digits):
    return contestants.Contest(digits.train, steps=2, seed=0)


@pytest.fixture
def like(contest):
    model = contest.network()
    channels = chase_fx.analyze(model)
    return chase_fx.rewrite(model, channels.plan(0.7))


def flops_of(module):
    return count_flops(module.eval(), contestants.EXAMPLE[:1])


def test_every_run_has_a_name_of_its_own_and_comes_after_the_one_whose_cost_it_needs():
    names = [run.name for run in all_runs()]
    assert len(set(names)) == len(names)
    for place, run in enumerate(all_runs()):
        assert run.cost_of is None or run.cost_of in names[:place]


@pytest.mark.parametrize("rival", RIVALS.values(), ids=list(RIVALS))
def test_a_rival_is_never_cheaper_than_it_must_be_nor_much_dearer(contest, rival, like):
    wanted = flops_of(like)
    slim = rival(contest, like)
    assert wanted <= flops_of(slim)
    # Nor by more than a unit: any one costs less than this share.
    assert flops_of(slim) < 1.1 * wanted


def test_the_same_widths_start_from_other_weights(contest, like):
    shapes = [parameter.shape for parameter in like.parameters()]
    before = like.get_parameter("fc.weight").clone()
    slim = contestants.same_widths(dataclasses.replace(contest, max_lr=1e-12), like)
    assert [parameter.shape for parameter in slim.parameters()] == shapes
    assert not torch.isclose(slim.get_parameter("fc.weight"), before).any()


def test_the_static_choice_keeps_the_initial_weights_of_the_dense_network(contest, like):
    untrained = dataclasses.replace(contest, steps=0)
    dense = untrained.network()
    chosen = contestants._narrow(untrained.network(), like, contestants._at_random(untrained))
    kept = chosen.plan.kept_indices()["fc.weight"][1]
    torch.testing.assert_close(chosen.get_parameter("fc.weight"), dense.get_parameter("fc.weight")[:, kept])


def test_a_run_that_has_a_record_is_not_trained_again(tmp_path, digits):
    [run] = [run for run in all_runs() if run.name == "refill-85-s0"]
    folder = Folder(tmp_path, epochs=0.2)
    assert folder.record(run) is None
    record = folder.train(run, digits)
    assert folder.record(run) == record
    assert flops_of(folder.module(run)) == record["flops"]
    assert Folder(tmp_path, epochs=0.3).record(run) is None
    assert folder.record(dataclasses.replace(run, options={**run.options, "beta": 0.5})) is None


def test_the_page_names_what_is_missing_and_judges_what_is_there(tmp_path, digits, monkeypatch):
    monkeypatch.setattr("benchmarks.accuracy.page.why_no_compiler", lambda: "not here")
    folder = Folder(tmp_path / "records", epochs=0.1)
    for run in all_runs():
        if run.name in ("dense-s0", "refill-85-s0", "uniform-85-s0", "SET-70-s0", "variant0-70-s0"):
            folder.train(run, digits)
    write_page(folder, digits, tmp_path)
    text = (tmp_path / "accuracy.md").read_text()
    assert f"{len(all_runs()) - 5} runs are missing" in text
    assert "| 85% | Chase + refill | 1 |" in text
    assert "| SET |" in text
    assert (tmp_path / "accuracy.svg").exists()
    records = {record["name"]: record for record in json.loads((tmp_path / "accuracy.json").read_text())}
    assert [name for name, record in records.items() if "test" not in record] == ["variant0-70-s0"]
