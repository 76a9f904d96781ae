"""Writes docs/algorithms.md from what it describes: python -m tests.catalogue

Docstrings give the papers, the equations and the remarks, signatures the settings, the tables of tests/test_laws.py and
tests/algorithms/test_preferences.py the laws, `pins` of the tables in tests/golden/ the recorded files. Only SECTIONS,
how each method is classified, is written by hand.

It stands among the tests because it reads their tables. A new algorithm is written down twice: it is imported in
rljax/algorithms/__init__.py, and has a row in SECTIONS.
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


class Classification(NamedTuple):
    """What kind of method it is."""

    samples: str  # of which policy it learns from: ON, NEAR, OFF, OFFLINE
    learns: str  # policy, actor-critic, supervised, preference, reward
    data: str  # that it needs besides tokens and log-probs
    constraint: str = "–"  # what keeps the policy near another one


ON = "on-policy"
NEAR = "near on-policy"
OFF = "off-policy"
OFFLINE = "offline"
POLICY = "policy"
CRITIC = "actor-critic"
CLIP = "clip"
CLIP_HIGHER = "clip-higher"
OUTCOME = "rewards, groups"
IMPLICIT_KL = "KL to reference, implicit"
ANY = ("any", "any")  # a wrapper's samples and learning are those of what it wraps

SECTIONS: dict[str, dict[str, Classification]] = {
    "Policy gradients and their baselines": {
        "reinforce": Classification(ON, POLICY, OUTCOME),
        "reinforce_to_go": Classification(ON, POLICY, OUTCOME),
        "rloo": Classification(NEAR, POLICY, OUTCOME, "clip, of the sequence ratio"),
        "remax": Classification(ON, POLICY, "rewards"),
        "reinforce_pp": Classification(NEAR, POLICY, "rewards", CLIP),
        "reinforce_pp_baseline": Classification(NEAR, POLICY, OUTCOME, CLIP),
        "opo": Classification(ON, POLICY, OUTCOME),
        "otb": Classification(ON, POLICY, OUTCOME),
        "gpg": Classification(ON, POLICY, OUTCOME),
        "maxrl": Classification(ON, POLICY, OUTCOME),
        "psr": Classification(ON, POLICY, "rewards"),
        "nsr": Classification(ON, POLICY, "rewards"),
        "w_reinforce": Classification(ON, POLICY, "rewards"),
        "opmd": Classification(NEAR, POLICY, OUTCOME, "squared log ratio of the sequence in loss"),
        "trpo": Classification(ON, POLICY, OUTCOME, "KL to old policy, of the step"),
        "a_star_po": Classification(ON, "policy, by regression", "rewards", IMPLICIT_KL),
    },
    "Clipped ratios: the GRPO family": {
        "grpo": Classification(NEAR, POLICY, OUTCOME, CLIP),
        "dr_grpo": Classification(NEAR, POLICY, OUTCOME, CLIP),
        "dapo": Classification(NEAR, POLICY, OUTCOME, CLIP_HIGHER),
        "lite_ppo": Classification(NEAR, POLICY, OUTCOME, CLIP_HIGHER),
        "gdpo": Classification(NEAR, POLICY, "rewards, scores, groups", CLIP),
        "grpo_pass_at_k": Classification(NEAR, POLICY, OUTCOME, CLIP),
        "pass_at_k_training": Classification(NEAR, POLICY, OUTCOME, CLIP),
        "reinforce_ada": Classification(NEAR, POLICY, "rewards", CLIP_HIGHER),
        "gspo": Classification(NEAR, POLICY, OUTCOME, "clip, of the sequence's geometric mean ratio"),
        "gspo_token": Classification(NEAR, POLICY, OUTCOME, "clip, of the sequence's geometric mean ratio"),
        "luspo": Classification(NEAR, POLICY, OUTCOME, "clip, of the sequence's geometric mean ratio"),
    },
    "Other treatments of the ratio": {
        "cispo": Classification(NEAR, POLICY, OUTCOME, "capped ratio"),
        "sapo": Classification(NEAR, POLICY, OUTCOME, "soft gate"),
        "gmpo": Classification(NEAR, POLICY, OUTCOME, "clip, of log ratios"),
        "vespo": Classification(NEAR, POLICY, OUTCOME, "soft weight of the sequence ratio"),
        "dppo_tv": Classification(NEAR, POLICY, OUTCOME, "trust region, token by token"),
        "dppo_kl": Classification(NEAR, POLICY, OUTCOME, "trust region, token by token"),
        "dro": Classification(NEAR, POLICY, OUTCOME, "squared log ratio in loss"),
        "clip_cov": Classification(NEAR, POLICY, OUTCOME, "clip; some tokens left out"),
        "kl_cov": Classification(NEAR, POLICY, OUTCOME, "log ratio in loss, on few tokens"),
        "fipo": Classification(NEAR, POLICY, OUTCOME, CLIP_HIGHER),
        "real": Classification(NEAR, "policy, by classification", OUTCOME),
    },
    "Critics": {
        "vpg": Classification(ON, CRITIC, "rewards"),
        "trpo_gae": Classification(ON, "policy, separate critic", "rewards", "KL to old policy, of the step"),
        "ppo": Classification(NEAR, CRITIC, "rewards", CLIP),
        "ppo_penalty": Classification(NEAR, CRITIC, "rewards", "KL to old policy in loss"),
        "vapo": Classification(NEAR, CRITIC, "rewards", CLIP_HIGHER),
    },
    "Credit of steps": {
        "grpo_process": Classification(NEAR, POLICY, "rewards, groups, steps", CLIP),
        "capo": Classification(NEAR, POLICY, "rewards, groups, steps", CLIP),
        "vine_ppo": Classification(NEAR, POLICY, "rewards, steps", CLIP),
        "prime": Classification(NEAR, POLICY, OUTCOME, CLIP),
    },
    "Off-policy": {
        "off_policy_pg": Classification(OFF, POLICY, OUTCOME),
        "vtrace": Classification(OFF, CRITIC, "rewards", "truncated ratio"),
        "topr": Classification(OFF, POLICY, "rewards", "truncated ratio, of bad completions"),
    },
    "Wrappers: terms of the loss": {
        "with_kl": Classification(*ANY, "", "KL to reference in loss"),
        "with_importance_weighted_kl": Classification(*ANY, "", "KL to reference in loss"),
        "with_entropy": Classification(*ANY, "", "entropy bonus"),
        "with_positive_nll": Classification(*ANY, "rewards"),
    },
    "Wrappers: credit of turns": {
        "turn_level": Classification(*ANY, "rewards, steps"),
        "turn_groups": Classification(*ANY, "rewards, groups, steps"),
    },
    "Wrappers: rewards, rows and advantages": {
        "kl_in_reward": Classification(*ANY, "rewards", "KL to reference in reward"),
        "missing_eos_penalty": Classification(*ANY, "rewards, which completions terminated"),
        "clip_reward": Classification(*ANY, "rewards"),
        "whiten_rewards": Classification(*ANY, "rewards"),
        "overlong_penalty": Classification(*ANY, "rewards"),
        "lcpo_exact": Classification(*ANY, "rewards"),
        "lcpo_max": Classification(*ANY, "rewards"),
        "group_length_reward": Classification(*ANY, OUTCOME),
        "cosine_length_reward": Classification(*ANY, "rewards"),
        "filter_overlong": Classification(*ANY, "which completions were truncated"),
        "distill": Classification(*ANY, "", "KL to teacher in advantages"),
        "dynamic_sampling": Classification(*ANY, OUTCOME),
        "dynamic_sampling.filter_groups": Classification(*ANY, OUTCOME),
        "reinforce_ada.balanced_subsample": Classification(*ANY, OUTCOME),
    },
    "Wrappers: another policy sampled": {
        "truncate_is": Classification(OFF, "any", "", "truncated ratio"),
        "mask_is": Classification(OFF, "any", "", "masked ratio"),
        "normalized_is": Classification(OFF, "any", "", "normalized ratio"),
        "reject": Classification(OFF, "any", "", "rejection by divergence"),
        "staleness_filter": Classification(OFF, "any", "versions", "rejection by age"),
        "off_policy_sequence_mask": Classification(OFF, "any", "", "rejection by divergence"),
        "high_entropy_mask": Classification(*ANY, "", "some tokens left out"),
    },
    "Controllers of coefficients": {
        "controllers.fixed_coefficient": Classification(*ANY, ""),
        "controllers.adaptive_kl": Classification(*ANY, "measured KL", "KL near a target"),
        "controllers.ppo_penalty_coefficient": Classification(*ANY, "measured KL", "KL near a target"),
        "controllers.adaptive_entropy": Classification(*ANY, "measured entropy", "entropy above a target"),
        "controllers.applied_entropy_coefficient": Classification(*ANY, "measured entropy", "entropy above a target"),
    },
    "Preferences": {
        "dpo": Classification(OFFLINE, "preference", "pairs, `ref_logp`", IMPLICIT_KL),
        "aot": Classification(OFFLINE, "preference", "pairs, `ref_logp`", IMPLICIT_KL),
        "aot_unpaired": Classification(
            OFFLINE, "preference", "desirable and undesirable completions, `ref_logp`", IMPLICIT_KL
        ),
        "cpo": Classification(OFFLINE, "preference", "pairs", "NLL of the chosen"),
        "simpo": Classification(OFFLINE, "preference", "pairs"),
        "orpo": Classification(OFFLINE, "preference", "pairs", "NLL of the chosen"),
        "dpop": Classification(OFFLINE, "preference", "pairs, `ref_logp`", IMPLICIT_KL),
        "odpo": Classification(OFFLINE, "preference", "pairs with margins, `ref_logp`", IMPLICIT_KL),
        "step_dpo": Classification(OFFLINE, "preference", "pairs, steps, `ref_logp`", IMPLICIT_KL),
        "tpo": Classification(OFFLINE, "preference", "pairs, gold completions", "NLL of the gold ones"),
        "tpo_l": Classification(OFFLINE, "preference", "pairs, gold completions", "NLL of the gold ones"),
        "xpo": Classification(ON, "preference", "pairs with the reference's completions, `ref_logp`", IMPLICIT_KL),
        "nash_md": Classification(ON, POLICY, "rewards", "KL to reference in loss"),
        "kto": Classification(OFFLINE, "preference", "desirable and undesirable completions, `ref_logp`", IMPLICIT_KL),
        "bco": Classification(OFFLINE, "preference", "desirable and undesirable completions, `ref_logp`", IMPLICIT_KL),
        "online_pairs": Classification(ON, "preference", OUTCOME, "that of its objective"),
        "xpo_pairs": Classification(ON, "preference", "rewards", "that of its objective"),
        "preference_over": Classification(ON, "preference", "rewards"),
    },
    "Distillation": {
        "gkd": Classification("any", "supervised", "a teacher"),
        "minillm": Classification(NEAR, POLICY, "a teacher", "KL to teacher in loss"),
        "sdft": Classification(ON, "supervised", "demonstrations, for the teacher only"),
        "sdpo": Classification(NEAR, "supervised", "feedback, for the teacher only", "truncated ratio"),
    },
    "Reward models and supervised learning": {
        "reward_model": Classification(OFFLINE, "reward", "pairs"),
        "ranked_reward_model": Classification(OFFLINE, "reward", "rankings"),
        "process_reward_model": Classification(OFFLINE, "reward", "labels of steps"),
        "implicit_prm": Classification(OFFLINE, "reward", "desirable and undesirable completions, `ref_logp`"),
        "raft": Classification(ON, "supervised, by selection", OUTCOME),
        "rft": Classification(ON, "supervised, by selection", "rewards"),
        "sft": Classification(OFFLINE, "supervised", "demonstrations"),
        "dft": Classification(OFFLINE, "supervised", "demonstrations"),
    },
}

# Their batches are transitions, not trajectories: tests/test_control.py and test_tabular_control.py test them.
CONTROL = {"dqn": Classification(OFF, "action values", "transitions", "target network")}
SECTIONS["Control"] = CONTROL

# The others are built from these. The laws are tested on what is built.
BLOCKS = (
    "wrappers.with_needs",
    "wrappers.with_prepare",
    "reward_shaping.with_rewards",
    "ppo.actor_critic",
    "pairs.preference_objective",
    "pairs.unpaired_objective",
    "pairs.log_coefficients",
    "tpo.with_gold_nll",
    "sdft.with_required_view",
    "distillation.distillation_objective",
)

INTRODUCTION = """\
# Algorithms

