r"""How good a model is on a file of prompts: pass@k, maj@k, avg@n with intervals, and its greedy completions.

    python experiments/evaluate.py --model DIR --prompts gsm8k_test.jsonl --template "{question}\n" --rewards number
    python experiments/evaluate.py --model runs/grpo/RUN/model --prompts math.jsonl --rewards math --n 16 --k 1 4 16

A completion is correct where its reward, the weighted sum of --rewards, is at least --right.

    avg@n     share of the n completions of a prompt that are correct
    pass@k    probability that k completions hold a correct one, from all n without bias (arXiv:2107.03374)
    maj@k     how often the answer that most of k completions give is correct; for verifiers that read a final answer
    reward    mean of the rewards
    greedy    share of prompts whose completion at temperature 0 is correct

Each is a mean over prompts with its 95 % interval: the completions of a prompt are not independent of each other, so
prompts are what is counted. Of shares that is Wilson's interval (experiments/common/intervals.py), which has a width
where all prompts agree, too; of the reward ± 1.96 standard errors. A completion that could not be judged is left out of
all of them, and a prompt with fewer than k judged ones of pass@k and maj@k, whatever else is known of it; the last line
counts both. DIRECTORY/samples.jsonl has every completion with its reward,
DIRECTORY/summary.json the numbers. An interrupted run goes on with the next prompts; a completion depends on the seed,
not on what is sampled beside it.

Reached: stories260k, 40 story openings x 4 completions of 40 tokens, animals, --right 0.5: avg@4 0.013 ± 0.017,
pass@4 0.050 ± 0.068, greedy 0.000.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

import jax.numpy as jnp
import numpy as np

from experiments.common import command_line, models, runs
from experiments.common.intervals import standard_error_interval, wilson_interval
from experiments.common.records import append_lines, judged_prompts, read_lines
from experiments.common.rewards import check_compared, load_score, read_rewards
from experiments.common.sampling import greedy_of, make_sampling
from experiments.common.settings import MeshShape, Rare, Reward, Rows, Sampling, Weights
from experiments.common.verifiers import VERIFIERS, find_final_answer
from rljax.models import decoder
from rljax.ops.pass_at_k import majority_at_k, pass_at_k, powers_of_two
from rljax.rewards.pool import Pool
from rljax.rollouts.sampler import sample
from rljax.train.log import log_info, table, write_atomically
from rljax.train.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Config:
    """Completions of a model, judged and counted."""

    model: str  # directory with config.json, *.safetensors and a tokenizer
    prompts: str  # jsonl file; each line an object, whose fields are the columns of a prompt
    template: str = "{prompt}"  # text of a prompt, columns in braces; \n is a new line
    data: Rows = Rows()
    max_prompt_tokens: Rare[int] = 0  # tokens of a prompt, longer ones are dropped; 0: what the context leaves
    rewards: tuple[str, ...] = ("number",)  # NAME or NAME=WEIGHT each; see docs/rewards.md
    reward: Reward = Reward()
    right: float = 1.0  # least reward of a correct completion
    n: int = 8  # completions per prompt at the temperature; 0: greedy ones only
    k: tuple[int, ...] = ()  # of pass@k and maj@k; default: 1, 2, 4 .. n
    greedy: bool = True  # one more completion of each prompt, at temperature 0
    prompts_at_once: int = 16  # prompts whose completions are sampled together
    seed: int = 0  # of sampling
    sampling: Sampling = Sampling(max_tokens=128)
    weights: Weights = Weights()
    mesh: MeshShape = MeshShape(fsdp=1, tensor=-1)
    directory: str = ""  # of the run; default runs/evaluate/MODEL-PROMPTS-seedSEED-DIGEST, that of the other settings
    debug: bool = False  # without jit, with NaN checks


def main(cfg: Config, verifiers: dict = VERIFIERS) -> dict[str, dict[str, float]]:
    """Sample, judge and count; return name -> {"mean", "low", "high", "prompts"}."""
    check_sizes(cfg)
    models.check_not_trained(cfg.weights)
    check_compared(cfg, {"n": cfg.n}, "the greedy one stands alone; legal: --no_greedy" * cfg.greedy)
    rewards = read_rewards(cfg.rewards, verifiers, cfg.reward)
    mesh = make_mesh(**cfg.mesh.sizes)

    # -- model and data
    tokenizer, prompts = runs.read_all_prompts(cfg, rewards.verifiers)
    context = prompts.length + cfg.sampling.max_tokens
    config, params, frozen = models.load_pretrained(cfg.model, cfg.weights, mesh, context)
    lm = decoder.language_model(config)
    sampling = make_sampling(cfg.sampling, max(cfg.n, 1), tokenizer, config.vocab_size)
    kinds = {"sampled": sampling} if cfg.n else {}
    if cfg.greedy:
        kinds["greedy"] = greedy_of(sampling)

    # -- sample and judge
    settings = runs.settings_but(cfg, "right", "k")  # which are read at the end only: they may change
    directory = cfg.directory or f"runs/evaluate/{runs.name_of(cfg)}-{runs.digest_of(settings)}"
    run = runs.make_run_of_one_step(cfg, directory, settings, __file__, rewards.verifiers)
    with run, Pool(cfg.reward.workers, cfg.reward.timeout_seconds) as pool:
        score = load_score(rewards, tokenizer, pool, mesh, cfg.weights.dtype, run.directory)
        log = run.directory / "samples.jsonl"
        records = read_lines(log)
        done = {(record["kind"], record["number"]) for record in records}
        for rows in prompts.batches(cfg.prompts_at_once):
            for kind, how in kinds.items():
                if done >= {(kind, number) for number in rows.number.tolist()}:
                    continue
                traj = score(sample(lm, params, frozen, rows, how, cfg.seed, step=0), rows)
                judged = judged_prompts(traj, rows, tokenizer.decode)
                new = [{"kind": kind} | one for one in judged if (kind, one["number"]) not in done]
                append_lines(log, new)
                records += new
            log_info(f"{len(records) // len(kinds)} of {len(prompts)} prompts", "dim")
        records.sort(key=lambda record: record["number"])
        found = summarize(cfg, records, find_final_answer(rewards.verifiers))
        write_atomically(run.directory / "summary.json", json.dumps(found, indent=2) + "\n")
    table(f"{cfg.model} on {len(prompts)} prompts", [{"": name} | numbers for name, numbers in found.items()])
    log_info(sentence(found, records))
    return found


def check_sizes(cfg: Config) -> None:
    """Raise ValueError, before anything is loaded, for numbers of completions that make no sense."""
    if cfg.n < 0 or cfg.prompts_at_once < 1 or not (cfg.n or cfg.greedy):
        sizes = f"n = {cfg.n}, greedy = {cfg.greedy}, prompts_at_once = {cfg.prompts_at_once}"
        raise ValueError(f"{sizes}; legal: n of at least 1, or 0 with --greedy, and at least 1 prompt at once")
    if wrong := [k for k in cfg.k if not 1 <= k <= cfg.n]:
        raise ValueError(f"k = {wrong[0]} of n = {cfg.n} completions; legal: 1 to {cfg.n}")
    if cfg.n and cfg.sampling.temperature == 0:
        raise ValueError("temperature is 0: all completions of a prompt would be the greedy one; legal: --n 0")


# --------------------------------------------------------------------------------------------------------- the numbers


def summarize(cfg: Config, records: list[dict], final_answer: Callable | None) -> dict[str, dict[str, float]]:
    """name -> its mean over prompts, with its interval."""
    found: dict[str, dict[str, float]] = {}
    sampled = [record for record in records if record["kind"] == "sampled"]
    if sampled:
        rewards = rewards_of(sampled)
        judged = np.isfinite(rewards)
        correct = rewards >= cfg.right
        count = judged.sum(axis=1)
        found[f"avg@{cfg.n}"] = share_of(mean_of(correct, judged), cfg.n)
        for k in cfg.k or powers_of_two(cfg.n):
            passed = np.asarray(pass_at_k(jnp.asarray(count), jnp.asarray(correct.sum(axis=1)), k))
            found[f"pass@{k}"] = share_of(passed, cfg.n // k)
        if final_answer is not None:
            answers = answer_ids(sampled, final_answer)
            for k in cfg.k or powers_of_two(cfg.n):
                found[f"maj@{k}"] = share_of(majority_of_judged(answers, correct, judged, k), cfg.n // k)
        found["reward"] = over_prompts(mean_of(rewards, judged), standard_error_interval)
    greedy = [record for record in records if record["kind"] == "greedy"]
    if greedy:
        rewards = rewards_of(greedy)
        found["greedy"] = share_of(mean_of(rewards >= cfg.right, np.isfinite(rewards)), 1)
    return found


def rewards_of(records: list[dict]) -> np.ndarray:
    """[P n] NaN for completions that could not be judged."""
    return np.array([record["rewards"] for record in records], np.float64)


def mean_of(values: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """[P] the mean over the judged completions of each prompt, NaN for a prompt without one."""
    total = np.where(judged, values, 0.0).sum(axis=1)
    return np.where(judged.any(axis=1), total / np.maximum(judged.sum(axis=1), 1), np.nan)


def majority_of_judged(answers: np.ndarray, correct: np.ndarray, judged: np.ndarray, k: int) -> np.ndarray:
    """[P] maj@k of the judged completions of each prompt, NaN for a prompt with fewer than k."""
    found = np.full(len(answers), np.nan)
    count = judged.sum(axis=1)
    for n in np.unique(count[count >= k]):
        rows = np.flatnonzero(count == n)
        of_rows = (x[rows][judged[rows]].reshape(len(rows), n) for x in (answers, correct))
        found[rows] = majority_at_k(*map(jnp.asarray, of_rows), k)
    return found


def share_of(values: np.ndarray, trials: int) -> dict[str, float]:
    """The mean over prompts of shares of `trials` trials each, with Wilson's interval."""
    return over_prompts(values, partial(wilson_interval, trials=trials))


