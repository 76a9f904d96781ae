import base64
import hashlib
import json
from html.parser import HTMLParser

import numpy as np
import pytest

from rljax.train import samples
from rljax.train.log import Log
from rljax.train.report import (
    collect,
    curve,
    embed_json,
    group_by_theme,
    peak_memory,
    smooth,
    theme_of,
    thin,
    time_breakdown,
    write_report,
)
from rljax.train.samples import evenly_spaced, read_samples

EVIL = '</script><img src=x onerror="alert(1)">\u2028{{SCRIPT}}<!-- &amp; \ud800'


class Page(HTMLParser):
    """The tags, the ids, and the text of every script of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.titles = [], [], [], []
        self.into = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        self.into = {"script": self.scripts, "title": self.titles}.get(tag)
        if self.into is not None:
            self.into.append("")

    def handle_endtag(self, tag):
        self.into = None

    def handle_data(self, data):
        if self.into is not None:
            self.into[-1] += data


def record(step, group=0, text="x", reward=1.0, **more):
    tokens = {"id": [1, 2], "text": [text, text], "chosen": [0, 1], "mask": [0, 1], "advantage": [None, 0.5]}
    base = {"step": step, "group": group, "prompt": text, "completion": text, "columns": {text: text}}
    return base | {"scores": {text: reward}, "reward": reward, "length": 1, "ended": True, "tokens": tokens} | more


def write_run(directory, metrics, records=(), config=None):
    with Log(directory, total_steps=len(metrics)) as log:
        for step, values in enumerate(metrics):
            log.write(step, values)
        log.samples(records)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    page = Page(write_report(directory).read_text(encoding="utf-8"))
    return page, json.loads(page.scripts[0])


# ----------------------------------------------------------------------------------------------------------- the page


def test_the_page_holds_what_the_files_hold(tmp_path):
    config = {"experiment": "grpo_addition", "git": "abc+", "config": {"steps": 9, "sampling": {"n": 8, "stop": [0]}}}
    records = [record(step, group=g, reward=r) for step in (0, 2) for g, r in ((4, 1.0), (4, None), (6, 0.25))]
    metrics = [{"reward": 0.1 * i, "kl": float("nan") if i == 1 else 0.5} for i in range(3)]
    page, data = write_run(tmp_path / "my run", metrics, records, config)
    assert page.titles == ["my run"]
    assert {k: data["title"][k] for k in ("run", "experiment", "facts", "steps", "total")} == {
        "run": "my run",
        "experiment": "grpo_addition",
        "facts": {"git": "abc+"},
        "steps": 3,
        "total": 9,
    }
    assert data["config"] == [["steps", "9"], ["sampling.n", "8"], ["sampling.stop", "[0]"]]
    reward, kl = (theme["series"][0] for theme in data["curves"])
    assert (reward["name"], reward["steps"], reward["values"], reward["last"]) == (
        "reward",
        [0, 1, 2],
        [0, 0.1, 0.2],
        0.2,
    )
    assert (kl["steps"], kl["values"], kl["nulls"], kl["missing"]) == ([0, 2], [0.5, 0.5], [1], 1)
    assert [each["step"] for each in data["samples"]["steps"]] == [0, 2]
    assert [r for each in data["samples"]["steps"] for r in each["records"]] == records
    assert data["samples"]["left_out"] == 0


def test_the_page_needs_nothing_but_itself(tmp_path):
    page, _ = write_run(tmp_path, [{"reward": 1.0}], [record(0)])
    text = (tmp_path / "report.html").read_text()
    assert "http:" not in text
    assert "https:" not in text
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not [
        found for found in page.attributes if found[1] in ("src", "srcset", "action") or found[1].startswith("on")
    ]
    assert all(value.startswith("#") for _, name, value in page.attributes if name == "href")
    assert "url(" not in text
    assert "@import" not in text
    assert not list(tmp_path.glob(".*"))


def test_only_our_script_may_run(tmp_path):
    page, _ = write_run(tmp_path, [{"reward": 1.0}])
    policy = next(value for _, name, value in page.attributes if name == "content" and "script-src" in value)
    assert "default-src 'none'" in policy
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "setTimeout"):
        assert way not in page.scripts[1]


def test_hostile_text_stays_text(tmp_path):
    clean, _ = write_run(tmp_path / "clean", [{"reward": 1.0}], [record(0)])
    name = EVIL.replace("\ud800", "").replace("/", "")  # directories and TensorBoard tags know no lone surrogates
    config = {"experiment": EVIL, "config": {EVIL: EVIL, "deep": {EVIL: [EVIL]}}}
    evil, data = write_run(tmp_path / name, [{name: 1.0}], [record(0, text=EVIL)], config)
    assert evil.tags == clean.tags
    assert evil.attributes == clean.attributes
    assert evil.scripts[1] == clean.scripts[1]
    assert data["samples"]["steps"][0]["records"] == [record(0, text=EVIL)]
    assert data["title"]["run"] == name
    assert data["config"][0] == [EVIL, EVIL]
    assert not set("<>&\u2028\ud800") & set(evil.scripts[0])


def test_embedded_json_is_strict():
    assert json.loads(embed_json([EVIL, None, 1.5])) == [EVIL, None, 1.5]
    with pytest.raises(ValueError, match="JSON"):
        embed_json([float("nan")])


def test_a_run_that_has_only_begun(tmp_path):
    page, data = write_run(tmp_path, [])
    assert page.scripts
    assert (data["curves"], data["samples"]["steps"], data["config"], data["headline"]) == ([], [], [], [])
    assert data["title"]["written"] is None
    assert data["title"]["total"] is None


def test_lines_being_written_are_ignored(tmp_path):
    write_run(tmp_path, [{"reward": 1.0}], [record(0)])
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(tmp_path / name, "a") as file:
            file.write('{"step": 1, "reward": 0.')
    data = collect(tmp_path)
    assert data["title"]["steps"] == 1
    assert [each["step"] for each in data["samples"]["steps"]] == [0]


def test_settings_alone_are_a_configuration(tmp_path):
    _, data = write_run(tmp_path, [{"reward": 1.0}], config={"seed": 1, "steps": 5})
    assert data["config"] == [["seed", "1"], ["steps", "5"]]
    assert data["title"]["total"] == 5


def test_facts_stand_in_the_environment_and_the_first_of_them_under_the_title(tmp_path):
    config = {"experiment": "grpo", "git": "abc", "jax": "0.10.2", "python": "3.11.7", "config": {"seed": 1}}
    _, data = write_run(tmp_path, [{"reward": 1.0}], config=config)
    assert data["environment"] == [["experiment", "grpo"], ["git", "abc"], ["jax", "0.10.2"], ["python", "3.11.7"]]
    assert data["title"]["facts"] == {"git": "abc", "jax": "0.10.2"}


# --------------------------------------------------------------------------------------------------- time and memory


def column(*values):
    return list(range(len(values))), list(values)


def test_the_time_of_a_run_is_that_of_its_phases_and_what_is_left():
    columns = {
        "seconds": column(10.0, 2.0, 2.0, 4.0),
        "sample_seconds": column(6.0, 1.0, 1.0, 1.0),
        "eval_seconds": ([3], [1.5]),
        "samples_seconds": column(9.0, 0.0, 9.0, 9.0),  # beside the steps
        "compile_seconds": column(7.0, 0.0, 0.0, 0.0),
    }
    time = time_breakdown(columns)
    assert (time["steps"], time["total"], time["median"], time["first"], time["compiling"]) == (4, 18.0, 3.0, 10.0, 7.0)
    assert [(phase["name"], phase["total"], phase["median"]) for phase in time["phases"]] == [
        ("sample", 3.0, 1.0),
        ("eval", 1.5, 1.5),
        ("everything else", 3.5, None),
    ]
    assert sum(phase["share"] for phase in time["phases"]) == pytest.approx(1.0)
    assert time_breakdown({"reward": column(1.0)}) is None
    only = time_breakdown({"seconds": column(10.0), "sample_seconds": column(6.0)})
    assert [(phase["name"], phase["share"]) for phase in only["phases"]] == [("sample", 0.6), ("everything else", 0.4)]


def test_memory_is_the_largest_that_was_logged():
    columns = {"peak_host_bytes": column(3e9, None, 4e9), "peak_device_bytes": column(None), "bytes": column(9.0)}
    assert peak_memory(columns) == [["host", 4e9]]


# ------------------------------------------------------------------------------------------------------------- curves


def test_thinning_keeps_every_stretch_and_its_extremes():
    values = np.sin(np.arange(100_000) / 500)
    values[[77, 41_234, 99_000]] = [40.0, -30.0, 20.0]
    steps = np.arange(100_000) * 3
    at, kept = thin(steps, values)
    assert len(kept) <= 1000
    assert np.all(np.diff(at) > 0)
    assert {0, 3 * 77, 3 * 41_234, 3 * 99_000, 3 * 99_999} <= set(at.tolist())
    np.testing.assert_array_equal(values[at // 3], kept)
    assert np.diff(at).max() <= 2 * 3 * (100_000 / 499 + 1)


@pytest.mark.parametrize("n", [0, 1, 2, 999, 1000])
def test_short_curves_are_not_thinned(n):
    at, kept = thin(np.arange(n), np.arange(n) * 1.5)
    assert at.tolist() == list(range(n))
    assert kept.tolist() == [i * 1.5 for i in range(n)]


def test_smoothing_keeps_constants_and_straight_lines_and_calms_noise():
    steps = np.arange(4000)
    np.testing.assert_allclose(smooth(steps, np.full(4000, 2.5))[1], 2.5)
    at, line = smooth(steps, steps * 2.0)
    np.testing.assert_allclose(line[40:-40], 2 * at[40:-40])  # no lag
    noise = np.random.default_rng(0).normal(size=4000)
    assert smooth(steps, noise)[1].std() < 0.2
    assert len(smooth(np.arange(5), np.arange(5.0))[0]) == 0


def test_a_curve_without_a_finite_value():
    drawn = curve("kl", [0, 1], [None, None])
    assert (drawn["values"], drawn["last"], drawn["missing"]) == ([], None, 2)
    many = curve("kl", list(range(1000)), [None] * 1000)
    assert many["missing"] == 1000
    assert len(many["nulls"]) <= 51


def test_themes_show_the_important_first():
    names = (
        "loss grad_norm reward_std reward/exact reward kl entropy clip_fraction policy_loss length "
        "eval/accuracy tokens_per_second seconds reward_seconds maze/walls odd"
    )
    themes = group_by_theme([{"name": name} for name in names.split()])
    assert [(theme["title"], [each["name"] for each in theme["series"]]) for theme in themes] == [
        ("Reward", ["eval/accuracy", "reward/exact", "reward", "reward_std"]),
        ("Policy", ["kl", "entropy", "clip_fraction"]),
        ("Completions", ["length"]),
        ("Optimization", ["loss", "policy_loss", "grad_norm"]),
        ("Speed", ["tokens_per_second", "seconds", "reward_seconds"]),
        ("maze", ["maze/walls"]),
        ("Other", ["odd"]),
    ]
    assert theme_of("loss/kl")[0] == "Optimization"


def test_headline_is_the_mean_of_both_ends(tmp_path):
    metrics = [{"reward": float(i), "kl": 1.0, "loss": 2.0} for i in range(100)]
    metrics[0]["eval/accuracy"], metrics[50]["eval/accuracy"] = 0.25, 0.75
    _, data = write_run(tmp_path, metrics)
    assert data["headline"] == [
        {"name": "eval/accuracy", "first": 0.25, "last": 0.75, "window": 1},
        {"name": "reward", "first": 2.0, "last": 97.0, "window": 5},
        {"name": "kl", "first": 1.0, "last": 1.0, "window": 5},
    ]


# -------------------------------------------------------------------------------------------------------- completions


def write_samples(path, records):
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def test_few_steps_evenly_with_both_ends(tmp_path):
    path = write_samples(tmp_path / "s.jsonl", [record(step) for step in range(0, 1000, 10)])
    found = read_samples(path, limit=12)
    steps = [each["step"] for each in found["steps"]]
    assert steps == list(range(0, 1000, 90))
    assert found["left_out"] == 88
    assert evenly_spaced([1, 2], 5) == [1, 2]


def test_whole_groups_within_the_size_and_at_least_one(tmp_path, monkeypatch):
    records = [record(0, group=g, completion="x" * 1000) for g in (5, 5, 6, 6, 7, 7)]
    path = write_samples(tmp_path / "s.jsonl", records)

    def groups(size):
        (step,) = read_samples(path, size=size)["steps"]
        return [each["group"] for each in step["records"]], step["groups_left_out"]

    assert groups(10**6) == ([5, 5, 6, 6, 7, 7], 0)
    assert groups(6000) == ([5, 5, 6, 6], 1)
    parsed = []
    loads = json.loads
    monkeypatch.setattr(samples.json, "loads", lambda text: parsed.append(text) or loads(text))
    assert groups(10) == ([5, 5], 2)
    assert len(parsed) == 2  # no more than is shown
