"""docs/algorithms.md, made of what it describes: python -m tests.catalogue

Docstrings give the papers, the equations and the remarks, signatures the settings, the tables of tests/test_laws.py and
tests/algorithms/test_preferences.py the laws, `pins` of the tables in tests/golden/ the recorded files. Written by hand
are SECTIONS alone: where a method stands, in words.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import statistics
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import rljax.algorithms
from rljax.types import Algorithm, Objective
from tests import test_golden, test_laws
from tests.algorithms.tiny import ALGORITHMS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "algorithms.md"
LAWS = ROOT / "tests" / "test_laws.py"
PREFERENCES = ROOT / "tests" / "algorithms" / "test_preferences.py"


class Place(NamedTuple):
    """Where a method stands."""

    policy: str  # whose answers it learns from: on, near, off, offline
    learns: str  # policy, actor-critic, supervised, preference, reward
    data: str  # besides tokens and log-probs
    constraint: str = "–"  # what keeps the policy near another one


POLICY = "policy"
CRITIC = "actor-critic"
CLIP = "clip"
OUTCOME = "rewards, groups"
OF_PAIRS = "KL to reference, implicit"
ANY = "any", "any"  # a wrapper's are those of what it wraps

SECTIONS: dict[str, dict[str, Place]] = {
    "Policy gradients and their baselines": {
        "reinforce": Place("on", POLICY, OUTCOME),
        "reinforce_to_go": Place("on", POLICY, OUTCOME),
        "rloo": Place("near", POLICY, OUTCOME, "clip, of the answer's ratio"),
        "remax": Place("on", POLICY, "rewards"),
        "reinforce_pp": Place("near", POLICY, "rewards", CLIP),
        "reinforce_pp_baseline": Place("near", POLICY, OUTCOME, CLIP),
        "opo": Place("on", POLICY, OUTCOME),
        "otb": Place("on", POLICY, OUTCOME),
        "gpg": Place("on", POLICY, OUTCOME),
        "maxrl": Place("on", POLICY, OUTCOME),
        "trpo": Place("on", POLICY, OUTCOME, "KL to old policy, of the step"),
        "a_star_po": Place("on", "policy, by regression", "rewards", "KL to reference, implicit"),
    },
    "Clipped ratios: the GRPO family": {
        "grpo": Place("near", POLICY, OUTCOME, CLIP),
        "dr_grpo": Place("near", POLICY, OUTCOME, CLIP),
        "dapo": Place("near", POLICY, OUTCOME, "clip, wider above"),
        "lite_ppo": Place("near", POLICY, OUTCOME, "clip, wider above"),
        "gdpo": Place("near", POLICY, "rewards, scores, groups", CLIP),
        "grpo_pass_at_k": Place("near", POLICY, OUTCOME, CLIP),
        "reinforce_ada": Place("near", POLICY, "rewards", "clip, wider above"),
        "gspo": Place("near", POLICY, OUTCOME, "clip, of the answer's mean ratio"),
        "gspo_token": Place("near", POLICY, OUTCOME, "clip, of the answer's mean ratio"),
        "luspo": Place("near", POLICY, OUTCOME, "clip, of the answer's mean ratio"),
    },
    "Other treatments of the ratio": {
        "cispo": Place("near", POLICY, OUTCOME, "capped ratio"),
        "sapo": Place("near", POLICY, OUTCOME, "soft gate"),
        "gmpo": Place("near", POLICY, OUTCOME, "clip, of log ratios"),
        "vespo": Place("near", POLICY, OUTCOME, "soft weight of the answer's ratio"),
        "dppo_tv": Place("near", POLICY, OUTCOME, "trust region, token by token"),
        "dppo_kl": Place("near", POLICY, OUTCOME, "trust region, token by token"),
        "dro": Place("near", POLICY, OUTCOME, "squared log ratio in loss"),
        "clip_cov": Place("near", POLICY, OUTCOME, "clip; tokens held back"),
        "kl_cov": Place("near", POLICY, OUTCOME, "log ratio in loss, on few tokens"),
        "fipo": Place("near", POLICY, OUTCOME, "clip, wider above"),
        "real": Place("near", "policy, by classification", OUTCOME),
    },
    "Critics": {
        "vpg": Place("on", CRITIC, "rewards"),
        "trpo_gae": Place("on", "policy, critic apart", "rewards", "KL to old policy, of the step"),
        "ppo": Place("near", CRITIC, "rewards", CLIP),
        "ppo_penalty": Place("near", CRITIC, "rewards", "KL to old policy in loss"),
        "vapo": Place("near", CRITIC, "rewards", "clip, wider above"),
    },
    "Credit of steps": {
        "grpo_process": Place("near", POLICY, "rewards, groups, steps", CLIP),
        "capo": Place("near", POLICY, "rewards, groups, steps", CLIP),
        "vine_ppo": Place("near", POLICY, "rewards, steps", CLIP),
    },
    "Off-policy": {
        "off_policy_pg": Place("off", POLICY, OUTCOME),
        "vtrace": Place("off", CRITIC, "rewards", "truncated ratio"),
    },
    "Wrappers: terms of the loss": {
        "with_kl": Place(*ANY, "", "KL to reference in loss"),
        "with_importance_weighted_kl": Place(*ANY, "", "KL to reference in loss"),
        "with_entropy": Place(*ANY, "", "entropy bonus"),
        "with_positive_nll": Place(*ANY, "rewards"),
    },
    "Wrappers: rewards, rows and advantages": {
        "kl_in_reward": Place(*ANY, "rewards", "KL to reference in reward"),
        "overlong_penalty": Place(*ANY, "rewards"),
        "filter_overlong": Place(*ANY, "which answers were truncated"),
        "distill": Place(*ANY, "", "KL to teacher in advantages"),
        "dynamic_sampling": Place(*ANY, OUTCOME),
        "reinforce_ada.balanced_subsample": Place(*ANY, OUTCOME),
    },
    "Wrappers: another policy sampled": {
        "truncate_is": Place("off", "any", "", "truncated ratio"),
        "mask_is": Place("off", "any", "", "masked ratio"),
        "normalized_is": Place("off", "any", "", "normalised ratio"),
        "reject": Place("off", "any", "", "rejection by divergence"),
        "off_policy_sequence_mask": Place("off", "any", "", "rejection by divergence"),
        "high_entropy_mask": Place(*ANY, "", "tokens held back"),
    },
    "Controllers of coefficients": {
        "controllers.fixed_coefficient": Place(*ANY, ""),
        "controllers.adaptive_kl": Place(*ANY, "measured KL", "KL near a target"),
        "controllers.ppo_penalty_coefficient": Place(*ANY, "measured KL", "KL near a target"),
        "controllers.adaptive_entropy": Place(*ANY, "measured entropy", "entropy above a target"),
        "controllers.applied_entropy_coefficient": Place(*ANY, "measured entropy", "entropy above a target"),
    },
    "Preferences": {
        "dpo": Place("offline", "preference", "pairs, `ref_logp`", OF_PAIRS),
        "aot": Place("offline", "preference", "pairs, `ref_logp`", OF_PAIRS),
        "aot_unpaired": Place("offline", "preference", "good and bad answers, `ref_logp`", OF_PAIRS),
        "cpo": Place("offline", "preference", "pairs", "likelihood of the chosen"),
        "simpo": Place("offline", "preference", "pairs"),
        "orpo": Place("offline", "preference", "pairs", "likelihood of the chosen"),
        "kto": Place("offline", "preference", "answers judged good or bad, `ref_logp`", OF_PAIRS),
        "bco": Place("offline", "preference", "answers judged good or bad, `ref_logp`", OF_PAIRS),
        "online_pairs": Place("on", "preference", OUTCOME, "that of its objective"),
    },
    "Reward models and supervised learning": {
        "reward_model": Place("offline", "reward", "pairs"),
        "ranked_reward_model": Place("offline", "reward", "rankings"),
        "process_reward_model": Place("offline", "reward", "labels of steps"),
        "sft": Place("offline", "supervised", "demonstrations"),
        "dft": Place("offline", "supervised", "demonstrations"),
    },
}

# Of transitions, not of trajectories: what they obey is learnt by tests/test_control.py and test_tabular_control.py.
CONTROL = {"dqn": Place("off", "action values", "transitions", "target network")}
SECTIONS["Control"] = CONTROL

# Of these the others are built: their laws are those of what is built.
BLOCKS = (
    "wrappers.with_needs",
    "wrappers.with_prepare",
    "ppo.actor_critic",
    "pairs.preference_objective",
    "pairs.unpaired_objective",
    "pairs.log_coefficients",
)

READING = """\
# Algorithms

