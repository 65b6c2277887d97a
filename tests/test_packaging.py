"""The wheel, the sdist and the import rules: what a user's site-packages and type checker get to see."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from chase_fx.version import __version__

ROOT = Path(__file__).resolve().parent.parent
checkout_only = pytest.mark.skipif(not (ROOT / "graphs").is_dir(), reason="an sdist has no folders to link to")


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def build(target: str, source: Path, out: Path) -> Path:
    """Build with the backend that pyproject.toml names, without a network."""
    done = run(sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(out), cwd=source)
    assert done.returncode == 0, done.stderr
    (archive,) = out.iterdir()
    return archive


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@checkout_only
def test_the_links_are_relative_so_that_a_clone_anywhere_works():
    for name in ("graphs", "passes"):
        assert (ROOT / "chase_fx" / name).readlink() == Path("..") / name


def test_the_wheel_installs_one_top_level_name(wheel):
    tops = {name.split("/")[0] for name in files_of(wheel)}
    assert tops == {"chase_fx", f"chase_fx-{__version__}.dist-info"}


def test_the_wheel_holds_every_module_and_the_type_marker(wheel):
    modules = {
        path.relative_to(ROOT).as_posix()
        for folder in ("chase_fx", "chase_fx/graphs", "chase_fx/passes")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {"chase_fx/graphs/__init__.py", "chase_fx/passes/__init__.py"} < modules
    assert modules | {"chase_fx/py.typed"} == {name for name in files_of(wheel) if name.startswith("chase_fx/")}


def test_the_wheel_carries_license_and_console_script(wheel):
    info = f"chase_fx-{__version__}.dist-info"
    assert f"{info}/licenses/LICENSE" in files_of(wheel)
    with zipfile.ZipFile(wheel) as archive:
        assert "chase-fx = chase_fx.cli:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import chase_fx, chase_fx.graphs, chase_fx.passes\n"
        "print(chase_fx.__file__, chase_fx.graphs.__file__, chase_fx.passes.__file__)"
    )
    done = run(sys.executable, "-I", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(path.startswith(str(tmp_path)) for path in done.stdout.split())


def test_the_sdist_builds_the_same_wheel(wheel, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert files_of(build("wheel", source, tmp_path / "wheel")) == files_of(wheel)


def test_the_sdist_has_what_a_packager_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "tests/test_packaging.py"} <= names


@checkout_only
@pytest.mark.parametrize("name", ["graphs", "passes"])
def test_a_package_refuses_to_be_imported_under_its_bare_name(name):
    done = run(sys.executable, "-c", f"import {name}", cwd=ROOT)
    assert done.returncode == 1
    assert f"import this package as 'chase_fx.{name}'" in done.stderr


def test_the_packages_import_from_the_checkout_under_their_full_names():
    done = run(sys.executable, "-c", "import chase_fx.graphs, chase_fx.passes", cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_installed_metadata_is_of_this_version():
    assert importlib.metadata.version("chase-fx") == __version__


def test_the_import_rules_hold():
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = run(sys.executable, "-c", code, "--no-cache", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_command_line_starts_from_its_console_script():
    done = run(str(Path(sys.executable).with_name("chase-fx")), "--version", cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, f"chase-fx {__version__}\n"), done.stderr
