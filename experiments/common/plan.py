"""What a run needs of a pod and how fast it may go there, as figures and as rows of tables."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType

from experiments.common import costs, device_memory
from experiments.common.chips import GIB, Topology
from experiments.common.costs import Phase, Sizes
from experiments.common.hlo import Collective
from rljax.models.decoder import DecoderConfig
from rljax.train.mesh import AXES

TRY = {
    "parameters": "more devices on --mesh.fsdp or --mesh.tensor, or --weights.adapter.rank 16",
    "optimizer": "more devices on --mesh.fsdp or --mesh.tensor, or --weights.adapter.rank 16",
    "reference": "more devices on --mesh.fsdp, or --weights.adapter.rank 16: its reference needs no copy",
    "KV cache": "fewer or shorter completions, or more devices",
    "gathered weights": "a larger --mesh.tensor, --mesh.expert for a mixture, or no --weights.gather_for_generation",
    "gradients": "more devices on --mesh.fsdp or --mesh.tensor",
    "attention scores": "more --batches.micro_batches, --mesh.tensor or --mesh.sequence",
    "kept activations": "more --batches.micro_batches, or --mesh.sequence",
    "one layer": "more --batches.micro_batches, --mesh.tensor or --mesh.sequence",
    "logits": "more --batches.micro_batches",
    "weights of a layer": "--mesh.tensor, and --mesh.expert for a mixture",
    "table of logits": "a larger chip",
    "temporaries": "more --batches.micro_batches, --mesh.tensor or --mesh.sequence",
}


class Memory(NamedTuple):
    """What one program needs of a device's memory, with all that stays there between programs."""

    program: str
    arrays: dict[str, float]  # bytes

    @property
    def total(self) -> float:
        return sum(self.arrays.values())


class Plan(NamedTuple):
    """A step on a mesh of a topology."""

    topology: Topology
    mesh: jax.sharding.Mesh | AbstractMesh
    sizes: Sizes
    memory: list[Memory]
    phases: list[Phase]
    collectives: dict[str, list[Collective]]  # of each compiled program; {}: nothing was compiled
    gathers: bool  # the weights for each rollout (`DecoderConfig.gather_for_generation`)

    @property
    def worst(self) -> Memory:
        return max(self.memory, key=lambda one: one.total)

    @property
    def over(self) -> float:
        """Bytes that a device has too little; below 0: that are free."""
        return self.worst.total - self.topology.chip.hbm_bytes

    @property
    def seconds(self) -> float:
        """Of a step, at the published peaks."""
        return sum(max(phase.seconds.values()) for phase in self.phases)

    @property
    def tokens_per_second(self) -> float:
        return self.sizes.rows * self.sizes.max_tokens / self.seconds


