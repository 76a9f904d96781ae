"""docs/coming_from.md: what it calls ours is there, and the peers' names stand in tests/docs/peer_flags.txt."""

import importlib
import inspect
import re
from pathlib import Path

import rljax
from experiments import agent_grpo, dpo, grpo, ppo, sft
from experiments.common import command_line
from experiments.common.settings import Hosts

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
PEERS = ("TRL", "verl", "OpenRLHF", "Tunix")
SCRIPTS = (grpo, ppo, sft, dpo, agent_grpo)


def tables() -> list[dict[str, str]]:
    """Each row of the page as {column: text}."""
    rows = []
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| "):
            continue
        if cells[0] == "rljax":
            head = cells
        else:
            rows.append(dict(zip(head, cells, strict=True)))
    return rows


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def recorded() -> dict[str, set[str]]:
    """The peers' names as they were found in their sources."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "tests" / "docs" / "peer_flags.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            found[line.strip("[]")] = peer = set()
        elif line and not line.startswith("#"):
            peer.add(line)
    return found


def flags() -> set[str]:
    of_scripts = [flag for script in SCRIPTS for flag in command_line.flags_of(script.Config)]
    return {*of_scripts, *command_line.flags_of(Hosts, "--hosts."), "--tracker"}


def check_call(text: str) -> None:
    """`grpo(low, high)`: a function of rljax, and its arguments."""
    name, arguments = re.fullmatch(r"([\w.]+)\(([\w, ]*)\)", text).groups()
    module, _, attribute = name.rpartition(".")
    function = getattr(importlib.import_module(f"rljax.ops.{module}") if module else rljax, attribute)
    missing = {x for x in re.split(r",\s*", arguments) if x} - inspect.signature(function).parameters.keys()
    assert not missing, f"{text}: {name} takes {', '.join(inspect.signature(function).parameters)}"


def test_what_is_ours_is_there():
    legal = flags()
    checked = 0
    for row in tables():
        block = ""
        for name in names(row["rljax"]):
            checked += 1
            if name.startswith("--"):
                assert name in legal, name
                block = name.rpartition(".")[0]
            elif "(" in name:
                check_call(name)
            elif "." in name:
                importlib.import_module(f"rljax.{name}")
            elif block:
                assert f"{block}.{name}" in legal, f"{block}.{name}"
    assert checked > 60


def test_a_metric_of_ours_is_explained():
    metrics = [row for row in tables() if "Tunix" not in row]
    explained = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert len(metrics) >= 5
    assert [row["rljax"] for row in metrics if row["rljax"] not in explained] == []


def test_the_peers_names_are_the_recorded_ones():
    known = recorded()
    for peer in PEERS:
        used = {name for row in tables() for name in names(row.get(peer, ""))}
        assert used - known[peer] == set(), f"{peer}: not recorded"
        assert known[peer] - used == set(), f"{peer}: recorded, and not on the page"
