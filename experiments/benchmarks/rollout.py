r"""Rollouts against what the machine can do, and their parts against each other, alternately in one process.

    python experiments/benchmarks/rollout.py                        # W1
    python experiments/benchmarks/rollout.py --preset W2 --json rollout.json
    python experiments/benchmarks/rollout.py --transformers True    # and transformers.generate
    python experiments/benchmarks/rollout.py --devices 2            # rows shared among virtual devices, one a core
    python experiments/benchmarks/rollout.py --against tunix trl    # and what peers' trainers sample with (against.py)

W1: vocabulary 4096, width 256, 4 layers, 8 heads (4 for keys) of 32, MLP 688; 8 prompts of 32 tokens x 8 completions of
64 tokens. W2: vocabulary 32768, width 512, 8 layers, 8 heads (4) of 64, MLP 1376; 2 prompts of 128 tokens x 8
completions of 128. Embeddings are tied.

The roofline is that of roofline.py. Slots: 4 requests a row in a queue, completions of geometric length with a mean of
a quarter of the longest, against static batches of as many rows, one after the other.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from experiments.benchmarks.against import PEERS, UNTIMED, PeerName, peer_works, require_conditions_of_peers
from experiments.benchmarks.common import WORKLOADS, Output, Workload, alternately, prompts, run, trace, write_figures
from experiments.benchmarks.roofline import least_seconds, measure, rollout_works, share
from rljax.models import decoder, policy
from rljax.models.decoder import DecoderConfig
from rljax.ops.logprobs import softmax, softmax_logp
from rljax.ops.sampling import invert_cdf
from rljax.rollouts.sampler import sample, sample_and_count
from rljax.train import mesh as meshes
from rljax.train.log import log_info, table
from rljax.types import PromptBatch, Sampling


@dataclasses.dataclass(frozen=True)
class Config(Output):
    """What to measure."""

    preset: Literal["W1", "W2"] = "W1"  # the workload
    repeats: int = 5  # timed runs of each
    dtype: Literal["float32", "bfloat16"] = "float32"  # of parameters and computation
    devices: int = 1  # of a CPU, among which rollouts share their rows
    transformers: bool = False  # torch's generate too (installs of `make parity`)
    against: tuple[PeerName, ...] = ()  # peers that take turns with ours


def torch_generate(workload: Workload, config: DecoderConfig):
    """The same work for transformers, sampling at temperature 1, no end before the last token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            tie_word_embeddings=True,
        )
    ).eval()
    rows = prompts(config, workload.prompts, workload.prompt_tokens)
    tokens = torch.tensor(rows.tokens).long().repeat_interleave(workload.n, dim=0)
    count = workload.completion_tokens
    lengths = {"max_new_tokens": count, "min_new_tokens": count}

    def generate(_):
        with torch.no_grad():
            model.generate(tokens, do_sample=True, top_k=0, pad_token_id=0, **lengths)

    return generate


def over_devices(devices: int, lm, params, rows, sampling: Sampling):
    """The same work with every device holding the parameters and its share of the rows."""
    mesh = meshes.make_mesh(data=devices, fsdp=1)
    everywhere = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.device_put(params, everywhere)
    rows = meshes.shard_prompts(meshes.Shardings(None, split, everywhere), rows)
    return sampler(lm, params, rows, sampling)


def sampling_parts(config, rows: int, repeats: int) -> dict[str, float]:
    """Seconds of one draw without and with its log-prob: 64 of them in one compiled loop, each waiting for the last."""
    logits = 3.0 * jax.random.normal(jax.random.key(0), (rows, config.vocab_size))
    uniform = jnp.linspace(0.0, 1.0, rows, endpoint=False)
    ones = jnp.ones(rows)

    def loop(captured: bool):
        @jax.jit
        def run(logits):
            def draw(_, carry):
                z, total = carry
                dist = softmax(z, ones)
                token = invert_cdf(dist.masses, uniform)
                logp = softmax_logp(dist, token) if captured else jnp.zeros(rows)
                return z.at[:, 0].add(1e-6 * (token + logp)), total + logp

            return jax.lax.fori_loop(0, 64, draw, (logits, jnp.zeros(rows)))

        return lambda _: run(logits)

    times = alternately({"draw": loop(False), "with its log-prob": loop(True)}, repeats)
    return {name: statistics.median(values) / 64 for name, values in times.items()}


def main(cfg: Config) -> dict[str, float]:
    """Measure, print and return the figures."""
    if cfg.devices > 1:
        jax.config.update("jax_num_cpu_devices", cfg.devices)
    workload = workload_of(cfg)
    config = workload.config
    params = policy.init(config, jax.random.key(0))
    params = jax.tree.map(lambda x: x.astype(cfg.dtype), params)
    works = own_works(cfg, workload, config, params)
    if cfg.transformers:
        works["transformers"] = torch_generate(workload, config)

    # The roofline is measured before and after: what else runs on the machine only ever lowers it.
    passes = rollout_works(workload, config)
    rates = measure(passes, cfg.dtype, cfg.repeats, cfg.devices)
    with peer_works(cfg.against, "rollout", workload) as peers:
        times = alternately(works | peers, cfg.repeats, UNTIMED if peers else 0)
    rates = measure(passes, cfg.dtype, cfg.repeats, cfg.devices, before=rates)
    trace(works, cfg.profile)

    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    parts = sampling_parts(config, workload.rows, cfg.repeats)
    figures = {f"{name}, seconds": t for name, t in median.items()}
    figures |= shares(cfg, times, least_seconds(passes, rates)) | rollout_figures(workload, median, parts)
    figures["slot utilisation"] = slot_utilization(workload, config, params)
    figures |= peer_figures(cfg, median)
    log_info(f"{cfg.preset}, {cfg.dtype}, on {jax.devices()[0].device_kind}, medians of {cfg.repeats}")
    table("seconds", [{"": name, "median": t, "best": min(times[name])} for name, t in median.items()])
    table("figures", [{"": name, "value": value} for name, value in figures.items() if "seconds" not in name])
    figures = {f"{cfg.preset}, {cfg.dtype}, {name}": value for name, value in figures.items()}
    write_figures(cfg.json, figures)
    return figures


