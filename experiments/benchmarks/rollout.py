r"""Rollouts against what the machine can do, and their parts against each other, alternately in one process.

    python experiments/benchmarks/rollout.py                        # W1
    python experiments/benchmarks/rollout.py --preset W2 --json rollout.json
    python experiments/benchmarks/rollout.py --transformers True    # and transformers.generate
    python experiments/benchmarks/rollout.py --trl PYTHON           # and TRL, which calls it (peers/trl_generate.py)
    python experiments/benchmarks/rollout.py --devices 2            # rows shared among virtual devices, one a core
    python experiments/benchmarks/rollout.py --tunix PYTHON         # and Tunix (peers/tunix_sampler.py)

W1: vocabulary 4096, width 256, 4 layers, 8 heads (4 for keys) of 32, MLP 688; 8 prompts of 32 tokens x 8 answers of 64
tokens. W2: vocabulary 32768, width 512, 8 layers, 8 heads (4) of 64, MLP 1376; 2 prompts of 128 tokens x 8 answers of
128. Tied.

Ceiling of a pass: the larger of bytes/bandwidth (weights once, the filled cache) and FLOPs/peak, summed over prompt and
decode steps. Slots: 4 requests a row in a queue, answers of geometric length with a mean of a quarter of the longest,
against the static batch of as many rows, one after the other.
"""

import dataclasses
import json
import statistics
import subprocess
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import tyro
from common import W1, W2, alternately, bandwidth, peak, prompts
from jax.sharding import NamedSharding, PartitionSpec
from rljax.rollouts.sampler import sample, sample_and_count

from rljax.models import decoder, policy
from rljax.ops.logprobs import softmax, softmax_logp
from rljax.ops.sampling import invert_cdf
from rljax.train import mesh as meshes
from rljax.train.log import log_info, table
from rljax.types import Sampling

WORKS = {"W1": (W1, 8, 8, 32, 64), "W2": (W2, 2, 8, 128, 128)}  # config, prompts, answers to each, their tokens


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    preset: Literal["W1", "W2"] = "W1"  # the work
    repeats: int = 5  # timed runs of each
    dtype: Literal["float32", "bfloat16"] = "float32"  # of parameters and computation
    devices: int = 1  # of a CPU, among which rollouts share their rows
    transformers: bool = False  # torch's generate too (installs of `make parity`)
    trl: str = ""  # TRL's rollout too: a Python where trl is installed
    tunix: str = ""  # Tunix's sampler too: a Python where google-tunix is installed
    json: str = ""  # where to write the figures


def ceiling(config, rows: int, prompts: int, length: int, answer: int, flops: float, bytes_: float) -> float:
    """Seconds below which no rollout of these sizes comes."""
    weights = sum(x.size for x in jax.tree.leaves(decoder.abstract(config)))
    column = 2 * config.num_layers * config.num_kv_heads * config.head_dim  # numbers cached for a token
    width = (
        2 * config.num_layers * config.num_heads * config.head_dim
    )  # multiply-adds of a query with one key and its value
    body = weights - config.vocab_size * config.hidden_size
    size = jnp.dtype(config.dtype).itemsize
    seconds = max(size * weights / bytes_, 2 * prompts * length * (body + width * length / 2) / flops)
    for t in range(answer):
        read = size * (weights + column * (prompts * length + rows * t))
        seconds += max(read / bytes_, 2 * rows * (weights + width * (length + t)) / flops)
    return seconds


def torch_generate(config, rows, n: int, answer: int):
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
    tokens = torch.tensor(rows.tokens).long().repeat_interleave(n, dim=0)
    lengths = {"max_new_tokens": answer, "min_new_tokens": answer}

    def generate(_):
        with torch.no_grad():
            model.generate(tokens, do_sample=True, top_k=0, pad_token_id=0, **lengths)

    return generate


