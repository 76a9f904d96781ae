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
CONSTANT = "constant_length"  # but for its scale the same as sequence_sum


def against(mean, variance, truth) -> dict[str, float]:
    """`compare`, and the variance after dividing by the scale, relative to the squared norm of the truth."""
    out = compare(mean, truth)
    size = float(truth @ truth) * out["scale"] ** 2
    return {**out, "variance": float(variance) / size if abs(out["scale"]) > 1e-9 else np.nan}


def nearest(cosine: float) -> float:
    """A key that sorts cosines from 1 down, without a direction last, and equal ones as equal."""
    return 2.0 if np.isnan(cosine) else -round(cosine, 9)


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

    def said(self, name: str, G: int = 3, weighting: int = OWN) -> str:
        return name_of(self.found[G][name][0][ON_POLICY, weighting], self.truth[G])

    @cached_property
    def order(self) -> list[str]:
        """Nearest to ∇J first, the quieter one of equals."""
        each = {name: self.one(name) for name in self.algorithms}
        return sorted(each, key=lambda x: (nearest(each[x]["cosine"]), round(each[x]["variance"], 9), x))

    def own_objective(self) -> str:
        right, rows = objectives(self.lm, self.binary, 3), []
        for name in self.order:
            row = {"algorithm": name, "weighting": self.algorithms[name].weights.__qualname__.split(".")[0]}
            row |= {f"G = {G}": self.said(name, G) for G in self.found}
            rows.append(row | {"G = 3, rewards 0 or 1": name_of(self.found[3][name][0][BINARY, OWN], right)})
        return markdown(rows)

    def objective_by_weighting(self) -> str:
        where = {w: i + 1 for i, w in enumerate(self.weightings) if w != CONSTANT}
        return markdown([{"algorithm": x} | {w: self.said(x, 3, i) for w, i in where.items()} for x in self.order])

    def on_policy(self) -> str:
        rows = []
        for name in self.order:
            each = {G: self.one(name, G) for G in self.found}
            row = {"algorithm": name} | {f"cosine, G = {G}": closeness(x["cosine"]) for G, x in each.items()}
            row |= {f"scale, G = {G}": x["scale"] for G, x in each.items()}
            row |= {"bias, G = 3": each[3]["bias"], "bias after scaling": each[3]["rest"]}
            rows.append(row | {f"variance, G = {G}": x["variance"] for G, x in each.items()})
        return markdown(rows)

    def by_weighting(self) -> str:
        rows = []
        for name in self.order:
            each = {w: self.one(name, weighting=i + 1) for i, w in enumerate(self.weightings)}
            others = {w: x for w, x in each.items() if w != CONSTANT}
            row = {"algorithm": name} | {f"cosine, {w}": closeness(x["cosine"]) for w, x in others.items()}
            row |= {f"scale, {w}": x["scale"] for w, x in each.items()}
            rows.append(row | {f"variance, {w}": x["variance"] for w, x in others.items()})
        return markdown(rows)

    def off_policy(self) -> str:
        rows = {}
        for name in self.order:
            each = {0.0: self.one(name)} | {d: self.one(name, place=OFF + i) for i, d in enumerate(self.distances)}
            last = f"{self.distances[-1]:g} nats"
            row = {"algorithm": name} | {f"cosine, {d:g} nats": closeness(x["cosine"]) for d, x in each.items()}
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
            row = {"algorithm": name, "cosine to ∇J": closeness(self.one(name)["cosine"])}
            row |= {"cosine to ∇J_β": closeness(near["cosine"]), "scale": near["scale"], "bias": near["bias"]}
            row |= {f"cosine, {d:g} nats": closeness(x["cosine"]) for d, x in zip(self.distances, far, strict=True)}
            rows[nearest(near["cosine"]), name] = row
        return markdown([rows[key] for key in sorted(rows)])
