r"""What a run of grpo.py needs of a pod, before it is paid for: memory, time, money. The pod need not be there.

    python experiments/preflight.py --model qwen2.5-7b --topology v5e:8x8 --mesh.fsdp 64 \
        --batches.prompts 64 --batches.num_generations 8 --max_prompt_tokens 1024 --sampling.max_tokens 3072
    python experiments/preflight.py --model DIR --topology v5p:8x8x8 --sweep --price 4.2 --html plan.html
    python experiments/preflight.py --model qwen3-8b --topology h100:16 --mesh.tensor 8

The settings are those of grpo.py, with defaults of their own; the last line is the grpo.py command that compiles what
was planned. For a TPU topology the very programs that grpo.py would run (prefill, rollout with its cache, scoring,
update) are compiled by the TPU compiler, which comes with `pip install "rljax[preflight]"`: memory and collectives are
the compiler's, operations and bytes of HBM are formulas (experiments/common/costs.py). For GPUs all is. Times are those
of the published peaks, which no run reaches. --sweep ranks meshes by the formulas and goes on with the best. A model is
a directory, OWNER/NAME, or one of experiments/model_shapes/.

Reached: see docs/preflight.md.
"""

import dataclasses
import importlib.util
import os
import re
import shlex
import time
from typing import Any, Literal

import jax

from experiments import grpo
from experiments.common import command_line, costs, device_memory, lowering, models, plan, plan_page, train
from experiments.common.algorithms import CriticFree
from experiments.common.chips import GIB, Topology, read_topology
from experiments.common.hlo import collectives
from experiments.common.model_shapes import find_shape
from experiments.common.plan import Memory, Plan
from experiments.common.settings import Batches, Controllers, MeshShape, Optimizer, Rare, Sampling, Weights
from rljax.models import hf
from rljax.models.decoder import DecoderConfig
from rljax.rollouts.sampler import chunk_size
from rljax.train.log import log_info, table
from rljax.train.mesh import make_mesh

# Read by libtpu when it is loaded; it would ask the network for the pod's metadata.
TPU_VARIABLES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two plans at the same time: nothing is run
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
# What the TPU compiler says of a program that does not fit. Its "temporaries" are all of it: arguments and results too.
OUT_OF_MEMORY = re.compile(r"HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)")
UNITS = {"K": GIB / 1024**2, "M": GIB / 1024, "G": GIB, "T": GIB * 1024}


@dataclasses.dataclass(frozen=True)
class Config:
    """What a run of grpo.py with these settings needs of a pod."""

    model: str  # directory with config.json, OWNER/NAME, or a published model: qwen2.5-7b
    topology: str  # v5e:8x8, v5p:4x4x4 ...; h100:16, h200:8, b200:64
    max_prompt_tokens: int = 1024  # tokens of the longest prompt
    algorithm: CriticFree = "grpo"  # how to learn
    kl_coef: Rare[float] = 0.04  # coefficient of the KL to the reference
    kl_in_reward: Rare[bool] = False  # the KL is in the rewards, not in the loss
    controllers: Controllers = Controllers()
    batches: Batches = Batches(prompts=64, num_generations=8)
    sampling: Sampling = Sampling(max_tokens=3072)
    optimizer: Optimizer = Optimizer(learning_rate=1e-6)
    weights: Weights = Weights(dtype="bfloat16", remat="full", scan_layers=True)
    mesh: MeshShape = MeshShape()
    steps: int = 1000  # of the run whose cost is told
    price: float = 0.0  # of a device-hour; 0: no money is told
    sweep: bool = False  # rank meshes, and go on with the best
    programs: Literal["all", "none"] = "all"  # what is compiled, for a TPU; none: formulas alone
    html: str = ""  # file for the same as a page


