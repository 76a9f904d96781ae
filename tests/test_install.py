"""The package as a user gets it: a wheel, installed away from the checkout."""

import ast
import importlib.metadata
import inspect
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import rljax
import rljax.algorithms
import rljax.types

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


def test_the_front_door_offers_every_algorithm_and_type():
    for home in (rljax.types, rljax.algorithms):
        members = vars(home).items()
        own = {name: x for name, x in members if inspect.isfunction(x) or inspect.isclass(x)}
        own = {name: x for name, x in own.items() if x.__module__.startswith("rljax.")}
        assert len(own) > 10
        assert {name: getattr(rljax, name) for name in own} == own
        assert own.keys() <= set(dir(rljax))


def test_type_checkers_are_shown_what_is_found_at_run_time():
    tree = ast.parse(Path(rljax.__file__).read_text())
    (shown,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    packages = [node.module for node in shown.body if node.names[0].name == "*"]
    functions = {name.asname: node.module for node in shown.body for name in node.names if name.name != "*"}
    assert set(packages) == set(rljax._PACKAGES)
    assert functions == rljax._FUNCTIONS
    for name, module in functions.items():
        assert getattr(rljax, name).__module__ == module
    lines = (ROOT / "rljax" / "algorithms" / "__init__.py").read_text().splitlines()
    imports = [line.split() for line in lines if line.startswith("from ")]
    assert all(words[3:] == [words[3], "as", words[3]] for words in imports), "`X as X` makes a name public"


def test_a_new_algorithm_is_written_down_once_besides_its_file(tmp_path):
    shutil.copytree(ROOT / "rljax", tmp_path / "rljax", ignore=shutil.ignore_patterns("__pycache__"))
    algorithms = tmp_path / "rljax" / "algorithms"
    algorithms.joinpath("my_paper.py").write_text("def my_paper():\n    return 'mine'\n")
    with algorithms.joinpath("__init__.py").open("a") as file:
        file.write("from rljax.algorithms.my_paper import my_paper as my_paper\n")
    program = "import rljax; print(rljax.my_paper(), 'my_paper' in dir(rljax))"
    assert run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(tmp_path)).split() == ["mine", "True"]


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
@pytest.mark.timeout(1800)
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
