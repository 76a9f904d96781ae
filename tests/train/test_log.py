import io
import json
import os
import signal
import struct
import subprocess
import sys
import time

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from rljax.train import log as module
from rljax.train.log import (
    Log,
    best_and_worst_lines,
    drop_records_from,
    format_duration,
    format_number,
    log_info,
    printable,
    read_records,
    table,
    write_atomically,
)

NAN, INF = float("nan"), float("inf")


def strict(line):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(line, parse_constant=refuse)


def run(directory, steps, start=0, stop=None):
    """Steps start..stop of a made-up run, whose metrics and samples depend on the step alone."""
    with Log(directory, total_steps=steps, start=start) as log:
        for step in range(start, steps if stop is None else stop):
            log.write(step, {"reward": step / 7, "kl": NAN if step == 2 else 1e-3 * step})
            if step % 2 == 0:
                log.samples([{"step": step, "group": g, "completion": "né\u2028\ud800"} for g in range(2)])


# ------------------------------------------------------------------------------------------------------------- files


def test_a_step_is_a_line_of_strict_json(tmp_path):
    with Log(tmp_path, total_steps=2) as log:
        log.write(0, {"reward": 0.25, "kl": NAN, "loss": INF, "bad": -INF, "tokens": 3})
        log.write(1, {})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == '{"step": 0, "reward": 0.25, "kl": null, "loss": null, "bad": null, "tokens": 3.0}'
    assert strict(lines[1]) == {"step": 1}


def test_what_is_measured_later_is_added_to_the_line_of_its_step(tmp_path):
    """Also by a process that comes after the one that wrote it. A number that is there stays."""
    for start, value, shown in ((0, NAN, "null"), (2, 0.75, "0.75"), (2, 0.25, "0.75")):
        with Log(tmp_path, total_steps=2, start=start) as log:
            for step in range(start, 2):
                log.write(step, {"loss": 1.0 + step, "kl": 0.5})
            log.add(1, {"eval_reward": value, "kl": 0.25})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert lines[0] == '{"step": 0, "loss": 1.0, "kl": 0.5}'
        assert lines[1:] == [f'{{"step": 1, "loss": 2.0, "kl": 0.5, "eval_reward": {shown}}}']


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    with Log(tmp_path, total_steps=2) as log:
        log.write(0, {"reward": 1.0})
        log.samples([{"step": 0}])
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "reward": 1.0}\n'
        assert (tmp_path / "samples.jsonl").read_text() == '{"step": 0}\n'


@pytest.mark.parametrize("half", ["", '{"step": 5, "rew', '{"step": 5, "reward": 1.0}', "\0\0\0"])
@pytest.mark.parametrize("start", [0, 3, 5])
def test_a_resumed_run_leaves_the_files_of_a_run_never_stopped(tmp_path, start, half):
    run(tmp_path / "whole", 8)
    run(tmp_path / "cut", 8, stop=5)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(tmp_path / "cut" / name, "a") as file:
            file.write(half)
    run(tmp_path / "cut", 8, start=start)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "cut").glob(".*"))


def test_the_hour_is_not_written(tmp_path, monkeypatch):
    run(tmp_path / "now", 4)
    monkeypatch.setattr(module.time, "monotonic", lambda: 1e9)
    monkeypatch.setattr(module.time, "time", lambda: 2e9)
    run(tmp_path / "then", 4)
    assert (tmp_path / "now" / "metrics.jsonl").read_bytes() == (tmp_path / "then" / "metrics.jsonl").read_bytes()


