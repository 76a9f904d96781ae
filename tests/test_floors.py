"""The staircase: types < ops < rooms < experiments. Imports point down, and rooms do not know each other."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"algorithms", "models", "envs", "data", "rollouts", "rewards", "train"}
SCRIPTS = {path.stem for path in ROOT.glob("experiments/**/*.py")} - {"verifiers"}  # a package has that name too
ABOVE = {"experiments", "tests", *SCRIPTS}
OUTDATED = {"jax.experimental.pjit", "jax.experimental.shard_map", "jax.pmap"}


def under(name: str, *roots: str) -> bool:
    return any(f"{name}.".startswith(f"{root}.") for root in roots)


def imported(tree: ast.Module, package: str):
    """Absolute dotted names: `from a import b` is `a.b`, as b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) + 1 - node.level] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not node.orelse


def violations(path: str, source: str) -> list[str]:
    """What the file at `path` (relative to the checkout) does that its floor forbids."""
    tree = ast.parse(source)
    package = ".".join(Path(path).parent.parts)
    floor = Path(path).parts[1].removesuffix(".py")
    allowed = {"types": (), "ops": ("rljax.ops",), "__init__": ()}
    if floor in ROOMS:
        allowed[floor] = ("rljax.types", "rljax.ops", f"rljax.{floor}")
    if floor not in allowed:
        return [f"{path}: {floor} is neither types, ops nor a room"]

    if path == "rljax/__init__.py":  # the front door shows its names to type checkers, and imports nothing
        tree.body = [node for node in tree.body if not for_type_checkers(node)]
    names = list(imported(tree, package))
    bad = {name for name in names if under(name, "rljax") and not under(name, *allowed[floor])}
    bad |= {name for name in names if name.split(".")[0] in ABOVE or under(name, "torch", *OUTDATED)}
    if floor == "ops":
        known = {*sys.stdlib_module_names, "jax", "chex", "jaxtyping", "rljax"}
        bad |= {name for name in names if name.split(".")[0] not in known}
    if floor == "algorithms":
        bad |= {name for name in names if under(name, "flax", "optax", "transformers", "tokenizers")}
    if path != "rljax/train/checkpoint.py":
        bad |= {name for name in names if under(name, "orbax")}
    found = [f"{path} imports {name}" for name in sorted(bad)]

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in OUTDATED:
            found.append(f"{path}:{node.lineno} uses {ast.unparse(node)}")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and path != "rljax/train/log.py":
            found.append(f"{path}:{node.lineno} prints; rljax/train/log.py does that")
    return found


def test_imports_point_down():
    files = [(str(path.relative_to(ROOT)), path.read_text()) for path in sorted(ROOT.glob("rljax/**/*.py"))]
    assert files
    assert [line for path, source in files for line in violations(path, source)] == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rljax/config.py", ""),
        ("rljax/__init__.py", "from rljax.algorithms import grpo"),
        ("rljax/__init__.py", "if TYPE_CHECKING:\n    pass\nelse:\n    from rljax.algorithms import grpo"),
        ("rljax/types.py", "if TYPE_CHECKING:\n    from rljax.ops import kl"),
        ("rljax/types.py", "from rljax.ops import kl"),
        ("rljax/ops/kl.py", "import numpy as np"),
        ("rljax/ops/kl.py", "import optax"),
        ("rljax/ops/kl.py", "from rljax.types import Batch"),
        ("rljax/ops/kl.py", "from ..types import Batch"),
        ("rljax/ops/kl.py", "import rljax"),
        ("rljax/ops/deep/kl.py", "from ...types import Batch"),
        ("rljax/algorithms/ppo.py", "from flax import struct"),
        ("rljax/algorithms/ppo.py", "def f():\n    import optax"),
        ("rljax/algorithms/ppo.py", "from .. import models"),
        ("rljax/rollouts/tokens.py", "from rljax.models.decoder import forward"),
        ("rljax/rollouts/tokens.py", "from rljax import models"),
        ("rljax/rollouts/tokens.py", "from rljax import sample"),
        ("rljax/models/hf.py", "import torch.nn as nn"),
        ("rljax/models/hf.py", "import orbax.checkpoint as ocp"),
        ("rljax/train/log.py", "import orbax.checkpoint as ocp"),
        ("rljax/train/update.py", "import experiments.grpo"),
        ("rljax/train/update.py", "from jax.experimental.pjit import pjit"),
        ("rljax/train/update.py", "from jax.experimental import shard_map"),
        ("rljax/train/update.py", "import jax\nf = jax.pmap(g)"),
        ("rljax/train/update.py", "from jax import pmap"),
        ("rljax/train/update.py", "import jax.experimental\njax.experimental.pjit.pjit(f)"),
        ("rljax/train/update.py", "print(loss)"),
    ],
)
def test_the_checker_sees(path, source):
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rljax/__init__.py", "if TYPE_CHECKING:\n    from rljax.algorithms import *"),
        ("rljax/types.py", "import jax\nfrom flax import struct"),
        (
            "rljax/ops/kl.py",
            "import functools\nimport jax.numpy as jnp\nfrom rljax.ops import kl\nfrom . import x",
        ),
        (
            "rljax/algorithms/ppo.py",
            "import rljax.types\nfrom rljax.ops import kl\nfrom .wrap import f",
        ),
        ("rljax/train/checkpoint.py", "import orbax.checkpoint as ocp"),
        ("rljax/train/log.py", "print(1)"),
        ("rljax/train/update.py", "import optax, jax\njax.shard_map(f)\njax.debug.print('{}', x)\n'jax.pmap'"),
    ],
)
def test_the_checker_lets_pass(path, source):
    assert violations(path, source) == []
