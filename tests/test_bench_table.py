"""The table that `make bench` writes into docs/performance.md."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.benchmarks import write_table
from experiments.benchmarks.common import named

ROOT = Path(__file__).resolve().parents[1]


def test_rows_of_a_table_become_figures():
    rows = [{"": "rollout", "seconds": 0.5, "rows": 64}, {"": "update", "seconds": 2.0, "note": "noisy"}]
    assert named(rows, "W1, ") == {"W1, rollout, seconds": 0.5, "W1, rollout, rows": 64, "W1, update, seconds": 2.0}


def test_the_table_replaces_what_stands_between_its_comments(tmp_path):
    document = tmp_path / "performance.md"
    document.write_text(f"# Before\n\n{write_table.BEGIN}\nold\n{write_table.END}\n\nafter\n")
    (tmp_path / "rollout.json").write_text(json.dumps({"W1, seconds": 0.25, "of |x|": 1234.5}))
    (tmp_path / "memory.json").write_text(json.dumps({"W1, MB": 120}))
    for _ in range(2):  # a second time it replaces its own text
        write_table.main(str(tmp_path), str(document))
        text = document.read_text()
        assert text.startswith("# Before\n")
        assert text.endswith("\n\nafter\n")
        assert "old" not in text
        rows = re.findall(r"^\| (\w+) \| (.*) \| (\S+) \|$", text, re.M)[1:]
        assert rows == [
            ("memory", "W1, MB", "120"),
            ("rollout", "W1, seconds", "0.25"),
            ("rollout", r"of \|x\|", "1,234"),
        ]
        assert re.search(r"\d+ cores, .*Python 3\.\d+\.\d+, jax \d.*commit", text)


def test_a_table_names_the_accelerators_that_it_was_measured_on(monkeypatch):
    assert write_table.accelerators() == ""
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(write_table.jax, "devices", lambda: [gpu, gpu])
    assert re.search(r"\d+ cores, .*, 2 x NVIDIA H100 80GB HBM3; Python", write_table.conditions())


def test_a_document_without_its_comments_is_refused():
    for text in ("", write_table.BEGIN, f"{write_table.END} {write_table.BEGIN}"):
        with pytest.raises(ValueError, match="must hold"):
            write_table.replaced(text, "table")


def test_the_document_has_a_place_for_the_table():
    text = write_table.DOCUMENT.read_text(encoding="utf-8")
    assert "new" in write_table.replaced(text, "new")


def test_make_bench_runs_every_benchmark():
    """Every script there that can be run on its own, but the one that writes the table."""
    listed = re.search(r"^benchmarks := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    scripts = (ROOT / "experiments" / "benchmarks").glob("*.py")
    runnable = {script.stem: script.read_text() for script in scripts if '__name__ == "__main__"' in script.read_text()}
    del runnable["write_table"]
    assert set(listed) == runnable.keys()
    for name, source in runnable.items():  # `run` sets the precision of recipes
        assert source.endswith('if __name__ == "__main__":\n    run(Config, main)\n'), name


def test_what_every_benchmark_can_write_is_written():
    for script in (ROOT / "experiments" / "benchmarks").glob("*.py"):
        source = script.read_text()
        if "class Config(Output)" in source:
            assert "cfg.json" in source, script.stem
            assert "cfg.profile" in source, script.stem