def main(cfg: Config) -> Plan:
    """Print the plan; return it."""
    topology = read_topology(cfg.topology)
    directory = find_shape(cfg.model)
    compiles = topology.is_tpu and cfg.programs == "all"
    if compiles and importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            'compiling for a TPU needs libtpu: pip install "rljax[preflight]"; legal without: --programs none'
        )
    config = hf.read_config(directory, cfg.max_prompt_tokens + cfg.sampling.max_tokens)
    lowering.planned_sampling(cfg, config)
    log_info(f"{cfg.model}: {costs.num_params(config) / 1e9:,.2f} B parameters; {topology.size} x {topology.chip.name}")
    if config.moe is not None and not topology.is_tpu:
        log_info(models.DENSE_EXPERTS)
    swept = []
    if cfg.sweep:
        swept = sweep(cfg, config, topology)
        best = dict(swept[0].mesh.shape)
        cfg = dataclasses.replace(gathering(cfg, swept[0].gathers), mesh=MeshShape(**best))
    found = by_formulas = formulas(cfg, config, topology, cfg.mesh.sizes)
    if compiles:
        found = compiled(cfg, config, topology, found)
    show(cfg, found)
    if found.over <= 0 and not found.gathers and found.mesh.shape["fsdp"] > 1:
        log_info(plan.gathering_line(by_formulas, formulas(gathering(cfg, True), config, topology, cfg.mesh.sizes)))
    log_info(f"this program: python experiments/grpo.py {shlex.join(arguments_of_run(cfg, found))}")
    if cfg.html:
        plan_page.write(cfg.html, cfg, found, swept)
        log_info(f"written: {cfg.html}")
    return found


def arguments_of_run(cfg: Config, found: Plan) -> list[str]:
    """The arguments of grpo.py with which it compiles the programs of this plan; PROMPTS is the user's to fill in."""
    batches = dataclasses.replace(cfg.batches, micro_batches=found.sizes.pieces.micro_batches)
    mesh = dataclasses.replace(cfg.mesh, **dict(found.mesh.shape))
    planned = dataclasses.replace(gathering(cfg, found.gathers), batches=batches, mesh=mesh)
    return ["--prompts", "PROMPTS", *command_line.changed_flags(planned, grpo.Config(model="", prompts="PROMPTS"))]


def gathering(cfg: Config, gathers: bool) -> Config:
    """The settings with the weights gathered for each rollout, or not."""
    return dataclasses.replace(cfg, weights=dataclasses.replace(cfg.weights, gather_for_generation=gathers))


def formulas(cfg: Config, config: DecoderConfig, topology: Topology, sizes: dict[str, int]) -> Plan:
    """The plan of a mesh without compiling."""
    mesh = plan.abstract_mesh(topology, sizes)
    train.check_batches(cfg.batches, mesh)
    config = dataclasses.replace(models.trained_config(config, cfg.weights, mesh), hidden_sharding=None)
    optimizer = lowering.make_optimizer(cfg.optimizer, cfg.steps)
    state, _ = lowering.state_shapes(cfg, config, mesh, optimizer)
    return plan.by_formulas(config, topology, mesh, lowering.sizes_of(cfg, config, mesh, topology.chip), state)


def sweep(cfg: Config, config: DecoderConfig, topology: Topology) -> list[Plan]:
    """The plans of all meshes that the batch divides over, with weights gathered for rollouts and without, best first.

    By formulas; prints the first 16.
    """
    plans = []
    for mesh in plan.meshes(topology, config):
        try:
            train.check_batches(cfg.batches, mesh)
        except ValueError:  # completions that do not divide over it
            continue
        for gathers in (False, True)[: 1 + (mesh.shape["fsdp"] > 1)]:
            plans.append(formulas(gathering(cfg, gathers), config, topology, dict(mesh.shape)))
    if not plans:
        raise ValueError(f"the batch divides over no mesh of {topology.size} devices; legal: more completions a step")
    plans = plan.ranked(plans)
    table(f"{len(plans)} plans, by formulas; gathered: --weights.gather_for_generation", plan.sweep_rows(plans)[:16])
    return plans


# ------------------------------------------------------------------------------------------------------------- compile


