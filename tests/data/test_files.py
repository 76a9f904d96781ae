"""Files of rows: what is read, and one line for what is not."""

import gzip
import json
import sys
import types

import pytest

from rljax.data.files import read_table
from rljax.data.formats import format_of

ROWS = [{"q": "é\n\u2028", "n": 1}, {"q": None}]
LINES = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n  \n"
FILES = {
    "lines": ("a.jsonl", LINES.encode(), [1, 3], "line"),
    "windows": ("a.jsonl", LINES.replace("\n", "\r\n").encode(), [1, 3], "line"),
    "byte-order mark": ("a.jsonl", LINES.encode("utf-8-sig"), [1, 3], "line"),
    "gzip": ("a.jsonl.gz", gzip.compress(LINES.encode()), [1, 3], "line"),
    "array": ("a.json", json.dumps(ROWS, indent=2).encode(), [1, 2], "row"),
    "array, gzip, mark": ("a.json.gz", gzip.compress(json.dumps(ROWS).encode("utf-8-sig")), [1, 2], "row"),
    "array in a .jsonl": ("a.jsonl", (" \n" + json.dumps(ROWS)).encode(), [1, 2], "row"),
}


@pytest.mark.parametrize(("name", "content", "numbers", "unit"), FILES.values(), ids=FILES)
def test_files_that_are_read(name, content, numbers, unit, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    table = read_table(path)
    assert table.rows == ROWS
    assert table.numbers == numbers
    assert table.place(1) == f"{path}, {unit} {numbers[1]}"


BROKEN = {
    "half a line": (
        "a.jsonl",
        b'{"q": 1}\n\n{"q": "a"',
        r"a\.jsonl, line 3: not JSON .*; one object a line, or one array",
    ),
    "no object": ("a.jsonl", b'{"q": 1}\n\n[1, 2]\n', r"a\.jsonl, line 3: a list; each row must be an object"),
    "array of texts": ("a.json", b'[{"q": 1}, "b"]', r"a\.json, row 2: a str; each row must be an object"),
    "half an array": ("a.json", b'[{"q": 1}, ', r"a\.json: not JSON"),
    "one object over lines": (
        "a.json",
        b'{\n"rows": []\n}',
        r"a\.json, line 1: not JSON .*; legal: \.jsonl, \.json \(lines, or one array\)",
    ),
    "empty": ("a.jsonl", b" \n", r"a\.jsonl is empty: a dataset needs at least one row"),
    "empty array": ("a.json", b"[]", r"a\.json is empty"),
    "UTF-16": ("a.jsonl", '{"q": 1}'.encode("utf-16"), r"a\.jsonl: not UTF-8 at byte 0; legal: .*\.jsonl"),
    "a pointer": (
        "a.jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        r"a\.jsonl is a Git LFS pointer, not the file itself; get it with: git lfs pull",
    ),
    "too deep": ("a.jsonl", b'{"q": 1}\n{"q": ' + b"[" * 10**5, r"a\.jsonl, line 2: JSON that is nested too deeply"),
    "a table": ("a.csv", b"question,answer\n1,2\n", r"a\.csv, line 1: not JSON .*; legal: \.jsonl, \.json .*\.parquet"),
    "an archive": ("a.zip", b"PK\x03\x04 stored", r"a\.zip, line 1: not JSON .*; legal: \.jsonl, \.json .*\.parquet"),
    "half a gzip": ("a.jsonl.gz", gzip.compress(b'{"q": 1}' * 99)[:30], r"a\.jsonl\.gz: a damaged gzip file"),
}


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=BROKEN)
def test_one_line_for_what_is_not_read(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_table(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.parquet"])
def test_no_file(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path / name}: no such file$"):
        read_table(tmp_path / name)


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="is a directory; legal"):
        read_table(tmp_path)


def test_a_real_file_in_gzip(shared):
    rows = read_table(shared / "data" / "humaneval.jsonl.gz").rows
    assert len(rows) == 164
    assert rows[0]["task_id"] == "HumanEval/0"


# ------------------------------------------------------------------------------------------------- through `datasets`


@pytest.fixture
def datasets(monkeypatch):
    """A stand-in for the package, which is an extra: what it is asked for."""
    asked = []
    stub = types.ModuleType("datasets")

    def load_dataset(name, config, split, revision):
        asked.append((name, config, split, revision))
        if name == "none/there":
            raise ConnectionError("Couldn't reach the hub\nand more")
        return ROWS

    stub.load_dataset = load_dataset
    stub.Dataset = types.SimpleNamespace(from_parquet=lambda path: asked.append(path) or ROWS)
    monkeypatch.setitem(sys.modules, "datasets", stub)
    return asked


def test_parquet_and_the_hub(datasets, tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1")
    assert read_table(path).rows == ROWS
    assert read_table(path).place(0) == f"{path}, row 1"
    for name in ("hf://openai/gsm8k@e53f048/main:test", "hf://trl-lib/tldr"):
        assert read_table(name).rows == ROWS
    assert datasets == [
        str(path),
        str(path),
        ("openai/gsm8k", "main", "test", "e53f048"),
        ("trl-lib/tldr", None, "train", None),
    ]
    with pytest.raises(ValueError, match=r"hf://none/there: datasets cannot read it: Couldn't reach the hub$"):
        read_table("hf://none/there")


def test_a_key_that_other_rows_have_is_absent_from_a_column_of_objects(monkeypatch, tmp_path):
    """`datasets` fills it with null in calls, schemas and messages; a null of a column of its own stays."""
    call = {"function": {"name": "weather", "arguments": {"city": "Rome", "a": None}}, "id": None}
    tool = {"function": {"parameters": {"properties": {"city": {"enum": ["Rome", None]}, "a": None}}}}
    row = {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}], "tools": [tool], "n": None}
    row |= {"tests": [{"input": "1", "output": None}]}
    stub = types.ModuleType("datasets")
    stub.Dataset = types.SimpleNamespace(from_parquet=lambda path: [row])
    monkeypatch.setitem(sys.modules, "datasets", stub)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (found,) = read_table(tmp_path / "a.parquet").rows
    assert found["messages"][0]["tool_calls"] == [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}]
    assert found["tools"] == [{"function": {"parameters": {"properties": {"city": {"enum": ["Rome", None]}}}}}]
    assert (found["n"], found["tests"]) == (None, row["tests"])


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for name in (tmp_path / "a.parquet", "hf://trl-lib/tldr"):
        with pytest.raises(ImportError, match=r"needs the package `datasets`: pip install 'rljax\[data\]'"):
            read_table(name)


@pytest.mark.parametrize("missing", ["chosen", "rejected"])
def test_half_a_preference_is_no_prompt(missing):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert format_of(row) == "preference"
    del row[missing]
    with pytest.raises(ValueError, match=f"no column '{missing}'; .* legal: both or neither"):
        format_of(row)