Written by `make tables` (`python -m tests.catalogue`); do not edit. Papers, equations and remarks are the docstrings',
settings the signatures' defaults; what is tested is read from the tests; where a method stands is written by hand in
`tests/catalogue.py`. A test fails where this page is not what would be written today.

## How to read it

One row is one function; its name leads to its file, which is the whole method. A dash: nothing to say.

- **settings**: the arguments and their defaults. What a docstring says of the paper's own, and of what was left out,
  stands under the table, after the equation.
- **policy**: whose answers it learns from. *on*: only the current policy's, one update a rollout. *near*: those of the
  policy a few updates ago. *off*: those of any policy whose log-probs are known. *offline*: a data set. Everything is
  model-free: nothing learns or plans with a model of the environment.
- **learns**: a policy, a policy and its critic, a policy from preferences or demonstrations, or a reward model.
- **data**: what it needs besides tokens and log-probs. *rewards*: of whole answers, or of decisions; *groups*: several
  answers to each prompt; *steps*: their ends; *scores*: each verifier's own. In code: further fields of
  `Trajectory`, which `annotate` fills (`Algorithm.needs`), or, as `baseline` and values by Monte Carlo, the experiment.
- **constraint**: what keeps the policy near the one that sampled, or near a reference. KL terms are wrappers: any
  row takes `with_kl` or `kl_in_reward`.
