"""The tables that compare the algorithms' mean gradients with the exact ones."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from experiments.tables.exact.gradients import compare_gradients, name_objective, objective_gradients
from experiments.tables.exact.language import Tree
from experiments.tables.exact.markdown import format_correlation, markdown_table
from experiments.tables.exact.problems import Problem, coin_flip
from rljax.types import Algorithm

ON_POLICY = 0  # number of the problem whose behavior policy is the policy, with normal rewards
BINARY = 1  # the same with rewards of 0 and 1
OFF_POLICY = 2  # the first of those with another behavior policy
OWN = 0  # number of the algorithm's own weighting; those of the list follow
CONSTANT = "seq_mean_token_sum_norm"  # but for its scale the same as seq_mean_token_sum
FOOTNOTES = {"MaxRL": "MaxRL[^maxrl]"}  # the notes are in page.md


@dataclasses.dataclass(frozen=True)
class Measurements:
    """moments[G][algorithm] = (mean [D W S·V], variance [D W]), by problem and weighting, in groups of G."""

    algorithms: Mapping[str, Algorithm]
    weightings: tuple[str, ...]
    tree: Tree
    problem: Problem
    binary: Problem
    kls: tuple[float, ...]  # KL(behavior ‖ policy) of the off-policy problems
    moments: Mapping[int, Mapping[str, tuple]]

    @cached_property
    def truth(self) -> dict[int, dict]:
        """Exact gradients of the objectives, by size of group."""
        return {G: objective_gradients(self.tree, self.problem, G) for G in self.moments}

    @property
    def problem_numbers(self) -> dict[float, int]:
        """By KL(behavior ‖ policy); 0 is on-policy."""
        return {0.0: ON_POLICY} | {kl: OFF_POLICY + i for i, kl in enumerate(self.kls)}

    @cached_property
    def order(self) -> list[str]:
        """Names of the algorithms: nearest to ∇J first, among equals the one of the smaller variance."""
        each = {name: compare(self, name) for name in self.algorithms}
        return sorted(each, key=lambda x: (cosine_rank(each[x]["cosine"]), round(each[x]["variance"], 9), x))


def compare(m: Measurements, name: str, G: int = 3, problem: int = ON_POLICY, weighting: int = OWN) -> dict[str, float]:
    """`compare_gradients` with ∇J, and the variance after dividing by the scale, relative to ‖∇J‖²."""
    means, variances = m.moments[G][name]
    truth = m.truth[G]["J"]
    comparison = compare_gradients(means[problem, weighting], truth)
    squared_norm = float(truth @ truth) * comparison["scale"] ** 2
    has_scale = abs(comparison["scale"]) > 1e-9
    variance = float(variances[problem, weighting]) / squared_norm if has_scale else np.nan
    return {**comparison, "variance": variance}


def objective_of(m: Measurements, name: str, G: int = 3, weighting: int = OWN, problem: int = ON_POLICY) -> str:
    return name_objective(m.moments[G][name][0][problem, weighting], m.truth[G])


def cosine_rank(cosine: float) -> float:
    """A key that sorts cosines from 1 down, NaN last; cosines that agree to 9 decimals are equal."""
    return 2.0 if np.isnan(cosine) else -round(cosine, 9)


def first_cell(name: str) -> dict[str, str]:
    return {"algorithm": FOOTNOTES.get(name, name)}


# ------------------------------------------------------------------------------------------------------------- tables


def own_objective_table(m: Measurements) -> str:
    """Whose gradient it is, under each algorithm's own weighting."""
    binary_truth = objective_gradients(m.tree, m.binary, 3)
    rows = []
    for name in m.order:
        row = first_cell(name)
        row["weighting"] = m.algorithms[name].weights.__qualname__.split(".")[0]
        for G in m.moments:
            row[f"G = {G}"] = objective_of(m, name, G)
        row["G = 3, rewards 0 or 1"] = name_objective(m.moments[3][name][0][BINARY, OWN], binary_truth)
        rows.append(row)
    return markdown_table(rows)


def objective_by_weighting_table(m: Measurements) -> str:
    """Whose gradient it is, under each weighting."""
    numbers = {weighting: i + 1 for i, weighting in enumerate(m.weightings) if weighting != CONSTANT}
    rows = []
    for name in m.order:
        row = first_cell(name)
        for weighting, number in numbers.items():
            row[weighting] = objective_of(m, name, 3, number)
        rows.append(row)
    return markdown_table(rows)


def on_policy_table(m: Measurements) -> str:
    rows = []
    for name in m.order:
        each = {G: compare(m, name, G) for G in m.moments}
        row = first_cell(name)
        row |= {f"cosine, G = {G}": format_correlation(x["cosine"]) for G, x in each.items()}
        row |= {f"scale, G = {G}": x["scale"] for G, x in each.items()}
        row["bias, G = 3"] = each[3]["bias"]
        row["bias after scaling"] = each[3]["bias after scaling"]
        row |= {f"variance, G = {G}": x["variance"] for G, x in each.items()}
        rows.append(row)
    return markdown_table(rows)