Written by `make tables` (`python -m tests.catalogue`); do not edit. Papers, equations and remarks come from the
docstrings, settings from the signatures, laws and recorded outputs from the tests; the classification is written by
hand in `tests/catalogue.py`. A test fails where this page is not what would be written today.

## How to read it

One row is one function. Its name leads to its file, which is the whole method. A dash: nothing to say.

- **settings**: the arguments and their defaults. Where the paper's own differ, and what was left out, is said under the
  table, after the equation.
- **samples**: of which policy it learns from. *on-policy*: the current one, one update a rollout. *near on-policy*: the
  policy a few updates ago. *off-policy*: any policy whose log-probs are known. *offline*: a data set. Every row is
  model-free: nothing learns or plans with a model of the environment.
- **learns**: a policy, a policy and its critic, a policy from preferences or demonstrations, or a reward model.
- **data**: what it needs besides tokens and log-probs. *rewards*: of completions, or of tokens; *groups*: several
  completions of each prompt; *steps*: where they end; *scores*: each verifier's own. In code: further fields of
  `Trajectory`, which `annotate` fills (`Algorithm.needs`), or, as `baseline` and values by Monte Carlo, the experiment.
- **constraint**: what keeps the policy near the one that sampled, or near a reference. KL terms are wrappers: any
  row can be used with `with_kl` or `kl_in_reward`.
