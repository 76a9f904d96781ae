"""docs/metrics.md against the code, both ways: what is logged is explained, and what is explained is logged."""

import ast
import re
from functools import lru_cache, partial
from pathlib import Path

import jax
import pytest

from rljax.train.metrics import credit_metrics, rollout_metrics
from rljax.train.objective import policy_objective
from tests.algorithms.tiny import ALGORITHMS, credited, rollout, table_params, table_policy
from tests.docs.sources import HOLE, strings, trees

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "metrics.md"
NOT_LOGGED = {"ratio_squared"}  # average_metrics makes ratio_std and ess_fraction of it
SPREAD = {"ratio_std", "ess_fraction"}


@lru_cache
def explained() -> set[str]:
    """The names in the first column, with their endings: `advantage` with `_std` is also advantage_std."""
    found = set()
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        names = re.findall(r"`([^`]+)`", line.split(" | ")[0]) if line.startswith("| `") else []
        endings = [name for name in names if name.startswith("_")]
        whole = [name for name in names if name[0] not in "_."]
        found |= {whole[0] + name.removeprefix("...") for name in names if name.startswith("...")}
        found |= {name + ending for name in whole for ending in ["", *endings]}
    return found


def is_explained(name: str) -> bool:
    """Whether the page has the name, or a pattern for it: NAME and k stand for any."""
    patterns = [re.escape(text).replace("NAME", r"\w+").replace("@k", r"@\d+") for text in explained()]
    return any(re.fullmatch(text, name) for text in patterns)


def metrics_of_updates(name: str) -> set[str]:
    """Names that an update with this algorithm logs; nothing is computed."""
    objective = policy_objective(table_policy, ALGORITHMS[name])

    def loss(params, batch):
        return objective.loss(params, {}, objective.prepare(params, {}, batch, jax.random.key(0)))[1]

    return set(jax.eval_shape(loss, table_params(), credited(ALGORITHMS[name], rollout())))


def written_by_hand() -> set[str]:
    """Keys of `metrics[...] = ` and of dicts that are merged into `metrics` (or averaged, measured)."""
    found = set()
    loops = [tree for path, tree in trees().items() if "tools" not in path.parts]  # a tool writes others' formats
    for node in (node for tree in loops for node in ast.walk(tree)):
        for target in node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]:
            base = target.value if isinstance(target, ast.Subscript) else target
            if not isinstance(base, ast.Name) or base.id not in ("metrics", "averaged", "measured"):
                continue
            if isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
                found.add(target.slice.value)
            value = getattr(node, "value", None)
            for part in ast.walk(value) if isinstance(value, ast.Dict | ast.BinOp) else ():
                keys = part.keys if isinstance(part, ast.Dict) else []
                found |= {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    return found


@pytest.mark.nightly
@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_an_update_logs_is_explained(name):
    assert {x for x in metrics_of_updates(name) - NOT_LOGGED if not is_explained(x)} == set()


def test_what_a_rollout_logs_is_explained():
    traj = rollout()
    batch = credited(ALGORITHMS["ppo"], traj)
    logged = set(jax.eval_shape(partial(rollout_metrics, names=("exact", "judge")), traj))
    logged |= set(jax.eval_shape(credit_metrics, batch))
    assert len(logged) > 30
    assert {name for name in logged if not is_explained(name)} == set()


def test_what_scripts_and_updates_add_is_explained():
    found = written_by_hand()
    assert len(found) > 20
    assert {name for name in found - NOT_LOGGED if not is_explained(name)} == set()


def returned(path: Path) -> set[str]:
    """Keys of the dicts that functions of a file return as the second of two values, or that are called metrics."""
    found = set()
    for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in ast.walk(function):
            value = node.value if isinstance(node, ast.Return) else None
            if isinstance(value, ast.Tuple) and len(value.elts) == 2:
                value = value.elts[1]
            elif "metrics" not in function.name:
                continue
            dicts = [part for part in ast.walk(value) if isinstance(part, ast.Dict)] if value else []
            keys = [key for part in dicts for key in part.keys]
            found |= {key.value for key in keys if isinstance(key, ast.Constant)}
    return found


def test_what_losses_return_is_explained():
    found = set().union(*map(returned, ROOT.glob("rljax/algorithms/**/*.py")), returned(ROOT / "rljax/ops/losses.py"))
    assert len(found) >= 15
    assert {name for name in found - NOT_LOGGED if not is_explained(name)} == set()


def test_what_is_explained_is_logged():
    templates = []
    for text in strings():
        fixed = [part for part in text.split(HOLE) if part]
        if HOLE in text and len("".join(fixed)) >= 4 and " " not in text:
            templates.append(re.escape(text).replace(re.escape(HOLE), r"[\w/]+"))
    keywords = {node.arg for tree in trees().values() for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    known = {*strings(), *keywords, *SPREAD}
    missing = [name for name in explained() if name not in known and not any(re.fullmatch(t, name) for t in templates)]
    assert missing == []