def by_weighting_table(m: Measurements) -> str:
    rows = []
    for name in m.order:
        each = {weighting: compare(m, name, weighting=i + 1) for i, weighting in enumerate(m.weightings)}
        others = {weighting: x for weighting, x in each.items() if weighting != CONSTANT}
        row = first_cell(name)
        row |= {f"cosine, {weighting}": format_correlation(x["cosine"]) for weighting, x in others.items()}
        row |= {f"scale, {weighting}": x["scale"] for weighting, x in each.items()}
        row |= {f"variance, {weighting}": x["variance"] for weighting, x in others.items()}
        rows.append(row)
    return markdown_table(rows)


def off_policy_table(m: Measurements) -> str:
    """Best at the largest KL first."""
    largest = m.kls[-1]
    rows = {}
    for name in m.order:
        each = {kl: compare(m, name, problem=number) for kl, number in m.problem_numbers.items()}
        row = first_cell(name)
        row |= {f"cosine, {kl:g} nats": format_correlation(x["cosine"]) for kl, x in each.items()}
        row |= {f"bias, {kl:g} nats": x["bias"] for kl, x in each.items()}
        row[f"scale, {largest:g} nats"] = each[largest]["scale"]
        row[f"variance, {largest:g} nats"] = each[largest]["variance"]
        rows[cosine_rank(each[largest]["cosine"]), name] = row
    return markdown_table([rows[key] for key in sorted(rows)])


def kl_regularized_table(m: Measurements) -> str:
    """What reads the reference policy, against ∇J_β."""
    truth = m.truth[3]["J_β"]
    rows = {}
    for name in m.order:
        if "ref_logp" not in m.algorithms[name].needs:
            continue
        means = m.moments[3][name][0]
        on_policy = compare_gradients(means[ON_POLICY, OWN], truth)
        row = first_cell(name)
        row["cosine to ∇J"] = format_correlation(compare(m, name)["cosine"])
        row["cosine to ∇J_β"] = format_correlation(on_policy["cosine"])
        row["scale"] = on_policy["scale"]
        row["bias"] = on_policy["bias"]
        for i, kl in enumerate(m.kls):
            off_policy = compare_gradients(means[OFF_POLICY + i, OWN], truth)
            row[f"cosine, {kl:g} nats"] = format_correlation(off_policy["cosine"])
        rows[cosine_rank(on_policy["cosine"]), name] = row
    return markdown_table([rows[key] for key in sorted(rows)])


def all_numbers(m: Measurements) -> str:
    """A table for each weighting, each in a block that opens on a click."""
    titles = ("the algorithm's own", *m.weightings)
    blocks = []
    for weighting, title in enumerate(titles):
        table = all_numbers_table(m, weighting)
        blocks.append(f"<details>\n<summary>{title}</summary>\n\n{table}\n\n</details>")
    return "\n\n".join(blocks)


def all_numbers_table(m: Measurements, weighting: int) -> str:
    rows = []
    for name in m.order:
        each = {kl: compare(m, name, problem=i, weighting=weighting) for kl, i in m.problem_numbers.items()}
        means = m.moments[3][name][0]
        row = first_cell(name)
        for kl, number in m.problem_numbers.items():
            row[f"climbs, {kl:g}"] = objective_of(m, name, 3, weighting, number)
        row |= {f"bias, {kl:g}": x["bias"] for kl, x in each.items()}
        row |= {f"∇J, {kl:g}": format_correlation(x["cosine"]) for kl, x in each.items()}
        for kl, number in m.problem_numbers.items():
            comparison = compare_gradients(means[number, weighting], m.truth[3]["J_β"])
            row[f"∇J_β, {kl:g}"] = format_correlation(comparison["cosine"])
        row |= {f"var, {kl:g}": x["variance"] for kl, x in each.items()}
        rows.append(row)
    return markdown_table(rows)


def prompts_table(tree: Tree, moments: Mapping[str, tuple], probs: tuple[float, ...]) -> str:
    """What ∇p is multiplied by on a prompt whose one-token completions are right with probability p.

    moments: algorithm -> (mean [D 1 S·V], variance), a problem for each of `probs`.
    """
    truths = [objective_gradients(tree, coin_flip(p), 2)["J"] for p in probs]
    rows = []
    for name, (means, _) in moments.items():
        row = {"algorithm": name}
        for p, mean, truth in zip(probs, means, truths, strict=True):
            row[f"p = {p}"] = compare_gradients(mean[OWN], truth)["scale"]
        rows.append(row)
    return markdown_table(rows)
