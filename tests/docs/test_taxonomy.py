"""docs/taxonomy.md is what would be written today. What gradients depend on is measured for a few methods here, and for
all of them by `make nightly`."""

import re

import pytest

from tests import taxonomy
from tests.algorithms.tiny import ALGORITHMS


def ratios_on_the_page() -> dict[str, str]:
    """The column `ratio`, by the names of tests/catalogue.py."""
    found = {}
    for line in taxonomy.PAGE.read_text(encoding="utf-8").splitlines():
        row = re.match(r"\| \[(\w+)\]\(../rljax/algorithms/([\w/]+)\.py\) \|", line)
        if row:
            found[f"{row[2].split('/')[-1]}.{row[1]}"] = line.split(" | ")[4]
    return found


def test_the_page_is_what_would_be_written_today():
    page = taxonomy.page(ratios_on_the_page())
    assert page == taxonomy.PAGE.read_text(encoding="utf-8"), "run: make tables (or python -m tests.taxonomy)"


@pytest.mark.parametrize(
    ("name", "want"),
    [("reinforce", "–"), ("otb", "–"), ("grpo", "token"), ("gspo", "sequence"), ("vtrace", "in the advantage")],
)
def test_what_a_gradient_depends_on(name, want):
    assert taxonomy.dependence(ALGORITHMS[name]) == want


@pytest.mark.nightly
def test_what_every_gradient_depends_on():
    assert taxonomy.measured_ratios() == ratios_on_the_page()
