"""README and docs: every command names a script that is there and flags that it has; every link leads somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from experiments.common import command_line
from experiments.common.settings import Hosts

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHARED = {*command_line.flags_of(Hosts, "--hosts."), "--tracker", "--quiet", "--help", "--debug"}


def commands(text: str) -> list[list[str]]:
    """The words of every line `python experiments/NAME.py ...`, from the script on."""
    found = re.findall(r"python3? (experiments/\w.*)", text.replace("\\\n", " "))
    return [shlex.split(re.split(r"[`;]", line)[0], comments=True) for line in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_legal(page):
    for script, *words in commands(page.read_text(encoding="utf-8")):
        assert (ROOT / script).is_file(), script
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        legal = {*command_line.flags_of(module.Config), *SHARED}
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        assert given - legal == set(), f"{page.name}: {script}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)\)", text)
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_readme_is_short_and_names_what_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"make ([a-z]+)\b(?! [a-z])", text)) - targets == set()


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {page.name for page in PAGES[1:]} - {"index.md"}
    assert pages - set(re.findall(r"\]\((\w+\.md)\)", index)) == set()


def test_every_target_is_explained_by_make_help():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z]+):(.*)", makefile, flags=re.MULTILINE)
    assert {"demo", "test", "docs", "help"} <= {name for name, _ in targets}
    assert [name for name, rest in targets if " ## " not in rest] == []
    (phony,) = re.findall(r"^\.PHONY: (.*)", makefile, flags=re.MULTILINE)
    assert sorted(phony.split()) == sorted(name for name, _ in targets)