def compiled(cfg: Config, config: DecoderConfig, topology: Topology, found: Plan) -> Plan:
    """The plan with the compiler's memory and collectives."""
    mesh = make_mesh(**dict(found.mesh.shape), devices=pod_devices(topology))
    config = models.trained_config(config, cfg.weights, mesh)
    step = lowering.shapes_of_step(cfg, config, mesh)
    held = plan.resident(step.state)
    cache = device_memory.cache_bytes(config, mesh, step.sizes)
    copy = device_memory.gathered_bytes(config, mesh) if config.gather_for_generation else 0
    memory, sent = [], {}
    for program in step.programs:
        log_info(f"compiling {program.name} ...")
        start, cpu = time.perf_counter(), time.process_time()
        arrays, sent[program.name] = compile_program(program, chunk_size(cfg.sampling.max_tokens - 1))
        if program.name in ("prefill", "rollout") and "temporaries" in arrays:
            known = {"KV cache": cache if program.name == "rollout" else 0, "gathered weights": copy}
            known = {name: size for name, size in known.items() if size}
            arrays = known | arrays | {"temporaries": arrays["temporaries"] - sum(known.values())}
        memory.append(Memory(program.name, held | arrays))
        took = f"{time.perf_counter() - start:.0f} s, {time.process_time() - cpu:.0f} s of CPU"
        log_info(f"{program.name}: {took}; {plan.gib(memory[-1].total)} GiB a device")
    phases = []
    for phase in found.phases:
        program = next(one for one in step.programs if one.name == {"decode": "rollout"}.get(phase.name, phase.name))
        phases.append(costs.with_collectives(phase, topology, mesh, sent[program.name], program.calls))
    prefill, decode, *rest = phases  # a rollout begins with a prefill
    wire = max(0.0, decode.seconds["interconnect"] - prefill.seconds["interconnect"])
    decode = decode._replace(seconds=decode.seconds | {"interconnect": wire})
    return Plan(topology, mesh, step.sizes, memory, [prefill, decode, *rest], sent, found.gathers)


def pod_devices(topology: Topology) -> list[jax.Device]:
    """The devices of a pod that is not there."""
    for name, value in TPU_VARIABLES.items():
        os.environ[name] = value  # jax has set some of them for the machine that it found
    jax.config.update("jax_platforms", "cpu")  # libtpu compiles; there is nothing for it to run on
    from jax.experimental import topologies
    from jax.experimental.compilation_cache import compilation_cache

    # No program of an absent pod can be read back, and what has compiled before has settled that there is a cache.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices)
    except (RuntimeError, ValueError, NotImplementedError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"topology {topology.name!r}: libtpu knows no such slice ({reason})") from None


def compile_program(program: lowering.Program, open_loop_trips: int) -> tuple[dict[str, float], list]:
    """Bytes that a program needs besides the state, by the compiler; and its collectives.

    Where it does not fit the compiler says how large it is, and there are no collectives. Raises ValueError where it
    refuses the program for another reason.
    """
    try:
        executable = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        found = OUT_OF_MEMORY.search(str(error))
        if found is None:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"the TPU compiler refuses the program of {program.name}: {reason}; legal: another --mesh, or "
                "--programs none for the plan by formulas"
            ) from None
        return {"temporaries": max(0.0, float(found[1]) * UNITS[found[2]] - program.state_bytes)}, []
    stats = executable.memory_analysis()
    arrays = {
        "other arguments": float(stats.argument_size_in_bytes - program.state_bytes),
        "temporaries": float(stats.temp_size_in_bytes),
        "results": float(stats.output_size_in_bytes - stats.alias_size_in_bytes),
    }
    found = collectives(executable.as_text(), open_loop_trips)
    return {name: max(0.0, size) for name, size in arrays.items()}, found


# -------------------------------------------------------------------------------------------------------------- report


def show(cfg: Any, found: Plan) -> None:
    """Print the plan."""
    source = "compiled" if found.collectives else "by formulas"
    log_info()
    log_info(f"{found.topology.name} as {plan.layout(found)}: {plan.batch_line(found)}")
    table(f"memory, {source}", plan.memory_rows(found))
    table("a step, at the published peaks", plan.phase_rows(found))
    if found.collectives:
        table("collectives of a call", plan.collective_rows(found))
    log_info(plan.verdict(found), style="bold")
    log_info(plan.cost_line(found, cfg.steps, cfg.price))


if __name__ == "__main__":
    command_line.run(Config, main, makes_run=False)
