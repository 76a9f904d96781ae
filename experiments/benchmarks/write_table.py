r"""The figures of all benchmarks as one table in docs/performance.md, with the machine, versions and the commit.

    python experiments/benchmarks/write_table.py FOLDER      # of {benchmark}.json, {name of a figure: number} each

The table stands between two comments, which stay. `make bench` runs every benchmark into a folder, and then this.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path

import jax
import tyro

from rljax.train.log import format_number, log_info, write_atomically
from rljax.train.provenance import git_revision

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
BEGIN = "<!-- make bench writes from here -->"
END = "<!-- to here -->"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def main(folder: tyro.conf.Positional[str], document: str = str(DOCUMENT)) -> None:
    """Write the figures in FOLDER into the document."""
    path = Path(document)
    figures = {file.stem: json.loads(file.read_text()) for file in sorted(Path(folder).glob("*.json"))}
    text = replaced(path.read_text(encoding="utf-8"), f"{conditions()}\n\n{table_of(figures)}")
    write_atomically(path, text)
    log_info(f"{sum(map(len, figures.values()))} figures of {len(figures)} benchmarks in {path}")


def table_of(figures: dict[str, dict[str, float]]) -> str:
    """A row for each figure, in Markdown."""
    lines = ["| benchmark | figure | value |", "|---|---|---|"]
    for benchmark, values in figures.items():
        lines += [f"| {benchmark} | {escaped(name)} | {format_number(value)} |" for name, value in values.items()]
    return "\n".join(lines)


def escaped(name: str) -> str:
    return name.replace("|", r"\|")


def conditions() -> str:
    """When, where and with what, in one line."""
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    today = datetime.date.today().isoformat()
    python = platform.python_version()
    machine = f"{os.cpu_count()} cores, {processor()}{accelerators()}"
    return f"{today}, {machine}; Python {python}, {packages}; commit {git_revision()}."


def accelerators() -> str:
    """How many there are, and their kind; nothing where JAX computes on a CPU."""
    devices = jax.devices()
    return "" if devices[0].platform == "cpu" else f", {len(devices)} x {devices[0].device_kind}"


def processor() -> str:
    """Its name, where Linux tells it."""
    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", file.read_text()) if file.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def replaced(document: str, text: str) -> str:
    """The document with the text between its two comments. Raises ValueError where they are not there once each."""
    if document.count(BEGIN) != 1 or document.count(END) != 1 or document.index(BEGIN) > document.index(END):
        raise ValueError(f"the document must hold {BEGIN} and then {END}, once each")
    before, rest = document.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


if __name__ == "__main__":
    tyro.cli(main)