def peer(python: str, name: str, config, *sizes: int):
    """The same work for peers/`name`.py, in a process of its own, which works when it is asked to."""
    shape = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
    work = {x: getattr(config, x) for x in shape} | dict(zip(("prompts", "n", "length", "answer"), sizes, strict=True))
    script = str(Path(__file__).with_name("peers") / f"{name}.py")
    child = subprocess.Popen(
        [python, script, json.dumps(work)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def generate(_):
        child.stdin.write("\n")
        child.stdin.flush()
        if not child.stdout.readline():
            raise ValueError(f"{python} {script} ended; its message stands above")

    return generate


def spread(devices: int, lm, params, rows, sampling: Sampling):
    """The same work with every device holding the parameters and its share of the rows."""
    mesh = meshes.make_mesh(data=devices, fsdp=1)
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    params = jax.device_put(params, everywhere)
    rows = meshes.shard_prompts(meshes.Shardings(None, split, everywhere), rows)
    return lambda i: sample(lm, params, {}, rows, sampling, 0, i)


def sampling_parts(config, rows: int, repeats: int) -> dict[str, float]:
    """Seconds of one draw without and with its log-prob: 64 of them in one compiled loop, each waiting for the last."""
    logits = 3.0 * jax.random.normal(jax.random.key(0), (rows, config.vocab_size))
    uniform, ones = jnp.linspace(0.0, 1.0, rows, endpoint=False), jnp.ones(rows)

    def loop(captured: bool):
        @jax.jit
        def run(logits):
            def one(_, carry):
                z, total = carry
                dist = softmax(z, ones)
                token = invert_cdf(dist.masses, uniform)
                logp = softmax_logp(dist, token) if captured else jnp.zeros(rows)
                return z.at[:, 0].add(1e-6 * (token + logp)), total + logp

            return jax.lax.fori_loop(0, 64, one, (logits, jnp.zeros(rows)))

        return lambda _: run(logits)

    times = alternately({"draw": loop(False), "with its log-prob": loop(True)}, repeats)
    return {name: statistics.median(values) / 64 for name, values in times.items()}


def main(cfg: Config) -> dict[str, float]:
    if cfg.devices > 1:
        jax.config.update("jax_num_cpu_devices", cfg.devices)
    config, count, n, length, answer = WORKS[cfg.preset]
    config = dataclasses.replace(config, dtype=cfg.dtype)
    B, rows, params = count * n, prompts(config, count, length), policy.init(config, jax.random.key(0))
    params = jax.tree.map(lambda x: x.astype(cfg.dtype), params)
    exact = dataclasses.replace(config, batch_invariant=True)
    lm, exact_lm, stop = *map(decoder.language_model, (config, exact)), tuple(range(config.vocab_size * 4 // answer))
    plain = Sampling(n=n, max_tokens=answer)
    queue = prompts(config, 4 * count, length)
    cut = [slice(i * count, (i + 1) * count) for i in range(4)]
    quarters = [queue._replace(tokens=queue.tokens[c], mask=queue.mask[c], number=queue.number[c]) for c in cut]
    ending = Sampling(n=n, max_tokens=answer, stop=stop)
    draw = lambda rows, sampling, lm=lm: lambda i: sample(lm, params, {}, rows, sampling, 0, i)  # noqa: E731
    works = {
        "rollout": draw(rows, plain),
        "greedy": draw(rows, plain.replace(temperature=0.0)),
        "top-k 50, top-p 0.9": draw(rows, plain.replace(top_k=50, top_p=0.9)),
        "exact": draw(rows, plain, exact_lm),
        "a queue, static": lambda i: [draw(part, ending)(i) for part in quarters],
        "a queue, slots": draw(queue, ending.replace(max_concurrent=B)),
    }
    if cfg.devices > 1:
        works[f"on {cfg.devices} devices"] = spread(cfg.devices, lm, params, rows, plain)
    if cfg.transformers:
        works["transformers"] = torch_generate(config, rows, n, answer)
    for name, python, script in (("TRL", cfg.trl, "trl_generate"), ("Tunix", cfg.tunix, "tunix_sampler")):
        if python:
            works[name] = peer(python, script, config, count, n, length, answer)
    flops, bytes_ = peak(cfg.repeats, cfg.dtype), bandwidth(cfg.repeats)
    times = alternately(works, cfg.repeats)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    flops, bytes_ = max(flops, peak(cfg.repeats, cfg.dtype)), max(bytes_, bandwidth(cfg.repeats))
    bound = ceiling(config, B, count, length, answer, flops, bytes_)
    parts = sampling_parts(config, B, cfg.repeats)
    step = median["rollout"] / answer
    _, work = sample_and_count(lm, params, {}, queue, ending.replace(max_concurrent=B), 0, 0)
    figures = {
        "peak, GFLOP/s": flops / 1e9,
        "bandwidth, GB/s": bytes_ / 1e9,
        "tokens/s": B * answer / median["rollout"],
        "ms a decode step": 1e3 * step,
        "share of the ceiling": bound / median["rollout"],
        "share of the ceiling, best run": bound / min(times["rollout"]),
        "log-prob capture, of a step": (parts["with its log-prob"] - parts["draw"]) / step,
        "top-k and top-p, of a step": median["top-k 50, top-p 0.9"] / median["rollout"] - 1,
        "exact / rollout": median["exact"] / median["rollout"],
        "static / slots": median["a queue, static"] / median["a queue, slots"],
        "slot utilisation": float(work.tokens / work.row_steps),
    }
    figures |= {
        f"{other} / {ours}": median[other] / median[ours]
        for other in ("transformers", "TRL", "Tunix")
        for ours in ("rollout", f"on {cfg.devices} devices")
        if other in median and ours in median
    }
    log_info(f"{cfg.preset}, {cfg.dtype}, on {jax.devices()[0].device_kind}, medians of {cfg.repeats}")
    table("seconds", [{"": name, "median": t, "best": min(times[name])} for name, t in median.items()])
    table("figures", [{"": name, "value": value} for name, value in figures.items()])
    if cfg.json:
        Path(cfg.json).write_text(json.dumps(figures | {f"seconds, {n}": t for n, t in median.items()}, indent=1))
    return figures


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.FlagConversionOff,)))
