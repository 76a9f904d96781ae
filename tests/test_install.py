"""The package as a user gets it: a wheel, installed away from the checkout."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import rljax

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ("setup.py", "pyproject.toml", "LICENSE", "rljax")


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: a build/ left in the checkout would put deleted modules into the next wheel."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in SOURCE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", out)
    run(sys.executable, "-m", "pip", "wheel", *options, copy, cwd=out)
    (built,) = out.glob("rljax-*.whl")
    return built


def test_wheel_holds_every_file(wheel):
    files = {path.relative_to(ROOT) for path in ROOT.glob("rljax/**/*") if path.is_file()}
    files = {str(path) for path in files if "__pycache__" not in path.parts}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("rljax/")} == files
    assert {name for name in files if name.endswith("/__init__.py")} == {
        f"{Path(name).parent}/__init__.py" for name in files
    }


def test_installs_outside_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    options = ("--no-deps", "--no-index", "--target", target)
    run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=tmp_path)
    program = "import rljax, rljax.types; print(rljax.__file__, rljax.types.__file__, sep='\\n')"
    files = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(target)).split()
    assert files == [str(target / "rljax" / name) for name in ("__init__.py", "types.py")]


def test_import_rljax_imports_no_jax(tmp_path):
    """Worker processes of a reward pool start by the hundred."""
    program = "import sys, rljax; print({'jax', 'numpy', 'flax'} & set(sys.modules))"
    assert run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(ROOT)).strip() == "set()"


@pytest.mark.parametrize("name", rljax.__all__)
def test_front_door_opens(name):
    assert getattr(rljax, name) is not None
    assert name in dir(rljax)


def test_front_door_names_what_there_is():
    with pytest.raises(AttributeError, match=r"no attribute 'gpro'; it offers .*grpo"):
        _ = rljax.gpro


@pytest.mark.parity
def test_torch_is_the_pinned_one():
    """Tolerances were measured with it."""
    (pinned,) = [line for line in importlib.metadata.requires("rljax") if line.startswith("torch")]
    version = importlib.metadata.version("torch").split("+")[0]
    assert f"torch=={version};" in pinned.replace(" ", "")


@pytest.mark.nightly
def test_runtime_requirements_suffice(wheel, tmp_path):
    """A plain install, without extras, imports every module."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", wheel, cwd=tmp_path)
    program = (
        "import importlib, pkgutil, rljax\n"
        "for module in pkgutil.walk_packages(rljax.__path__, 'rljax.'): importlib.import_module(module.name)"
    )
    run(python, "-c", program, cwd=tmp_path)
