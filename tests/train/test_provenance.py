"""The source of the functions of a run: what it tells apart, how it is kept, and how it is compared on resume."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.algorithms import grpo, with_kl
from rljax.train.provenance import function_source, git_revision, record_sources, run_sources
from rljax.types import Batch

ROOT = Path(__file__).resolve().parents[2]
SCALE = 2.0


def closing(value):
    return lambda completion: value


def one(completion):
    return 1.0


def two(completion):
    return 2.0


def default_one(completion, limit=1):
    return limit


def keyword_one(completion, *, limit=1):
    return limit


def made_with(limit):
    def made(completion, limit=limit):
        return limit

    return made


def scaled(completion):
    return SCALE * one(completion)


def own_loss(scale):
    def loss(output, batch: Batch):
        return -scale * batch.advantages * output.logp, {}

    return grpo()._replace(loss=loss)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (one, two),
        (closing(1.0), closing(2.0)),
        (closing((1, 2)), closing((1, 3))),
        (closing("a" * 1000 + "b"), closing("a" * 1000 + "c")),
        (closing({"cat", "dog"}), closing({"cat", "cow"})),
        (closing(np.zeros(3)), closing(np.zeros(4))),
        (closing(one), closing(two)),
        (made_with(1), made_with(2)),
        (functools.partial(default_one, limit=3), functools.partial(default_one, limit=4)),
        (functools.partial(keyword_one, limit=3), functools.partial(keyword_one, limit=4)),
        ([one, two], [two, one]),
        ({"a": one}, {"b": one}),
        (with_kl(grpo(), 0.1), with_kl(grpo(), 0.2)),
        (own_loss(2.0), own_loss(3.0)),
    ],
)
def test_functions_that_compute_something_else_have_another_text(left, right):
    assert function_source(left) == function_source(left)
    assert function_source(left) != function_source(right)


def test_a_function_made_again_has_the_same_text():
    assert function_source(closing(0.5)) == function_source(closing(0.5))
    assert function_source(own_loss(2.0)) == function_source(own_loss(2.0))


def test_the_text_is_source_with_the_values_it_uses():
    text = function_source(scaled)
    assert "return SCALE * one(completion)" in text
    assert "SCALE = 2.0" in text
    assert "def one(completion):\n    return 1.0" in text


def test_compiled_functions_and_objects_that_are_called_are_read_too():
    class Verifier:
        def __call__(self, completion):
            return 0.25

    assert "return 1.0" in function_source(jax.jit(one))
    assert "return 0.25" in function_source(Verifier())


def relu(x):
    return jnp.where(x > 0, x, 0.0)


def test_other_installed_packages_are_not_followed():
    assert function_source(relu).count("def ") == 1


def test_a_module_that_warns_of_a_name_is_read_silently():
    def shown(values):
        return str(np.asarray(values))  # numpy warns where it is asked for its "str"

    assert "str(np.asarray(values))" in function_source(shown)


def test_functions_that_call_each_other_end():
    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n > 0 and even(n - 1)

    assert function_source(even).count("def odd(n)") == 1


PRINTS = """
import sys
sys.path[:0] = sys.argv[1:]
import pathlib
from rewards import hostile
from rljax.algorithms import grpo, with_kl
from rljax.train.provenance import function_source
print(function_source([with_kl(grpo(), 0.1), hostile.share_of, {"cat", "dog", "pig"}]))
"""


def test_two_processes_write_the_same_text():
    """Under other hash seeds, by which the order of sets changes."""
    environment = {"JAX_PLATFORMS": "cpu", "PATH": os.environ.get("PATH", "")}
    command = [sys.executable, "-c", PRINTS, str(ROOT / "tests"), str(ROOT)]
    texts = {
        subprocess.run(
            command, env={**environment, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1
    assert "def share_of" in texts.pop()


def test_the_git_revision_is_known_or_none(monkeypatch):
    revision = git_revision()
    assert revision is None or len(revision.rstrip("+")) >= 7
    monkeypatch.setenv("PATH", "")
    assert git_revision() is None
    assert run_sources({"score": one})["git_revision.txt"] == "unknown\n"


# ------------------------------------------------------------------------------------------------------ kept in a run


def module_of(path, text):
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("own", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_edited_helper_is_noticed(tmp_path):
    text = "def helper(x):\n    return {} * x\n\n\ndef score(x):\n    return helper(x)\n"
    before = function_source(module_of(tmp_path / "own.py", text.format(2)).score)
    after = function_source(module_of(tmp_path / "own.py", text.format(3)).score)
    assert before.replace("return 2", "return 3") == after != before


def folders(directory):
    return sorted(path.name for path in directory.iterdir())


def test_sources_are_recorded_once_and_again_where_they_change(tmp_path):
    assert record_sources(tmp_path, 0, {"a": "1", "b": "1"}) == []
    assert record_sources(tmp_path, 10, {"a": "1", "b": "1"}) == []
    assert folders(tmp_path) == ["step_0"]
    assert record_sources(tmp_path, 20, {"a": "2", "c": "1"}) == ["a", "b", "c"]
    assert folders(tmp_path) == ["step_0", "step_20"]
    assert (tmp_path / "step_0" / "a").read_text() == "1"
    assert (tmp_path / "step_20" / "a").read_text() == "2"
    assert record_sources(tmp_path, 30, {"a": "2", "c": "1"}) == []


def test_what_was_recorded_for_steps_that_are_done_again_is_dropped(tmp_path):
    record_sources(tmp_path, 0, {"a": "1"})
    record_sources(tmp_path, 20, {"a": "2"})
    assert record_sources(tmp_path, 10, {"a": "3"}) == ["a"]
    assert folders(tmp_path) == ["step_0", "step_10"]
    assert record_sources(tmp_path, 0, {"a": "4"}) == []
    assert folders(tmp_path) == ["step_0"]
    assert (tmp_path / "step_0" / "a").read_text() == "4"