def over_prompts(values: np.ndarray, interval: Callable[[np.ndarray], tuple[float, float]]) -> dict[str, float]:
    """The mean over prompts and its interval. Prompts with NaN are left out."""
    known = values[np.isfinite(values)]
    mean = known.mean() if len(known) else np.nan
    low, high = interval(known) if len(known) else (np.nan, np.nan)
    return {"mean": float(mean), "low": float(low), "high": float(high), "prompts": len(known)}


def answer_ids(records: list[dict], final_answer: Callable[[str], object]) -> np.ndarray:
    """[P n] an id for each different final answer of a prompt, -1 where a completion has none."""
    rows = []
    for record in records:
        ids: dict[object, int] = {None: -1}
        rows.append([ids.setdefault(final_answer(text), len(ids)) for text in record["completions"]])
    return np.array(rows)


def sentence(found: Mapping[str, Mapping[str, float]], records: list[dict]) -> str:
    """The numbers in one line."""
    prompts = max(Counter(record["kind"] for record in records).values())
    parts = [
        f"{name} {of['mean']:.3f} ({of['low']:.3f} to {of['high']:.3f})"
        + f" without {prompts - of['prompts']} of {prompts} prompts" * (of["prompts"] < prompts)
        for name, of in found.items()
    ]
    missing = sum(reward is None for record in records for reward in record["rewards"])
    return "eval: " + ", ".join(parts) + (f"; {missing} completions not judged" if missing else "")


if __name__ == "__main__":
    command_line.run(Config, main, one_process=True)
