"""What a reader meets: how far it is from a recipe to its loss, how long functions and recipes are, how many flags."""

import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from tests import reading_path

ROOT = Path(__file__).resolve().parents[1]
RECIPES = (
    "arithmetic_controls",
    "arithmetic_grpo",
    "arithmetic_sft",
    "best_of_n",
    "collect",
    "distil",
    "doctor",
    "dpo",
    "grpo",
    "gsm8k_grpo",
    "online_dpo",
    "ppo",
    "process_reward",
    "reward_model",
    "sft",
)


def test_it_is_not_far_from_the_recipe_to_the_loss():
    functions = reading_path.walk()
    assert sum(function.lines for function in functions) <= 500
    assert len({function.file for function in functions}) <= 13  # one is the table of algorithms by name
    assert functions[0].name == "experiments.grpo.main"
    assert {"rljax.algorithms.grpo.grpo", "rljax.ops.losses.clipped_surrogate"} <= {f.name for f in functions}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("experiments.grpo.main", "rljax.ops.kl.k3"), "rljax.ops.kl.k3 is named by none of the functions before it"),
        (("experiments.grpo.main", "rljax.train.update.mend"), "mend is named by none"),
        (("experiments.grpo.start",), "experiments.grpo.start is no function of this checkout"),
    ],
)
def test_a_path_cannot_claim_what_the_code_does_not_do(path, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        reading_path.walk(path)


def too_long(source: str, most: int) -> list[str]:
    """Functions of more than `most` lines of code: inner functions count, docstrings, comments and blanks do not."""
    code = lines_of_code(source)
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    lengths = [(node.name, len(code & set(range(node.lineno, node.end_lineno + 1)))) for node in functions]
    return [f"{name}: {length} lines" for name, length in lengths if length > most]


def lines_of_code(source: str) -> set[int]:
    """Numbers of the lines that hold code."""
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in ignored:
            found |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            found -= set(range(docstring.lineno, docstring.end_lineno + 1))
    return found


@pytest.mark.parametrize(("folder", "most"), [("experiments", 60), ("rljax", 45)])
def test_no_function_is_too_long_to_be_read_at_once(folder, most):
    files = sorted(ROOT.glob(f"{folder}/**/*.py"))
    assert files
    assert [f"{file.relative_to(ROOT)}: {line}" for file in files for line in too_long(file.read_text(), most)] == []


def test_the_counter_of_lines_counts():
    inner = "    def g():\n        return (\n            1\n        )\n"
    source = f'def f():\n    """What."""\n\n    # why\n{inner}    return g\n'
    assert too_long(source, 6) == []
    assert too_long(source, 5) == ["f: 6 lines"]
    assert too_long(source, 3) == ["f: 6 lines", "g: 4 lines"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short(name):
    assert len((ROOT / "experiments" / f"{name}.py").read_text().splitlines()) <= 200


def test_help_is_short_and_each_flag_has_a_meaning_and_a_default():
    command = [sys.executable, ROOT / "experiments" / "grpo.py", "--help"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    flags = entries(done.stdout)
    assert 30 <= len(flags) <= 35
    assert flags[0].startswith("-h, --help")
    assert "0: greedy, not in training" in next(flag for flag in flags if flag.startswith("--sampling.temperature"))
    for entry in flags[1:]:
        name, _, described = entry.partition(" ")
        meaning, _, default = described.rpartition(" (")
        assert re.fullmatch(r"--[a-z_.]+", name)
        assert len(meaning.split()) >= 3, entry
        assert re.fullmatch(r"required\)|default: .*\)", default), entry
    groups = re.findall(r"─ ([a-z.]+) options ─", done.stdout)
    assert groups == ["data", "batches", "sampling", "optimizer", "weights", "weights.adapter", "mesh"]


def entries(text: str) -> list[str]:
    """Each flag of a help text with its description, as one line."""
    found = []
    for line in text.splitlines():
        inside = line.strip("│").rstrip()
        if inside.startswith(" -"):
            found.append(inside.strip())
        elif inside.startswith("   ") and found:
            found[-1] += " " + inside.strip()
    return [re.sub(r" +", " ", entry) for entry in found]
