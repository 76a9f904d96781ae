"""docs/troubleshooting.md: what it says that the code says is said by the code, and a message leads to its entry."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments import grpo
from experiments.common.settings import Batches
from experiments.common.verifiers import check_answers
from rljax.data.files import read_table
from rljax.models import hf
from rljax.rewards.number import exact_number
from rljax.rewards.pool import Pool
from rljax.train.run import Run
from rljax.types import TrainState
from tests.docs.sources import strings

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"


def entries() -> list[str]:
    """The texts of the page's tables that are ours, in their order."""
    ours, _, _ = PAGE.read_text(encoding="utf-8").partition("## Not ours")
    return [line.split("`")[1] for line in ours.splitlines() if line.startswith("| `")]


def pattern(entry: str) -> re.Pattern:
    """A text with `...` for what differs, as a regular expression."""
    return re.compile(".*".join(re.escape(part) for part in entry.split("...")), flags=re.DOTALL)


def is_said(entry: str) -> bool:
    """Whether the fixed parts stand in one string of the code, in this order; a hole is no fixed part."""
    parts = [part.strip() for part in entry.split("...") if part.strip(" ;:,(.)")]
    in_order = re.compile(".*".join(map(re.escape, parts)))
    return any(in_order.search(text) for text in strings() if parts[0] in text)


def test_every_text_stands_in_the_code():
    assert len(entries()) > 60
    assert [entry for entry in entries()[len(PROVOKED) :] if not is_said(entry)] == []


def test_a_text_that_nobody_says_is_found():
    assert is_said("... holds a run with other settings: ...")
    assert not is_said("... holds a run with the same settings: ...")
    assert not is_said("other settings: ... holds a run with")


# --------------------------------------------------------------------------------------- the five that stand first


def sizes_do_not_divide(folder):
    grpo.main(grpo.Config(model="none", prompts="none", batches=Batches(prompts=8, minibatches=3)))


def other_settings(folder):
    for rate in (0.1, 0.2):
        with Run(folder / "run", {"learning_rate": rate}, steps=1):
            pass


def unknown_family(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    hf.read_config(folder)


def rows_cannot_be_judged(folder):
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "1+1?", "answer": "two"}))
    with Pool(1, 5.0) as pool:
        check_answers(read_table(folder / "rows.jsonl"), {"number": exact_number}, pool)


def loss_is_not_finite(folder):
    state = TrainState(0, {"w": jnp.zeros(2)}, (), jax.random.key(0))
    with Run(folder / "run", {}, steps=1) as run:
        state = run.restore(state)
        run.record(0, state.replace(step=1), {"loss": jnp.nan})


PROVOKED = [sizes_do_not_divide, other_settings, unknown_family, rows_cannot_be_judged, loss_is_not_finite]


@pytest.mark.parametrize("number", range(len(PROVOKED)), ids=lambda number: PROVOKED[number].__name__)
def test_what_is_raised_leads_to_its_entry(number, tmp_path):
    with pytest.raises((ValueError, FloatingPointError)) as raised:
        PROVOKED[number](tmp_path)
    found = [entry for entry in entries() if pattern(entry).search(str(raised.value))]
    assert found[:1] == entries()[number : number + 1], str(raised.value)