def test_a_complete_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}')
    drop_records_from(path, 2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'


def test_readers_ignore_half_a_line_and_refuse_a_bad_one(tmp_path):
    path = tmp_path / "x.jsonl"
    assert list(read_records(path)) == []
    path.write_text('{"step": 0}\n{"step": 1, "re')
    assert list(read_records(path)) == [{"step": 0}]
    path.write_text('{"step": 0}\n{"step": 1, "re\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        list(read_records(path))


WRITER = """
import sys
from rljax.train.log import Log
log = Log(sys.argv[1], total_steps=10**9)
for step in range(10**9):
    log.write(step, {"reward": step / 7})
    log.samples([{"step": step, "completion": "x" * 20_000}])
"""


def test_a_run_killed_while_it_writes_goes_on(tmp_path):
    process = subprocess.Popen([sys.executable, "-W", "error", "-c", WRITER, tmp_path], stdout=subprocess.DEVNULL)
    path = tmp_path / "samples.jsonl"
    while not (path.exists() and path.stat().st_size > 2e6):
        assert process.poll() is None, "the writer failed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with Log(tmp_path, total_steps=60, start=50) as log:
        log.write(50, {"reward": 0.0})
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == list(range(51))
    assert [record["step"] for record in read_records(path)] == list(range(50))


def test_replacing_a_file_is_all_or_nothing(tmp_path):
    path = tmp_path / "x"
    write_atomically(path, "old é")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text(encoding="utf-8") == "old é"


def test_what_is_no_metric_is_refused_by_name(tmp_path):
    with Log(tmp_path, total_steps=1) as log:
        with pytest.raises(ValueError, match=r"'kl' has shape \(2,\)"):
            log.write(0, {"kl": module.np.zeros(2)})
        with pytest.raises(ValueError, match="'step' is no metric"):
            log.write(0, {"step": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_process_without_a_directory_writes_and_shows_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with Log(None, total_steps=1) as log:
        log.write(0, {"reward": 1.0})
        log.samples([{"step": 0}])
    assert os.listdir(tmp_path) == []
    assert capsys.readouterr().out == ""


def test_further_writers_are_called(tmp_path):
    seen = []
    with Log(tmp_path, total_steps=1, writers=[lambda step, metrics: seen.append((step, metrics))]) as log:
        log.write(0, {"reward": module.np.float32(0.5)})
    assert seen == [(0, {"reward": 0.5})]


# ------------------------------------------------------------------------------------------------------- TensorBoard


def events(directory):
    """The events of each file, oldest first, read from the bytes: length, its checksum, the event, its checksum."""
    files = sorted((directory / "tensorboard").iterdir(), key=lambda path: int(path.name.rsplit(".", 1)[1]))
    for path in files:
        data, at, out = path.read_bytes(), 0, []
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            out.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
        yield out


def test_tensorboard_gets_every_metric_and_forgets_what_is_done_again(tmp_path):
    run(tmp_path, 4, stop=3)
    run(tmp_path, 4, start=2)
    first, second = events(tmp_path)
    scalars = [{v.tag: v.simple_value for v in event.summary.value} for event in first if event.summary.value]
    assert [event.step for event in first if event.summary.value] == [0, 1, 2]
    assert scalars[1] == {"reward": pytest.approx(1 / 7), "kl": pytest.approx(1e-3)}
    assert scalars[2]["kl"] != scalars[2]["kl"]  # NaN is shown as NaN
    starts = [event.step for event in second if event.session_log.status == 1]
    assert starts == [2]  # TensorBoard drops what earlier files say of step 2 and later
    assert [event.step for event in second if event.summary.value] == [2, 3]


# ------------------------------------------------------------------------------------------------------------ screen


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_numbers_and_times_are_short():
    assert [format_number(x) for x in (0.41234, 3.9, 15234.4, 0.00214, -2.0, NAN)] == [
        "0.412",
        "3.9",
        "15,234",
        "0.00214",
        "-2",
        "–",
    ]
    assert [format_duration(x) for x in (0.4, 41, 61.6, 3723)] == ["0:00", "0:41", "1:02", "1:02:03"]


def test_plain_lines_first_last_and_now_and_then(tmp_path, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Log(tmp_path, total_steps=20, progress_metrics=("reward", "absent", "tokens_per_second")) as log:
        for step in range(20):
            log.write(step, {"tokens_per_second": 15234.4, "reward": step / 100, "loss": 1.0})
            now[0] += 1.5
    assert capsys.readouterr().out.splitlines() == [
        "step 1/20  reward 0  tok/s 15,234  eta –",
        "step 5/20  reward 0.04  tok/s 15,234  eta 0:22",  # 6.0 s after the first; 15 steps of 1.5 s are left
        "step 9/20  reward 0.08  tok/s 15,234  eta 0:16",
        "step 13/20  reward 0.12  tok/s 15,234  eta 0:10",
        "step 17/20  reward 0.16  tok/s 15,234  eta 0:04",
        "step 20/20  reward 0.19  tok/s 15,234  eta 0:00",
    ]


def test_the_last_step_of_an_interrupted_run_is_shown(tmp_path, capsys):
    with Log(tmp_path, total_steps=9) as log:
        for step in range(3):
            log.write(step, {"kl": 0.0})
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["step 1/9", "step 3/9"]


def test_what_is_nothing_but_rounding_is_shown_as_0_and_written_as_it_is(tmp_path, capsys):
    with Log(tmp_path, total_steps=1) as log:
        log.write(0, {"kl": -7.3e-07, "reward": 2e-06})
    assert capsys.readouterr().out == "step 1/1  reward 2e-06  kl 0  eta –\n"
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["kl"] == -7.3e-07


def test_a_terminal_gets_one_line_that_words_do_not_break(tmp_path, monkeypatch):
    out = Terminal()
    monkeypatch.setattr(module, "console", Console(file=out, force_terminal=True, width=100, _environ={}))
    with Log(tmp_path, total_steps=2) as log:
        log.write(0, {"reward": 0.5})
        log_info("saved [bold]step[/bold] :smile:")
        log.write(1, {"reward": 0.75})
    assert "saved [bold]step[/bold] :smile:\n" in out.getvalue()
    assert "reward 0.75" in out.getvalue()
    assert "2/2" in out.getvalue()
    assert out.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_tables_keep_brackets_and_align_numbers(capsys):
    table("[what]", [{"[name]": "[red]x", "bytes": 1234567}, {"[name]": "y", "bytes": 2, "ok": True}])
    out = capsys.readouterr().out
    assert "[what]" in out
    rows = [line.split() for line in out.splitlines() if "x" in line or "y" in line]
    assert ["[red]x", "1,234,567"] in rows
    assert ["y", "2", "True"] in rows


def test_in_a_pipe_the_first_column_of_a_table_is_not_broken(capsys):
    name = "params/decoder/layers/attention/query"
    table("what", [{"array": name, "placed": "word " * 30}])
    assert any(line.split()[0] == name for line in capsys.readouterr().out.splitlines() if line.strip())
    table("what", [{"array": name * 4, "placed": "elsewhere"}])  # is broken: else nothing of the rest would be seen
    assert "elsewhere" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]52;c;AAAA\x07", "\ufffd]52;c;AAAA\ufffd"),  # would write to the clipboard
        ("a\r\b\x9b2J\x7f", "a\ufffd\ufffd\ufffd2J\ufffd"),
        ("\u202eabc\ufeff\u2028", "\ufffdabc\ufffd\ufffd"),  # right to left, invisible, another line
        ("\ud800", "\ufffd"),  # half of a character
        ("1\t2\n3\xa04\u3000五", "1\t2\n3\xa04\u3000五"),
        ("👩\u200d🔬 می\u200cخواهم", "👩\u200d🔬 می\u200cخواهم"),
    ],
)
def test_what_is_printable(text, shown):
    assert printable(text) == shown


def test_messages_and_tables_control_no_terminal(capsys):
    log_info("x\x1b[2J\u202e")
    table("\x1b[2J", [{"\x1b[2J": "\x1b[2J"}])
    out = capsys.readouterr().out
    assert out.count("\ufffd[2J") == 4
    assert printable(out) == out


def test_log_info_does_not_wrap(capsys):
    log_info("x" * 500)
    assert capsys.readouterr().out == "x" * 500 + "\n"


def test_the_best_and_the_worst_sample_are_printed_and_control_no_terminal(tmp_path, capsys):
    rewards = {0.5: "middle", 1.0: "2\x1b[31m\n\u202ered", 0.0: "x" * 300}
    records = [{"step": 0, "prompt": "1+1=", "completion": text, "reward": r} for r, text in rewards.items()]
    with Log(tmp_path, total_steps=1) as log:
        log.samples(records)
    assert capsys.readouterr().out.splitlines() == [
        "  best 1: 1+1= → 2\ufffd[31m \ufffdred",
        "  worst 0: 1+1= → " + "x" * 99 + "…",
    ]


def test_a_sample_that_is_cut_says_so_and_is_cut_between_words():
    prompt = "One day Ben went to the park with his dog Max."
    completion = "Max ran after the ball and Ben was happy."
    (line,) = best_and_worst_lines([{"reward": 1, "prompt": prompt, "completion": completion}], width=30)
    assert line == "  best 1: …dog Max. → Max ran after the ball and…"
    (line,) = best_and_worst_lines([{"reward": 1, "prompt": "a b", "completion": "c" * 30}], width=30)
    assert line == f"  best 1: a b → {'c' * 30}"


def test_without_a_reward_no_sample_is_best(tmp_path, capsys):
    with Log(tmp_path, total_steps=1) as log:
        log.samples([{"step": 0, "prompt": "", "completion": "", "reward": None}])
    assert capsys.readouterr().out == ""


def test_a_terminal_shows_samples_and_what_is_compiled_under_the_bar(tmp_path, monkeypatch):
    out = Terminal()
    monkeypatch.setattr(module, "console", Console(file=out, force_terminal=True, width=120, _environ={}))
    with Log(tmp_path, total_steps=2, compiling=lambda: "compiling update 0:07") as log:
        log.samples([{"step": 0, "prompt": "1+1=", "completion": c, "reward": r} for r, c in ((1.0, "2"), (0.0, "5"))])
        log.write(0, {"reward": 0.5})
    shown = out.getvalue()
    for text in ("compiling update 0:07", "best 1: 1+1= → 2", "worst 0: 1+1= → 5"):
        assert text in shown