- **laws**: which of the laws at the end of the page it obeys.
- **pinned by**: outputs of the peers' own code that it reproduces, value and gradient (`tests/golden/`). What each
  gradient is the gradient of is computed by enumeration in [estimators.md](estimators.md).

In the equations B rows have T decisions; m is the mask, n_i the length of answer i, N⁺ the number of answers with a
decision; ρ = π/π_old; sg stops the gradient; `low` and `high` bound the clip."""


# -------------------------------------------------------------------------------------------------- what is in the code


@lru_cache
def modules() -> dict[str, ModuleType]:
    names = [found.name for found in pkgutil.iter_modules(rljax.algorithms.__path__)]
    return {name: importlib.import_module(f"rljax.algorithms.{name}") for name in names}


@lru_cache
def functions() -> dict[str, Callable]:
    """Every public function of rljax/algorithms, by module.name."""
    return {
        f"{module}.{name}": value
        for module, found in modules().items()
        for name, value in vars(found).items()
        if inspect.isfunction(value) and value.__module__ == found.__name__ and not name.startswith("_")
    }


def full(name: str) -> str:
    """module.name of a row."""
    (found,) = [key for key in functions() if key == name or key.split(".")[1] == name] if "." not in name else [name]
    return found


def short(name: str) -> str:
    return name.split(".")[-1]


def methods() -> set[str]:
    """What must have a row: functions that return an Algorithm or an Objective."""
    return {name for name, f in functions().items() if inspect.signature(f).return_annotation in (Algorithm, Objective)}


def rows() -> dict[str, Place]:
    return {full(name): place for section in SECTIONS.values() for name, place in section.items()}


def settings(name: str) -> str:
    """Arguments and their defaults."""

    def shown(parameter):
        default = parameter.default
        if default is inspect.Parameter.empty:
            return parameter.name
        if callable(default):
            return f"{parameter.name}={default.__name__}"
        value = f"{default:g}".replace("e-0", "e-") if type(default) is float else str(default)
        return f"{parameter.name}={value}"

    return ", ".join(map(shown, inspect.signature(functions()[name]).parameters.values()))


# ----------------------------------------------------------------------------------------------------------- docstrings


def paragraphs(text: str | None) -> list[str]:
    return re.split(r"\n\s*\n", inspect.cleandoc(text or ""))


def equations(text: str | None) -> list[str]:
    """The indented blocks, by which a docstring shows equations."""
    return [part for part in paragraphs(text) if all(line.startswith("    ") for line in part.splitlines())]


def of_module(name: str) -> str:
    return modules()[name.split(".")[0]].__doc__


def papers(name: str) -> str:
    """Of the function's docstring; else of its line among the equations; else of the module's title."""
    text = of_module(name)
    lines = [line for block in equations(text) for line in block.splitlines()]
    own = [line for line in lines if line.lower().replace("-", "_").split()[0] == short(name)]
    places = [functions()[name].__doc__ or "", *own, paragraphs(text)[0]]
    found = next((ids for place in places if (ids := re.findall(r"\b\d{4}\.\d{5}\b", place))), [])
    if found:
        return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in dict.fromkeys(found))
    without_number = re.search(r"[A-Z]\w+( et al\.)? (19|20)\d\d\b|definition of [\w-]+", text)
    return without_number[0] if without_number and name in methods() else "–"


def remarks(text: str | None) -> str:
    """Sentences that say what the paper does otherwise, what it recommends, and what was left out."""
    prose = [" ".join(part.split()) for part in paragraphs(text)[1:] if part not in equations(text)]
    sentences = [sentence for part in prose for sentence in re.split(r"(?<=[.)])\s+(?=[^\W\d_a-z])", part)]
    return " ".join(x for x in sentences if re.search(r"\bpaper\b|'s code|recommend|[Ll]eft out", x))


def first_words(name: str) -> str:
    return " ".join(paragraphs(functions()[name].__doc__)[0].split())


def described(file: str, names: list[str]) -> str:
    """What a section says of the methods of one file: the module's equations, or else each function's first words."""
    text = modules()[file].__doc__
    if not equations(text) or not methods().intersection(names):
        return "\n".join(f"- **{short(name)}**: {first_words(name)}" for name in names)
    title, block = " ".join(paragraphs(text)[0].split()), "\n\n".join(map(inspect.cleandoc, equations(text)))
    notes = " ".join(filter(None, [remarks(text), *(remarks(functions()[name].__doc__) for name in names)]))
    shown = ["", "```text", *block.splitlines(), "```", *filter(None, [notes])]
    heading = f"- **{', '.join(map(short, names))}**: {title}"
    return "\n".join([heading, *(f"  {line}".rstrip() for line in shown)])


# ----------------------------------------------------------------------------------------------------------------- laws


class Law(NamedTuple):
    words: str
    key: str | None  # in test_laws.EXCEPTIONS
    only: tuple[str, ...] | None  # the only instances asked; None: all


@lru_cache
def laws(path: Path) -> list[Law]:
    """The tests of a file that run over all of its methods."""
    found = []
    for node in ast.parse(path.read_text()).body:
        for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else []:
            words, source = node.name.removeprefix("test_").replace("_", " "), ast.unparse(mark)
            if source == "EVERY":
                found.append(Law(words, None, None))
            elif source.startswith("except_for"):
                found.append(Law(words, mark.args[0].value, None))
            elif "'name', COMPARES" in source:
                found.append(Law(words, None, tuple(test_laws.COMPARES)))
    return found


@lru_cache
def instances(path: Path, *tables: str) -> dict[str, set[str]]:
    """Which methods take part in each entry of those tables, by the names in its source."""
    known = {short(name): name for name in methods()}
    tree = ast.parse(path.read_text()).body
    helpers = {node.name: node for node in tree if isinstance(node, ast.FunctionDef)}

    def named(node):
        names = {getattr(x, "attr", None) or getattr(x, "id", None) for x in ast.walk(node)}
        inside = [named(helpers[name]) for name in names & helpers.keys() if helpers[name] is not node]
        return {known[name] for name in names & known.keys()}.union(*inside)

    found = {}
    for node in tree:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in tables:
            pairs = zip(node.value.keys, node.value.values, strict=True)
            found |= {key.value: named(value) for key, value in pairs if key is not None}
    return found


def of_algorithms() -> dict[str, set[str]]:
    return instances(ROOT / "tests" / "algorithms" / "tiny.py", "ALGORITHMS")


def of_objectives() -> dict[str, set[str]]:
    return instances(PREFERENCES, "PAIRED", "CASES")


def obeyed(name: str) -> str:
    """All laws but those from which every entry with this method is excused."""
    entries = [entry for entry, used in of_algorithms().items() if name in used]
    if not entries:
        return "all" if any(name in used for used in of_objectives().values()) else "–"
    keys = [law.key for law in laws(LAWS) if law.key and all(test_laws.EXCEPTIONS[law.key].get(e) for e in entries)]
    return "all" if not keys else "all but " + ", ".join(f"*{key}*" for key in keys)


def needs(name: str) -> list[str]:
    """Fields of Trajectory that the method asks to be filled; of a wrapper those that what it wraps does not."""
    entries = of_algorithms()
    alone = {next(iter(used)): ALGORITHMS[entry].needs for entry, used in entries.items() if len(used) == 1}
    if name in alone:
        return list(alone[name])
    asked = [
        [x for x in ALGORITHMS[entry].needs if not any(x in alone.get(other, ()) for other in used)]
        for entry, used in entries.items()
        if name in used
    ]
    return [field for field in (asked[0] if asked else []) if all(field in fields for fields in asked)]


# --------------------------------------------------------------------------------------------------------- golden files


def pinned(pins: str) -> list[str]:
    """Names in a golden table's `pins`, dotted from rljax; bare ones are functions of rljax/algorithms."""
    return [part if "." in part else f"algorithms.{part}" for part in re.split(r",\s*", pins)]


