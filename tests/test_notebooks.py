"""What is committed of the notebooks: run from the first cell to the last, checked, and able to run in Colab.

Nothing is executed here: `make notebooks` does that (tests/notebooks.py).
"""

import ast
import hashlib
import importlib
import json
import re
import subprocess
import sys
import types
from copy import deepcopy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 400_000  # bytes of a file
SHOWS = {"print", "display", "show", "plt.show"}
PATH = re.compile(r"(?<![\w./])(?:/|~/|file:/)\w[\w.-]*/|[A-Z]:\\|\bat 0x[0-9a-f]{6,}")  # /tmp/x, C:\x, <f at 0x7f...>
LAST_SECTION = "## What to change next"


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def code_of(cells: list[dict]) -> list[dict]:
    return [cell for cell in cells if cell["cell_type"] == "code"]


def digest_of_code(cells: list[dict]) -> str:
    """It is kept with the outputs, which are those of this code."""
    code = [source(cell) for cell in code_of(cells)]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def texts_of(cell: dict) -> list[str]:
    """What the cell's outputs say, figures left out."""
    texts = []
    for output in cell["outputs"]:
        data = output.get("data", {"text": output.get("text", "")})
        texts += ["".join(text) for kind, text in data.items() if kind.startswith("text")]
    return texts


def shows_something(cell: dict) -> bool:
    """Whether a call of print or the like stands in the cell outside of functions."""
    tree = ast.parse(source(cell))
    called = [node.value.func for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    return any(ast.unparse(function) in SHOWS for function in called)


def faults_of_outputs(cells: list[dict]) -> list[str]:
    """What is wrong with what a run left in the file."""
    code = code_of(cells)
    faults = []
    if [cell["execution_count"] for cell in code] != list(range(1, len(code) + 1)):
        faults.append("not run from its first cell to its last")
    for cell in code:
        for output in cell["outputs"]:
            if output["output_type"] == "error" or output.get("name") == "stderr":
                faults.append(
                    f"{cell['id']}: an error or a message on stderr: {output.get('evalue', output.get('text'))}"
                )
        if shows_something(cell) and not cell["outputs"]:
            faults.append(f"{cell['id']}: shows something, and no output is committed")
        found = [path.group() for text in texts_of(cell) for path in PATH.finditer(text)]
        faults += [f"{cell['id']}: the output holds a path or an address: {path}" for path in found]
    return faults


def faults_of_structure(cells: list[dict]) -> list[str]:
    """What a reader would miss."""
    faults = []
    opening = source(cells[0]).split("\n\n")
    if cells[0]["cell_type"] != "markdown" or not opening[0].startswith("# ") or len(opening) != 2:
        faults.append("the first cell is not a title and one paragraph")
    if cells[1]["id"] != "install" or "google.colab" not in source(cells[1]):
        faults.append("the second cell is not the one that installs in Colab")
    text = [line for cell in cells if cell["cell_type"] == "markdown" for line in source(cell).splitlines()]
    if [line for line in text if line.startswith("#")][-1:] != [LAST_SECTION]:
        faults.append(f"the last section is not '{LAST_SECTION}'")
    nodes = [node for cell in code_of(cells) for node in ast.walk(ast.parse(source(cell)))]
    names = [ast.unparse(node.func).split(".")[-1] for node in nodes if isinstance(node, ast.Call)]
    asserts = sum(isinstance(node, ast.Assert) for node in nodes) + sum(name.startswith("assert_") for name in names)
    if asserts < 2:
        faults.append(f"{asserts} assertions; at least 2 are asked for")
    return faults


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> Path:
    return request.param


def test_a_notebook_was_run_and_says_nothing_wrong(notebook):
    assert faults_of_outputs(read(notebook)) == []
    assert notebook.stat().st_size < LARGEST


def test_its_outputs_are_those_of_its_code(notebook):
    """Where a cell was changed since, `make notebooks` has to run again."""
    committed = json.loads(notebook.read_text(encoding="utf-8"))["metadata"].get("executed_code")
    assert committed == digest_of_code(read(notebook))


def test_a_notebook_is_complete(notebook):
    assert faults_of_structure(read(notebook)) == []


def test_what_a_notebook_imports_exists(notebook):
    pytest.importorskip("matplotlib", reason="the notebooks extra is absent")
    nodes = [node for cell in code_of(read(notebook)) for node in ast.walk(ast.parse(source(cell)))]
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


def test_the_page_of_notebooks_lists_them():
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(\w+)\]\(\.\./notebooks/\1\.ipynb\) \|", page, re.MULTILINE) == [
        path.stem for path in NOTEBOOKS
    ]


# ------------------------------------------------------------------------------------------------------------- Colab


def test_all_notebooks_install_alike():
    assert len({source(read(path)[1]) for path in NOTEBOOKS}) == 1


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return ran


def test_the_install_cell_does_nothing_elsewhere(commands):
    before = list(sys.path)
    exec(source(read(NOTEBOOKS[0])[1]), {})
    assert (commands, sys.path) == ([], before)


