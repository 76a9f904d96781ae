"""The tables of algorithms: what their gradients are, against the exact ones."""

import dataclasses
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from exact.gradients import compare, name_of, objectives
from exact.language import Tree
from exact.tables import closeness, markdown
from exact.worlds import World
from rljax.types import Algorithm

ON_POLICY, BINARY, OFF = 0, 1, 2  # places; OFF and after: behaviour policies further and further away
OWN = 0  # the algorithm's own weighting; those of the list follow
CONSTANT = "seq_mean_token_sum_norm"  # but for its scale the same as seq_mean_token_sum
FOOTNOTES = {"MaxRL": "MaxRL[^maxrl]"}  # page.md says what holds of these


def against(mean, variance, truth) -> dict[str, float]:
    """`compare`, and the variance after dividing by the scale, relative to the squared norm of the truth."""
    out = compare(mean, truth)
    size = float(truth @ truth) * out["scale"] ** 2
    return {**out, "variance": float(variance) / size if abs(out["scale"]) > 1e-9 else np.nan}


def nearest(cosine: float) -> float:
    """A key that sorts cosines from 1 down, without a direction last, and equal ones as equal."""
    return 2.0 if np.isnan(cosine) else -round(cosine, 9)


def label(name: str) -> dict[str, str]:
    """The first cell of a row."""
    return {"algorithm": FOOTNOTES.get(name, name)}


@dataclasses.dataclass(frozen=True)
class Measured:
    """found[G][algorithm] = (mean [D W S·V], variance [D W]): by place and weighting."""

    algorithms: Mapping[str, Algorithm]
    weightings: tuple[str, ...]
    lm: Tree
    world: World
    binary: World
    distances: tuple[float, ...]
    found: Mapping[int, Mapping]

    @cached_property
    def truth(self) -> dict:
        return {G: objectives(self.lm, self.world, G) for G in self.found}

    def one(self, name: str, G: int = 3, place: int = ON_POLICY, weighting: int = OWN) -> dict[str, float]:
        mean, variance = self.found[G][name]
        return against(mean[place, weighting], variance[place, weighting], self.truth[G]["J"])

    def said(self, name: str, G: int = 3, weighting: int = OWN, place: int = ON_POLICY) -> str:
        return name_of(self.found[G][name][0][place, weighting], self.truth[G])

    @property
    def places(self) -> dict[float, int]:
        """By distance, 0 for on-policy."""
        return {0.0: ON_POLICY} | {d: OFF + i for i, d in enumerate(self.distances)}

    @cached_property
    def order(self) -> list[str]:
        """Nearest to ∇J first, the quieter one of equals."""
        each = {name: self.one(name) for name in self.algorithms}
        return sorted(each, key=lambda x: (nearest(each[x]["cosine"]), round(each[x]["variance"], 9), x))

    def own_objective(self) -> str:
        right, rows = objectives(self.lm, self.binary, 3), []
        for name in self.order:
            row = label(name) | {"weighting": self.algorithms[name].weights.__qualname__.split(".")[0]}
            row |= {f"G = {G}": self.said(name, G) for G in self.found}
            rows.append(row | {"G = 3, rewards 0 or 1": name_of(self.found[3][name][0][BINARY, OWN], right)})
        return markdown(rows)

    def objective_by_weighting(self) -> str:
        where = {w: i + 1 for i, w in enumerate(self.weightings) if w != CONSTANT}
        return markdown([label(x) | {w: self.said(x, 3, i) for w, i in where.items()} for x in self.order])

    def on_policy(self) -> str:
        rows = []
        for name in self.order:
            each = {G: self.one(name, G) for G in self.found}
            row = label(name) | {f"cosine, G = {G}": closeness(x["cosine"]) for G, x in each.items()}
            row |= {f"scale, G = {G}": x["scale"] for G, x in each.items()}
            row |= {"bias, G = 3": each[3]["bias"], "bias after scaling": each[3]["rest"]}
            rows.append(row | {f"variance, G = {G}": x["variance"] for G, x in each.items()})
        return markdown(rows)

    def by_weighting(self) -> str:
        rows = []
        for name in self.order:
            each = {w: self.one(name, weighting=i + 1) for i, w in enumerate(self.weightings)}
            others = {w: x for w, x in each.items() if w != CONSTANT}
            row = label(name) | {f"cosine, {w}": closeness(x["cosine"]) for w, x in others.items()}
            row |= {f"scale, {w}": x["scale"] for w, x in each.items()}
            rows.append(row | {f"variance, {w}": x["variance"] for w, x in others.items()})
        return markdown(rows)

    def off_policy(self) -> str:
        rows = {}
        for name in self.order:
            each = {d: self.one(name, place=p) for d, p in self.places.items()}
            last = f"{self.distances[-1]:g} nats"
            row = label(name) | {f"cosine, {d:g} nats": closeness(x["cosine"]) for d, x in each.items()}
            row |= {f"bias, {d:g} nats": x["bias"] for d, x in each.items()}
            far = each[self.distances[-1]]
            row |= {f"scale, {last}": far["scale"], f"variance, {last}": far["variance"]}
            rows[nearest(far["cosine"]), name] = row
        return markdown([rows[key] for key in sorted(rows)])

    def regularised(self) -> str:
        rows = {}
        for name in (x for x in self.order if "ref_logp" in self.algorithms[x].needs):
            mean = self.found[3][name][0]
            near, *far = (compare(mean[p, OWN], self.truth[3]["J_β"]) for p in (ON_POLICY, *range(OFF, len(mean))))
            row = label(name) | {"cosine to ∇J": closeness(self.one(name)["cosine"])}
            row |= {"cosine to ∇J_β": closeness(near["cosine"]), "scale": near["scale"], "bias": near["bias"]}
            row |= {f"cosine, {d:g} nats": closeness(x["cosine"]) for d, x in zip(self.distances, far, strict=True)}
            rows[nearest(near["cosine"]), name] = row
        return markdown([rows[key] for key in sorted(rows)])

    def everything(self) -> str:
        """A table a weighting, each in a block that opens on a click."""
        titles = ("the algorithm's own", *self.weightings)
        tables = (f"<summary>{title}</summary>\n\n{self.numbers(i)}" for i, title in enumerate(titles))
        return "\n\n".join(f"<details>\n{table}\n\n</details>" for table in tables)

    def numbers(self, weighting: int) -> str:
        rows = []
        for name in self.order:
            each = {d: self.one(name, place=p, weighting=weighting) for d, p in self.places.items()}
            mean, beta = self.found[3][name][0], self.truth[3]["J_β"]
            row = label(name) | {f"climbs, {d:g}": self.said(name, 3, weighting, p) for d, p in self.places.items()}
            row |= {f"bias, {d:g}": x["bias"] for d, x in each.items()}
            row |= {f"∇J, {d:g}": closeness(x["cosine"]) for d, x in each.items()}
            near = {d: compare(mean[p, weighting], beta)["cosine"] for d, p in self.places.items()}
            row |= {f"∇J_β, {d:g}": closeness(x) for d, x in near.items()}
            rows.append(row | {f"var, {d:g}": x["variance"] for d, x in each.items()})
        return markdown(rows)