def golden(name: str) -> list[str]:
    return sorted(
        file for file, entry in test_golden.TABLE.items() if f"algorithms.{short(name)}" in pinned(entry.pins)
    )


def built_on(name: str) -> list[str]:
    """Methods that this one calls, of another file."""
    function = inspect.unwrap(functions()[name])
    used = (function.__globals__.get(x) for x in function.__code__.co_names)
    found = {f"{f.__module__.split('.')[-1]}.{f.__name__}" for f in used if inspect.isfunction(f)}
    return sorted((found & rows().keys() & methods()) - {name})


# ------------------------------------------------------------------------------------------------------------- the page

HEAD = ("name", "paper", "settings", "policy", "learns", "data", "constraint", "laws", "pinned by")


def row(name: str, place: Place) -> str:
    asked = [f"`{field}`" for field in needs(name)]
    pins = ", ".join(f"`{file}`" for file in golden(name)) or "–"
    if pins == "–" and built_on(name):
        pins = "what it is built on: " + ", ".join(map(short, built_on(name)))
    cells = (
        f"[{short(name)}](../rljax/algorithms/{name.split('.')[0]}.py)",
        papers(name),
        f"`{settings(name)}`" if settings(name) else "–",
        place.policy,
        place.learns,
        ", ".join(filter(None, [place.data, *asked])) or "–",
        place.constraint,
        obeyed(name),
        pins,
    )
    return f"| {' | '.join(cells)} |"