- **laws**: which of the laws at the end of the page it obeys.
- **pinned by**: outputs of the peers' own code that it reproduces, value and gradient (`tests/golden/`). What objective
  each gradient belongs to is computed by enumeration in [estimators.md](estimators.md).

In the equations B rows have T decisions; m is the mask, n_i the length of completion i, N⁺ the number of completions
with a decision; ρ = π/π_old; sg stops the gradient; `low` and `high` bound the clip."""


# -------------------------------------------------------------------------------------------------- what is in the code


@lru_cache
def modules() -> dict[str, ModuleType]:
    found = pkgutil.walk_packages(rljax.algorithms.__path__, "rljax.algorithms.")
    names = [module.name for module in found if not module.ispkg]
    return {name.split(".")[-1]: importlib.import_module(name) for name in names}


@lru_cache
def functions() -> dict[str, Callable]:
    """Every public function of rljax/algorithms, by module.name."""
    return {
        f"{module}.{name}": value
        for module, found in modules().items()
        for name, value in vars(found).items()
        if inspect.isfunction(value) and value.__module__ == found.__name__ and not name.startswith("_")
    }


def qualified_name(name: str) -> str:
    """module.name of a row."""
    if "." in name:
        return name
    (found,) = [key for key in functions() if base_name(key) == name]
    return found


def base_name(name: str) -> str:
    return name.split(".")[-1]


def import_name(name: str) -> str:
    """Where module.name stands, from rljax down: algorithms.grpo.grpo."""
    return f"{modules()[name.split('.')[0]].__name__}.{base_name(name)}".removeprefix("rljax.")


def link(name: str) -> str:
    """The name, leading to its file."""
    module = import_name(name).rpartition(".")[0]
    return f"[{base_name(name)}](../rljax/{module.replace('.', '/')}.py)"


def methods() -> set[str]:
    """What must have a row: functions that return an Algorithm or an Objective."""
    return {name for name, f in functions().items() if inspect.signature(f).return_annotation in (Algorithm, Objective)}


def rows() -> dict[str, Classification]:
    return {qualified_name(name): kind for section in SECTIONS.values() for name, kind in section.items()}


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


def module_docstring(name: str) -> str:
    return modules()[name.split(".")[0]].__doc__


def paper_links(name: str) -> str:
    """Of the function's docstring; else of its line among the equations; else of the module's title."""
    text = module_docstring(name)
    lines = [line for block in equations(text) for line in block.splitlines()]
    own = [line for line in lines if line.lower().replace("-", "_").split()[0] == base_name(name)]
    for source in (functions()[name].__doc__ or "", *own, paragraphs(text)[0]):
        numbers = re.findall(r"\b\d{4}\.\d{5}\b", source)
        if numbers:
            return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in dict.fromkeys(numbers))
    without_number = re.search(r"[A-Z]\w+( et al\.)? (19|20)\d\d\b|definition of [\w-]+", text)
    return without_number[0] if without_number and name in methods() else "–"


def remarks(text: str | None) -> str:
    """Sentences that say what the paper does otherwise, what it recommends, and what was left out."""
    prose = [" ".join(part.split()) for part in paragraphs(text)[1:] if part not in equations(text)]
    sentences = [sentence for part in prose for sentence in re.split(r"(?<=[.)])\s+(?=[^\W\d_a-z])", part)]
    return " ".join(x for x in sentences if re.search(r"\bpaper\b|'s code|recommend|[Ll]eft out", x))


def summary(name: str) -> str:
    return " ".join(paragraphs(functions()[name].__doc__)[0].split())


def description(file: str, names: list[str]) -> str:
    """What a section says of the methods of one file: the module's equations, or else each function's first words."""
    text = modules()[file].__doc__
    if not equations(text) or not methods().intersection(names):
        return "\n".join(f"- **{base_name(name)}**: {summary(name)}" for name in names)
    title = " ".join(paragraphs(text)[0].split())
    block = "\n\n".join(map(inspect.cleandoc, equations(text)))
    notes = " ".join(filter(None, [remarks(text), *(remarks(functions()[name].__doc__) for name in names)]))
    shown = ["", "```text", *block.splitlines(), "```", *filter(None, [notes])]
    heading = f"- **{', '.join(map(base_name, names))}**: {title}"
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
            words = node.name.removeprefix("test_").replace("_", " ")
            source = ast.unparse(mark)
            if source in ("EVERY", "EVERY_AT_NIGHT"):
                found.append(Law(words, None, None))
            elif source.startswith("except_for"):
                found.append(Law(words, mark.args[0].value, None))
            elif "'name', COMPARES" in source:
                found.append(Law(words, None, tuple(test_laws.COMPARES)))
    return found


@lru_cache
def methods_by_entry(path: Path, *tables: str) -> dict[str, set[str]]:
    """Which methods take part in each entry of those tables, by the names in its source."""
    known = {base_name(name): name for name in methods()}
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


def methods_in_algorithms() -> dict[str, set[str]]:
    """For each entry of ALGORITHMS; those that are added with their defaults are named after their method."""
    written = methods_by_entry(ROOT / "tests" / "algorithms" / "tiny.py", "LISTED")
    return {entry: written.get(entry) or {qualified_name(entry)} for entry in ALGORITHMS}


def methods_in_objectives() -> dict[str, set[str]]:
    return methods_by_entry(PREFERENCES, "PAIRED", "CASES")


def laws_obeyed(name: str) -> str:
    """All laws but those that every entry with this method is excepted from."""
    entries = [entry for entry, used in methods_in_algorithms().items() if name in used]
    if not entries:
        return "all" if any(name in used for used in methods_in_objectives().values()) else "–"
    keys = [law.key for law in laws(LAWS) if law.key and all(test_laws.EXCEPTIONS[law.key].get(e) for e in entries)]
    return "all" if not keys else "all but " + ", ".join(f"*{key}*" for key in keys)


def needs(name: str) -> list[str]:
    """Fields of Trajectory that the method asks to be filled; of a wrapper those that what it wraps does not."""
    entries = methods_in_algorithms()
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


def golden_files(name: str) -> list[str]:
    return sorted(
        file for file, entry in test_golden.TABLE.items() if f"algorithms.{base_name(name)}" in pinned(entry.pins)
    )


def built_on(name: str) -> list[str]:
    """Methods that this one calls, of another file."""
    function = inspect.unwrap(functions()[name])
    used = (function.__globals__.get(x) for x in function.__code__.co_names)
    found = {f"{f.__module__.split('.')[-1]}.{f.__name__}" for f in used if inspect.isfunction(f)}
    return sorted((found & rows().keys() & methods()) - {name})


# ------------------------------------------------------------------------------------------------------------- the page

HEAD = ("name", "paper", "settings", "samples", "learns", "data", "constraint", "laws", "pinned by")


def row(name: str, kind: Classification) -> str:
    asked = [f"`{field}`" for field in needs(name)]
    pins = ", ".join(f"`{file}`" for file in golden_files(name)) or "–"
    if pins == "–" and built_on(name):
        pins = "what it is built on: " + ", ".join(map(base_name, built_on(name)))
    cells = (
        link(name),
        paper_links(name),
        f"`{settings(name)}`" if settings(name) else "–",
        kind.samples,
        kind.learns,
        ", ".join(filter(None, [kind.data, *asked])) or "–",
        kind.constraint,
        laws_obeyed(name),
        pins,
    )
    return f"| {' | '.join(cells)} |"


def section(title: str, kinds: dict[str, Classification]) -> str:
    table = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    table += [row(qualified_name(name), kind) for name, kind in kinds.items()]
    files: dict[str, list[str]] = {}
    for name in map(qualified_name, kinds):
        files.setdefault(name.split(".")[0], []).append(name)
    return "\n".join([f"## {title}", "", *table, "", *(description(*item) for item in files.items())])


def laws_section() -> str:
    lines = [
        "## Laws",
        "",
        "Tested on every Algorithm and wrapper above, on one rollout with every irregularity (`tests/test_laws.py`):",
        "",
    ]
    for law in laws(LAWS):
        excepted: dict[str, list[str]] = {}
        for entry, why in (test_laws.EXCEPTIONS[law.key] if law.key else {}).items():
            if why:
                excepted.setdefault(why, []).append(entry)
        name = f" (*{law.key}*)" if law.key else ""
        only = f" Tested on what compares completions and nothing else: {', '.join(law.only)}." if law.only else ""
        lines.append(f"- {law.words}{name}.{only}")
        lines += [f"  - not: {', '.join(entries)}; {why}" for why, entries in excepted.items()]
    lines += ["", "Tested on every Objective (`tests/algorithms/test_preferences.py`):", ""]
    return "\n".join([*lines, *(f"- {law.words}." for law in laws(PREFERENCES))])


def page() -> str:
    blocks = ["## Blocks", "", "What the methods above are built from, and yours may be:", ""]
    for name in BLOCKS:
        blocks.append(f"- {link(name)}, `{settings(name)}`: {summary(name)}")
    parts = [INTRODUCTION, *(section(*item) for item in SECTIONS.items()), "\n".join(blocks), laws_section()]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    files = [path for path in (ROOT / "rljax" / "algorithms").glob("**/*.py") if path.name != "__init__.py"]
    lengths = sorted(len(path.read_text().splitlines()) for path in files)
    middle = statistics.median(lengths)
    print(f"{PAGE.relative_to(ROOT)}: {len(rows())} rows of {len(files)} files, median {middle:g} lines")