def test_the_install_cell_installs_in_colab(commands, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    exec(source(read(NOTEBOOKS[0])[1]), {})
    clone, install = commands
    assert (clone[:2], clone[-1]) == (["git", "clone"], "rljax")
    assert install == [sys.executable, "-m", "pip", "install", "--quiet", "-e", "rljax"]
    assert sys.path[0] == str(Path("rljax").resolve())


# ---------------------------------------------------------------------------------------------------------- the runner


def test_a_notebook_whose_model_is_absent_is_left_out(monkeypatch, tmp_path):
    pytest.importorskip("nbclient", reason="the notebooks extra is absent")
    runner = importlib.import_module("tests.notebooks")
    monkeypatch.delenv("STORY_MODEL", raising=False)
    monkeypatch.setenv("RLJAX_SHARED", str(tmp_path))
    assert runner.missing_model("04_kl") == ""
    assert runner.missing_model("07_rlhf_on_stories") == "models/stories260k"
    monkeypatch.setenv("STORY_MODEL", "")
    assert runner.missing_model("07_rlhf_on_stories") == "models/stories260k"
    (tmp_path / "models" / "stories260k").mkdir(parents=True)
    assert runner.missing_model("07_rlhf_on_stories") == ""


# --------------------------------------------------------------------------------------------- the checkers themselves

INSTALL = {"cell_type": "code", "id": "install", "source": ['"google.colab"'], "execution_count": 1, "outputs": []}
GOOD = [
    {"cell_type": "markdown", "id": "title", "source": ["# Title\n", "\n", "A paragraph."]},
    INSTALL,
    {
        "cell_type": "code",
        "id": "cell",
        "source": ["print(2 / 3)\n", "assert 1\n", "np.testing.assert_allclose(1, 1)"],
        "execution_count": 2,
        "outputs": [{"output_type": "stream", "name": "stdout", "text": ["and/or, 2/3\n"]}],
    },
    {"cell_type": "markdown", "id": "next", "source": [f"{LAST_SECTION}\n", "\n", "- This."]},
]


def test_a_good_notebook_has_no_faults():
    assert faults_of_outputs(GOOD) + faults_of_structure(GOOD) == []


@pytest.mark.parametrize(
    "outputs",
    [
        [],
        [{"output_type": "stream", "name": "stderr", "text": ["careful\n"]}],
        [{"output_type": "error", "ename": "ValueError", "evalue": "", "traceback": []}],
        [{"output_type": "stream", "name": "stdout", "text": ["report: /tmp/x/report.html\n"]}],
        [{"output_type": "stream", "name": "stdout", "text": ["~/runs/a\n"]}],
        [{"output_type": "execute_result", "data": {"text/plain": ["<function f at 0x7f65a1b2c3d4>"]}}],
    ],
)
def test_bad_outputs_are_found(outputs):
    cells = deepcopy(GOOD)
    cells[2]["outputs"] = outputs
    assert len(faults_of_outputs(cells)) == 1


def test_a_cell_that_was_run_again_is_found():
    cells = deepcopy(GOOD)
    cells[2]["execution_count"] = 5
    assert len(faults_of_outputs(cells)) == 1


@pytest.mark.parametrize(
    ("cell", "lines"),
    [
        (0, ["Title\n", "\n", "A paragraph."]),
        (0, ["# Title\n", "\n", "A paragraph.\n", "\n", "Another."]),
        (1, ["import sys"]),
        (2, ["print(2 / 3)\n", "assert 1"]),
        (3, ["## Further reading"]),
    ],
)
def test_what_is_missing_is_found(cell, lines):
    cells = deepcopy(GOOD)
    cells[cell]["source"] = lines
    assert len(faults_of_structure(cells)) == 1


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1 / 0", "division by zero"),
        ("import warnings; warnings.warn('careful')", "UserWarning"),
        ("import sys; print('careful', file=sys.stderr)", "on stderr: careful"),
        ("import tempfile; print(tempfile.mkdtemp())", "a path or an address"),
        ("print('fine')", None),
    ],
)
def test_a_run_refuses_what_goes_wrong_in_a_cell(line, said, tmp_path, monkeypatch):
    """And leaves the file as it was; one without faults is written with its outputs."""
    pytest.importorskip("nbclient", reason="the notebooks extra is absent (make notebooks)")
    from tests import notebooks

    path = tmp_path / "a.ipynb"
    cells = deepcopy(GOOD)
    cells[2]["source"] = [f"{line}\n", "assert 1\n", "assert 2"]
    for cell in code_of(cells):
        cell |= {"execution_count": None, "outputs": [], "metadata": {}}
    for cell in cells:
        cell.setdefault("metadata", {})
    text = json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    path.write_text(text)
    for name in ("PYTHONPATH", "JAX_PLATFORMS", "TF_CPP_MIN_LOG_LEVEL"):
        monkeypatch.setenv(name, "")  # restored after the test
    notebooks.set_environment()
    faults = notebooks.execute(path)
    if said is None:
        assert faults == []
        assert texts_of(read(path)[2]) == ["fine\n"]
    else:
        assert said in "".join(faults)
        assert path.read_text() == text
