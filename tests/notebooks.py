"""Executes the notebooks and writes what they show into their files: `make notebooks`.

    python -m tests.notebooks                        # all
    python -m tests.notebooks 02_the_maze 04_kl      # these

A notebook fails where a cell raises, where Python warns, where anything is written to stderr, and where
tests/test_notebooks.py would find a fault; its file is then left as it was. The others are committed as they come out.
One that needs a model which is not there is left out, and its file too stays as it was.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from tests.test_notebooks import digest_of_code, faults_of_outputs, faults_of_structure

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "notebooks"
NEEDS = {"07_rlhf_on_stories": "models/stories260k"}  # in $RLJAX_SHARED, or a directory in $STORY_MODEL
CELL_SECONDS = 1200  # after which a cell is given up
# Warnings are errors from the first cell on, but for those that the kernel itself gives.
WARNINGS = (
    "import warnings; warnings.simplefilter('error'); warnings.filterwarnings('ignore', module='ipykernel|tornado')"
)
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def find_notebooks(names: list[str]) -> list[Path]:
    """The files of these names, of all notebooks where there is none. Raises SystemExit for an unknown one."""
    files = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    unknown = [name for name in names if name not in files]
    if unknown:
        raise SystemExit(f"no notebook is called {', '.join(unknown)}; legal: {', '.join(files)}")
    return [files[name] for name in names or files]


def missing_model(name: str) -> str:
    """The model that the notebook needs, where it is not there; else ""."""
    shared = Path(os.environ.get("RLJAX_SHARED") or ROOT.parent / "shared")
    model = NEEDS.get(name, "")
    found = not model or bool(os.environ.get("STORY_MODEL")) or (shared / model).is_dir()
    return "" if found else model


def set_environment() -> None:
    """What the kernels inherit: this checkout, and the CPU.

    XLA logs nothing: on a busy machine it would remark on compilations that take minutes.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}


def execute(path: Path) -> list[str]:
    """Run one notebook in a kernel of its own, and write its outputs into its file; returns what is wrong with it."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR", f"--IPKernelApp.exec_lines={WARNINGS}"],
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return [str(error)]
    faults = faults_of_outputs(notebook.cells) + faults_of_structure(notebook.cells)
    if not faults:
        notebook.metadata = nbformat.from_dict(METADATA | {"executed_code": digest_of_code(notebook.cells)})
        nbformat.write(notebook, path)
    return faults


def main(names: list[str]) -> int:
    set_environment()
    failed, total = [], 0.0
    for path in find_notebooks(names):
        print(f"{path.stem:28}", end="", flush=True)
        if model := missing_model(path.stem):
            print(f"left out: there is no {model} in $RLJAX_SHARED")
            continue
        start = time.perf_counter()
        faults = execute(path)
        seconds = time.perf_counter() - start
        total += seconds
        print(f"{seconds:6.1f} s" + "  FAILED" * bool(faults), flush=True)
        print("".join(f"{fault}\n" for fault in faults), end="", flush=True)
        if faults:
            failed.append(path.stem)
    print(f"{'total':28}{total:6.1f} s" + f"; failed: {', '.join(failed)}" * bool(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