def section(title: str, places: dict[str, Place]) -> str:
    table = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    table += [row(full(name), place) for name, place in places.items()]
    files: dict[str, list[str]] = {}
    for name in map(full, places):
        files.setdefault(name.split(".")[0], []).append(name)
    return "\n".join([f"## {title}", "", *table, "", *(described(*item) for item in files.items())])


def of_laws() -> str:
    lines = [
        "## Laws",
        "",
        "Asked of every Algorithm and wrapper above, on one rough rollout (`tests/test_laws.py`):",
        "",
    ]
    for law in laws(LAWS):
        excused: dict[str, list[str]] = {}
        for entry, why in (test_laws.EXCEPTIONS[law.key] if law.key else {}).items():
            if why:
                excused.setdefault(why, []).append(entry)
        name = f" (*{law.key}*)" if law.key else ""
        only = f" Asked of what compares answers and nothing else: {', '.join(law.only)}." if law.only else ""
        lines.append(f"- {law.words}{name}.{only}")
        lines += [f"  - not: {', '.join(entries)}; {why}" for why, entries in excused.items()]
    lines += ["", "Asked of every Objective (`tests/algorithms/test_preferences.py`):", ""]
    return "\n".join([*lines, *(f"- {law.words}." for law in laws(PREFERENCES))])


def page() -> str:
    blocks = ["## Blocks", "", "Of these the methods above are built, and yours may be:", ""]
    for name in BLOCKS:
        link = f"[{short(name)}](../rljax/algorithms/{name.split('.')[0]}.py)"
        blocks.append(f"- {link}, `{settings(name)}`: {first_words(name)}")
    parts = [READING, *(section(*item) for item in SECTIONS.items()), "\n".join(blocks), of_laws()]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    files = [path for path in (ROOT / "rljax" / "algorithms").glob("*.py") if path.name != "__init__.py"]
    lengths = sorted(len(path.read_text().splitlines()) for path in files)
    middle = statistics.median(lengths)
    print(f"{PAGE.relative_to(ROOT)}: {len(rows())} rows of {len(files)} files, median {middle:g} lines")
