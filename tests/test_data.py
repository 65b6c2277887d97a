"""Fashion-MNIST files: the format, where they come from, and the tensors made of them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from chase_fx.data import DataError, DataUnavailableError, load_digits, load_fashion_mnist, load_images, sources
from chase_fx.data.idx import read_idx
from chase_fx.errors import ArgumentError


def write_idx(path: Path, array: np.ndarray, magic: bytes | None = None) -> Path:
    magic = magic or bytes([0, 0, 8, array.ndim])
    header = magic + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype("uint8").tobytes()))
    return path


def write_fashion(folder: Path, train: int = 40, test: int = 10) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        write_idx(folder / sources.FILES[f"{split} images"], rng.integers(0, 256, (count, 28, 28)))
        write_idx(folder / sources.FILES[f"{split} labels"], np.arange(count) % 10)
    return folder


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A machine without Fashion-MNIST: an empty cache, no Debian package, no variable."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(sources.DATA_VARIABLE, raising=False)
    monkeypatch.setattr(sources, "DEBIAN_FOLDER", Path("no/such/folder"))
    return tmp_path


def test_idx_gives_back_what_was_written(tmp_path):
    array = np.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(read_idx(write_idx(tmp_path / "a.gz", array), dims=3), array)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[: len(raw) // 2], "not a whole gzip file"),
        (lambda raw: b"hello", "not a whole gzip file"),
        (lambda raw: gzip.compress(gzip.decompress(raw)[:-1]), r"sizes \(4, 5\) take 20 bytes, found 19"),
        (lambda raw: gzip.compress(gzip.decompress(raw) + b"x"), "take 20 bytes, found 21"),
        (lambda raw: gzip.compress(gzip.decompress(raw)[:6]), "truncated: an IDX header of 2 dims has 12 bytes"),
        (lambda raw: gzip.compress(b"\0\0\x0d\x02" + gzip.decompress(raw)[4:]), "0x00000d02, expected 0x00000802"),
    ],
)
def test_a_damaged_file_is_refused_with_what_was_expected_and_found(tmp_path, damage, message):
    path = write_idx(tmp_path / "a.gz", np.zeros((4, 5)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        read_idx(path, dims=2)


def test_labels_in_place_of_images_are_refused(tmp_path):
    with pytest.raises(DataError, match="0x00000801, expected 0x00000803"):
        read_idx(write_idx(tmp_path / "a.gz", np.zeros(30)), dims=3)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"a\.gz does not exist"):
        read_idx(tmp_path / "a.gz", dims=1)


def test_images_are_normalised_by_the_training_split(tmp_path):
    data = load_fashion_mnist(write_fashion(tmp_path))
    assert data.train.images.shape == (40, 1, 28, 28)
    assert data.test.images.shape == (10, 1, 28, 28)
    assert data.train.images.dtype == torch.float32
    assert data.train.labels.dtype == torch.int64
    torch.testing.assert_close(data.train.images.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(data.train.images.std(), torch.tensor(1.0), atol=1e-6, rtol=0)
    assert len(data.validation) == 0


def test_the_validation_images_are_held_out_of_the_training_images_and_always_the_same(tmp_path):
    whole = load_fashion_mnist(write_fashion(tmp_path))
    first, second = (load_fashion_mnist(tmp_path, validation=15) for _ in range(2))
    assert (len(first.train), len(first.validation)) == (25, 15)
    assert torch.equal(first.validation.images, second.validation.images)
    together = torch.cat([first.train.images, first.validation.images]).sum((1, 2, 3)).sort().values
    torch.testing.assert_close(together, whole.train.images.sum((1, 2, 3)).sort().values)


@pytest.mark.parametrize("validation", [-1, 40])
def test_a_validation_split_that_leaves_nothing_is_refused(tmp_path, validation):
    with pytest.raises(ArgumentError, match="expected 0 to 39"):
        load_fashion_mnist(write_fashion(tmp_path), validation=validation)


def test_images_and_labels_must_have_the_same_count(tmp_path):
    write_fashion(tmp_path)
    write_idx(tmp_path / sources.FILES["train labels"], np.zeros(39))
    with pytest.raises(DataError, match="for the 39 labels"):
        load_fashion_mnist(tmp_path)


def test_labels_out_of_range_are_refused(tmp_path):
    write_fashion(tmp_path)
    write_idx(tmp_path / sources.FILES["train labels"], np.full(40, 10))
    with pytest.raises(DataError, match=r"labels in \[0, 10\)"):
        load_fashion_mnist(tmp_path)


def test_a_named_directory_comes_first_and_must_be_complete(nowhere, monkeypatch):
    named = write_fashion(nowhere / "named")
    assert sources.find_files(named)[0] == named
    monkeypatch.setenv(sources.DATA_VARIABLE, str(named))
    assert sources.find_files()[0] == named
    (named / sources.FILES["test labels"]).unlink()
    with pytest.raises(DataError, match="lacks t10k-labels"):
        load_images(named)
    with pytest.raises(DataError, match="lacks t10k-labels"):
        load_images()


def test_the_cache_comes_before_the_installed_package(nowhere, monkeypatch):
    installed = write_fashion(nowhere / "installed")
    monkeypatch.setattr(sources, "DEBIAN_FOLDER", installed)
    assert sources.find_files(fetch=False) == (installed, f"Debian's package {sources.DEBIAN_PACKAGE}")
    cached = write_fashion(sources.cache_dir())
    assert sources.find_files(fetch=False) == (cached, f"the cache {cached}")


def test_a_relative_cache_variable_is_ignored_as_its_specification_says(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert sources.cache_dir() == Path.home() / ".cache/chase-fx/fashion-mnist"


def test_what_is_fetched_ends_in_the_cache_and_is_found_there(nowhere, monkeypatch):
    def refuse(scratch):
        raise DataError("no apt-get on this machine")

    monkeypatch.setattr(sources, "_from_debian", refuse)
    monkeypatch.setattr(sources, "_from_torchvision", lambda scratch: write_fashion(scratch / "raw"))
    assert load_images().source == "torchvision's downloader"
    assert load_images(fetch=False).source == f"the cache {sources.cache_dir()}"
    assert [path.name for path in sources.cache_dir().parent.iterdir()] == ["fashion-mnist"], "scratch is left behind"


def test_the_digits_stand_in_when_no_source_has_the_files_and_say_why(nowhere, monkeypatch):
    def refuse(scratch):
        raise DataError("no route")

    monkeypatch.setattr(sources, "_from_debian", refuse)
    monkeypatch.setattr(sources, "_from_torchvision", refuse)
    with pytest.raises(DataUnavailableError, match=r"no route.*torchvision's downloader: no route"):
        sources.find_files()
    data = load_images()
    assert data.name == "digits"
    assert "in place of Fashion-MNIST" in data.source
    assert "no route" in data.source


def test_apt_falls_back_to_package_lists_of_its_own(nowhere, monkeypatch):
    commands = []

    def fake_run(command, folder):
        commands.append(command)
        if command[0] == "dpkg-deb":
            write_fashion(folder / "unpacked" / sources.DEBIAN_FOLDER)
        elif "update" not in command:
            if len(command) == 3:
                raise DataError("no package lists")
            (folder / f"{sources.DEBIAN_PACKAGE}_1_all.deb").touch()

    monkeypatch.setattr(sources, "_run", fake_run)
    monkeypatch.setattr(sources.shutil, "which", lambda tool: tool)
    assert sources.find_files()[1] == f"Debian's package {sources.DEBIAN_PACKAGE}, unpacked without root"
    assert [command[0] for command in commands] == ["apt-get", "apt-get", "apt-get", "dpkg-deb"]
    assert commands[1][-1] == "update"


def test_a_command_that_fails_is_quoted(tmp_path):
    with pytest.raises(DataError, match=r"ls --no-such-option failed"):
        sources._run(["ls", "--no-such-option"], tmp_path)
    with pytest.raises(DataError, match="no-such-command"):
        sources._run(["no-such-command"], tmp_path)


def test_the_digits_are_28_by_28_and_their_splits_are_fixed_and_disjoint():
    first, second = load_digits(validation=100), load_digits(validation=100)
    assert first.train.images.shape == (1338, 1, 28, 28)
    assert (len(first.validation), len(first.test)) == (100, 359)
    assert torch.equal(first.test.images, second.test.images)
    assert first.train.labels.unique().tolist() == list(range(10))