def abstract_mesh(topology: Topology, sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh without devices, for formulas. Raises ValueError unless its sizes cover the topology (one may be -1)."""
    found = dict(sizes)
    known = math.prod(size for size in found.values() if size != -1)
    for name, size in found.items():
        if size == -1:
            found[name] = topology.size // known
    if math.prod(found.values()) != topology.size:
        asked = " x ".join(f"{name} {sizes[name]}" for name in AXES)
        raise ValueError(
            f"mesh {asked} does not cover the {topology.size} devices of {topology.name}; legal: a product of that"
        )
    return AbstractMesh(tuple(found[name] for name in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def resident(state: Any, on_host: bool = False) -> dict[str, float]:
    """Bytes on a device of what stays there between programs; or of what waits in the host's memory (`offload`)."""
    arrays = {"parameters": state.params, "optimizer": state.opt_state, **state.frozen}
    sizes = {name: float(device_memory.device_bytes(tree, on_host)) for name, tree in arrays.items()}
    return {name: size for name, size in sizes.items() if size}


def by_formulas(
    config: DecoderConfig, topology: Topology, mesh: Any, sizes: Sizes, state: Any, backend: str = ""
) -> Plan:
    """The plan without compiling anything. backend: "cpu" for devices of the CPU; "": those of the topology.

    What waits on the host comes to the device for the programs that use it: an adapter's base for all, a reference for
    scoring, the optimizer's state when the gradients are complete.
    """
    held, fetched = resident(state), resident(state, on_host=True)
    base = {name: size for name, size in fetched.items() if name == "base"}
    reference = {name: size for name, size in fetched.items() if name == "reference"}
    backend = backend or ("tpu" if topology.is_tpu else "gpu")
    update = device_memory.activation_terms(config, mesh, sizes, held["parameters"], backend)
    applying = {"gradients": update["gradients"], "optimizer": fetched.get("optimizer", 0.0)}
    memory = [
        Memory("rollout", held | base | device_memory.decoding_terms(config, mesh, sizes, backend)),
        Memory("scoring", held | base | reference | device_memory.activation_terms(config, mesh, sizes, 0, backend)),
        Memory("update", held | base | (applying if sum(applying.values()) > sum(update.values()) else update)),
    ]
    phases = costs.phases(config, topology, mesh, sizes)
    return Plan(topology, mesh, sizes, memory, phases, {}, config.gather_for_generation)


# -------------------------------------------------------------------------------------------------------------- tables


def gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def memory_rows(plan: Plan) -> list[dict[str, str]]:
    """Of each program, what it holds on a device, GiB."""
    limit = plan.topology.chip.hbm_bytes
    names = list(dict.fromkeys(name for one in plan.memory for name in one.arrays))
    rows = [
        {"GiB a device": name} | {one.program: gib(one.arrays.get(name, 0)) for one in plan.memory} for name in names
    ]
    rows.append({"GiB a device": "in all"} | {one.program: gib(one.total) for one in plan.memory})
    rows.append(
        {"GiB a device": f"free of {gib(limit)}"} | {one.program: gib(limit - one.total) for one in plan.memory}
    )
    return rows


def phase_rows(plan: Plan) -> list[dict[str, str]]:
    """Of each phase operations, bytes and seconds, and what bounds it."""
    rows = []
    for phase in plan.phases:
        bound = max(phase.seconds, key=phase.seconds.get)
        rows.append(
            {
                "a device": phase.name,
                "TFLOP": f"{phase.flops / 1e12:,.1f}",
                "HBM, GB": f"{phase.hbm_bytes / 1e9:,.1f}",
                "sent, GB": f"{sum(one.bytes for one in phase.sent) / 1e9:,.1f}",
                **{f"{name}, s": f"{value:,.2f}" for name, value in phase.seconds.items()},
                "seconds": f"{phase.seconds[bound]:,.2f}",
                "bound": bound,
            }
        )
    return rows


def collective_rows(plan: Plan) -> list[dict[str, str]]:
    """What devices send in a step, by program, kind and size of group."""
    rows = []
    for program, found in plan.collectives.items():
        sent: Counter = Counter()
        count: Counter = Counter()
        for one in found:
            sent[one.kind, len(one.group)] += one.sent
            count[one.kind, len(one.group)] += one.times
        for (kind, devices), size in sent.most_common():
            if size >= 1e6:
                rows.append(
                    {
                        "program": program,
                        "collective": kind,
                        "devices": str(devices),
                        "times": f"{count[kind, devices]:,}",
                        "GB sent a device": f"{size / 1e9:,.3f}",
                    }
                )
    return rows


def verdict(plan: Plan) -> str:
    """Whether it fits, and if not by how much, which array binds, and what to try."""
    worst = plan.worst
    array = max(worst.arrays, key=worst.arrays.get)
    held = f"{worst.program}: {gib(worst.total)} of {gib(plan.topology.chip.hbm_bytes)} GiB a device"
    largest = f"largest: {array}, {gib(worst.arrays[array])} GiB"
    if plan.over <= 0:
        return f"fits: {held}; {largest}"
    return (
        f"does not fit, by {gib(plan.over)} GiB a device ({held}; {largest}). Try {TRY.get(array, TRY['temporaries'])}"
    )


def cost_line(plan: Plan, steps: int, price: float) -> str:
    """Seconds of a step, tokens a second, device-hours and money of a run."""
    hours = steps * plan.seconds * plan.topology.size / 3600
    money = f", {hours * price:,.0f} at {price:g} a device-hour" if price else ""
    return (
        f"at the published peaks, which no run reaches: a step in {plan.seconds:,.1f} s, "
        f"{plan.tokens_per_second:,.0f} sampled tokens a second; {steps:,} steps: {hours:,.1f} device-hours{money}"
    )


def batch_line(plan: Plan) -> str:
    """The arithmetic of a step's batch."""
    sizes = plan.sizes
    rows = sizes.rows
    return (
        f"{sizes.prompts} prompts x {sizes.num_generations} = {rows} completions of up to {sizes.prompt_tokens:,} + "
        f"{sizes.max_tokens:,} tokens; {sizes.updates} updates of {rows * sizes.epochs // sizes.updates} rows, each in "
        f"{sizes.pieces.micro_batches} micro-batches in which {sizes.pieces.group_size} rows share a prompt"
    )


def layout(plan: Plan) -> str:
    """fsdp 16 x tensor 4: the axes that are used; and whether a rollout gathers the weights once."""
    used = [f"{name} {size}" for name, size in plan.mesh.shape.items() if size > 1]
    return (" x ".join(used) or "one device") + (", gathered" if plan.gathers else "")


def gathering_line(plan: Plan, gathered: Plan) -> str:
    """What a step would be if each rollout gathered the weights once."""
    fits = f"fits, {gib(-gathered.over)} GiB free" if gathered.over <= 0 else f"over by {gib(gathered.over)} GiB"
    return (
        f"with --weights.gather_for_generation, by formulas: a step in {gathered.seconds:,.1f} s instead of "
        f"{plan.seconds:,.1f} ({fits})"
    )


# --------------------------------------------------------------------------------------------------------------- sweep


def meshes(topology: Topology, config: DecoderConfig) -> Iterator[AbstractMesh]:
    """Meshes worth a try: powers of two, heads divided evenly, copies of the parameters at most 4."""
    powers = [2**i for i in range(topology.size.bit_length())]
    for tensor in powers:
        for expert in powers if config.moe else [1]:
            for sequence in (1, 2, 4):
                for data in (1, 2, 4):
                    used = tensor * expert * sequence * data
                    divides = topology.size % used == 0 and config.num_heads % tensor == 0 and tensor <= 16
                    if divides and (config.moe is None or config.moe.num_experts % expert == 0):
                        shape = dict(data=data, fsdp=-1, sequence=sequence, expert=expert, tensor=tensor)
                        yield abstract_mesh(topology, shape)


def sweep_rows(plans: list[Plan]) -> list[dict[str, str]]:
    """The plans, best first, each with what cost it the place."""
    best = plans[0]
    return [
        {
            "": str(place),
            "mesh": layout(plan),
            "step, s": f"{plan.seconds:,.1f}",
            "GiB": gib(plan.worst.total),
            "why not first": "" if plan is best else why_not(plan, best),
        }
        for place, plan in enumerate(plans, 1)
    ]


def ranked(plans: list[Plan]) -> list[Plan]:
    """Those that fit by their step's time, then those that do not by how much they lack."""
    return sorted(plans, key=lambda plan: (max(plan.over, 0.0), plan.seconds))


def why_not(plan: Plan, best: Plan) -> str:
    """Which array or which collective cost a mesh its place."""
    if plan.over > 0:
        worst = plan.worst
        array = max(worst.arrays, key=lambda name: worst.arrays[name] - best.worst.arrays.get(name, 0))
        return f"over by {gib(plan.over)} GiB in {worst.program}: {array} {gib(worst.arrays[array])} GiB"
    slower = [
        (max(b.seconds.values()) - max(a.seconds.values()), a, b) for a, b in zip(best.phases, plan.phases, strict=True)
    ]
    lost, mine, other = max(slower, key=lambda one: one[0])
    bound = max(other.seconds, key=other.seconds.get)
    if bound != "interconnect":
        return f"{other.name} +{lost:,.1f} s: {bound} {other.seconds[bound]:,.1f} s for {mine.seconds[bound]:,.1f}"
    before = Counter({one[:3]: one.bytes for one in mine.sent})
    one = max(other.sent, key=lambda sent: sent.bytes - before[sent[:3]])
    return (
        f"{other.name} +{lost:,.1f} s: {one.kind} of {one.what} over {' x '.join(one.axes)}, {one.bytes / 1e9:,.0f} GB"
    )