def workload_of(cfg: Config) -> Workload:
    """That of the preset, in the dtype. Raises ValueError for what would run under other conditions beside it."""
    workload = WORKLOADS[cfg.preset]
    config = dataclasses.replace(workload.config, dtype=cfg.dtype)
    require_conditions_of_peers((*cfg.against, *["transformers"] * cfg.transformers), config)
    if cfg.devices > 1 and jax.default_backend() != "cpu":
        raise ValueError(f"devices = {cfg.devices} are virtual ones of a CPU; legal on a {jax.default_backend()}: 1")
    return workload._replace(config=config)


# ------------------------------------------------------------------------------------------------- what takes turns


def sampler(lm, params, rows, sampling: Sampling) -> Callable[[int], object]:
    """work(i): the rollout of step i."""
    return lambda i: sample(lm, params, {}, rows, sampling, 0, i)


def own_works(cfg: Config, workload: Workload, config: DecoderConfig, params) -> dict[str, Callable]:
    """The rollout, variants of it, and a queue of requests by static batches and by continuous batching."""
    lm = decoder.language_model(config, devices=1)  # as on a machine that has one, whatever `cfg.devices` is
    invariant_lm = decoder.language_model(dataclasses.replace(config, batch_invariant=True), devices=1)
    rows = prompts(config, workload.prompts, workload.prompt_tokens)
    plain = Sampling(n=workload.n, max_tokens=workload.completion_tokens)
    queue, ending = queue_of(workload, config)
    quarters = [sampler(lm, params, quarter, ending) for quarter in quarters_of(queue, workload.prompts)]
    works = {
        "rollout": sampler(lm, params, rows, plain),
        "greedy": sampler(lm, params, rows, plain.replace(temperature=0.0)),
        "top-k 50, top-p 0.9": sampler(lm, params, rows, plain.replace(top_k=50, top_p=0.9, logp="policy")),
        "batch-invariant": sampler(invariant_lm, params, rows, plain),
        "a queue, static": lambda i: [work(i) for work in quarters],
        "a queue, slots": sampler(lm, params, queue, ending.replace(max_concurrent=workload.rows)),
    }
    if cfg.devices > 1:
        lm = decoder.language_model(config, cfg.devices)
        works[f"on {cfg.devices} devices"] = over_devices(cfg.devices, lm, params, rows, plain)
    return works


def queue_of(workload: Workload, config: DecoderConfig) -> tuple[PromptBatch, Sampling]:
    """Four times the prompts, and stop tokens that end a completion after a quarter of the longest, on average."""
    queue = prompts(config, 4 * workload.prompts, workload.prompt_tokens)
    stop = tuple(range(config.vocab_size * 4 // workload.completion_tokens))
    return queue, Sampling(n=workload.n, max_tokens=workload.completion_tokens, stop=stop)


def quarters_of(queue: PromptBatch, count: int) -> list[PromptBatch]:
    """The queue in four batches of `count` prompts."""
    cuts = [slice(i * count, (i + 1) * count) for i in range(4)]
    return [queue._replace(tokens=queue.tokens[c], mask=queue.mask[c], number=queue.number[c]) for c in cuts]


# ----------------------------------------------------------------------------------------------------- the figures


def shares(cfg: Config, times: dict[str, list[float]], least: float) -> dict[str, float]:
    """Of the roofline: what the rollout reaches in the median and in its best run."""
    figures = {"roofline, seconds": least}
    for name in ("rollout", f"on {cfg.devices} devices"):
        if name in times:
            best = min(times[name])
            figures[f"share of the roofline, {name}, best run"] = share(least, best)
            figures[f"share of the roofline, {name}"] = share(least, statistics.median(times[name]))
    return figures


def rollout_figures(workload: Workload, median: dict, parts: dict) -> dict[str, float]:
    """Speed, and what parts of a decode step cost."""
    step = median["rollout"] / workload.completion_tokens
    return {
        "tokens/s": workload.rows * workload.completion_tokens / median["rollout"],
        "ms a decode step": 1e3 * step,
        "log-prob capture, of a step": (parts["with its log-prob"] - parts["draw"]) / step,
        "top-k and top-p, of a step": median["top-k 50, top-p 0.9"] / median["rollout"] - 1,
        "batch-invariant / rollout": median["batch-invariant"] / median["rollout"],
        "static / slots": median["a queue, static"] / median["a queue, slots"],
    }


def slot_utilization(workload: Workload, config: DecoderConfig, params) -> float:
    """Tokens drawn over rows x decode steps, with continuous batching."""
    queue, ending = queue_of(workload, config)
    sampling = ending.replace(max_concurrent=workload.rows)
    lm = decoder.language_model(config, devices=1)
    _, stats = sample_and_count(lm, params, {}, queue, sampling, 0, 0)
    return float(stats.tokens / stats.row_steps)


def peer_figures(cfg: Config, median: dict[str, float]) -> dict[str, float]:
    """Each peer's time over ours."""
    return {
        f"{other} / {ours}": median[other] / median[ours]
        for other in ("transformers", *(peer.title for peer in PEERS.values()))
        for ours in ("rollout", f"on {cfg.devices} devices")
        if other in median and ours in median
    }


if __name__ == "__main__":
    run(Config, main)
