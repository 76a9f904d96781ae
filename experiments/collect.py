r"""Human feedback: K completions of each prompt, compared by a person in the terminal, or by a simulated panel.

    python experiments/collect.py --model DIR --prompts prompts.jsonl --out preferences.jsonl
    python experiments/collect.py --model DIR --prompts prompts.jsonl --out preferences.jsonl --n 4 --ask scores
    python experiments/collect.py --model DIR --prompts experiments/story_openings.jsonl --out preferences.jsonl \
        --rewards animals --panel.annotators 3 --panel.flip 0.2

A person ranks the completions of a prompt ("2 1 3", the best first) or scores them ("7 3 5"), leaves one out with an
empty line, and stops with q. With --rewards a panel of annotators compares them, who know these rewards but for their
noise, bias and taste (experiments/common/panel.py has the equation). The file may be appended to at any time: the same
command goes on after its last prompt, with the same completions and votes as if it had never stopped.

A line of --out is a pair: "prompt", "chosen", "rejected", and "margin": the difference of scores, or of the shares of
votes. With it are the "votes" of a panel (true: for the chosen one; equal votes are decided by a coin), the number of
the prompt ("row") and of both completions ("pair"). dpo.py and reward_model.py read it. At the end stand the raw
agreement of the panel and Cohen's kappa, of more than two annotators Fleiss'.

Reached: not yet run.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.common import command_line, data, models
from experiments.common.feedback import (
    Candidates,
    append,
    compare_by_person,
    first_open,
    line_of,
    report_agreement,
    whole_lines,
)
from experiments.common.panel import check_panel, votes
from experiments.common.rewards import Rewards, load_score, read_rewards
from experiments.common.sampling import make_sampling
from experiments.common.settings import MeshShape, Panel, Rare, Reward, Sampling
from experiments.grpo import VERIFIERS
from rljax.data.examples import prompt_ids
from rljax.data.prompts import Prompts, from_template, read_jsonl
from rljax.data.stop_strings import streamed_text
from rljax.data.tokenizer import Tokenizer
from rljax.models import decoder, hf
from rljax.rewards.pool import Pool
from rljax.rollouts.sampler import sample
from rljax.train.log import log_info
from rljax.train.mesh import make_mesh
from rljax.types import PromptBatch, Trajectory


@dataclasses.dataclass(frozen=True)
class Config:
    """Which completions of which prompts are compared, and by whom."""

    model: str  # directory with config.json, *.safetensors and a tokenizer
    prompts: str  # jsonl file; each line an object, whose fields are the columns of a prompt
    out: str  # jsonl file of preferences, to write or to go on with
    template: str = "{prompt}"  # text of a prompt, columns in braces; \n is a new line
    chat: bool = False  # a prompt is a user's message, in the tokenizer's chat template
    count: int = 0  # prompts to collect for; 0: all
    n: int = 2  # completions per prompt; every two of them are compared
    ask: Literal["ranking", "scores"] = "ranking"  # what a person is asked for
    rewards: tuple[str, ...] = ()  # what a panel knows, NAME or NAME=WEIGHT each (docs/rewards.md); none: ask a person
    reward: Reward = Reward()
    panel: Panel = Panel()
    seed: int = 0  # of the order of prompts, of sampling and of votes
    sampling: Sampling = Sampling(max_tokens=128)
    rows: Rare[int] = 64  # completions sampled at a time; all of one prompt are sampled together
    dtype: Literal["float32", "bfloat16"] = "float32"  # of weights and computation
    mesh: MeshShape = MeshShape(fsdp=1, tensor=-1)


def main(cfg: Config, verifiers: dict = VERIFIERS, ask: Callable[[str], str] = input) -> list[dict]:
    """Collect, and return all lines of the file."""
    if cfg.n < 2:
        raise ValueError(f"n = {cfg.n}; at least 2 completions are compared")
    check_panel(cfg.panel)
    rewards = read_rewards(cfg.rewards, verifiers, cfg.reward)
    tokenizer, prompts, context = read_prompts(cfg)
    lines = whole_lines(cfg.out)
    start = first_open(cfg.out, lines, prompts, cfg.panel.annotators if cfg.rewards else 0)
    for candidates in sample_candidates(cfg, tokenizer, prompts, context, rewards, start):
        found = compare_by_panel(cfg, candidates) if cfg.rewards else compare_by_person(candidates, cfg.ask, ask)
        if found is None:
            break
        append(cfg.out, found)
        lines += found
    log_info(f"{len(lines)} comparisons in {cfg.out}")
    report_agreement(lines)
    return lines


# ---------------------------------------------------------------------------------------------- prompts and completions


def read_prompts(cfg: Config) -> tuple[Tokenizer, Prompts, int]:
    """The tokenizer, the prompts, and the tokens of the longest row. A prompt is a text, or a user's message."""
    config = hf.read_config(cfg.model)
    tokenizer = data.load_tokenizer(cfg.model, config.vocab_size)
    text_of = from_template(data.unescape(cfg.template))

    def prompt_of(row: dict) -> str | list[dict]:
        return [{"role": "user", "content": text_of(row)}] if cfg.chat else text_of(row)

    def encode(prompt: str | list[dict]) -> list[int]:
        return prompt_ids({"prompt": prompt}, tokenizer)

    longest = data.max_prompt_length(0, cfg.sampling.max_tokens, config.max_positions)
    columns = [{**row, "prompt": prompt_of(row)} for row in read_jsonl(cfg.prompts)]
    prompts = Prompts(columns, encode, lambda row: row["prompt"], longest, cfg.seed, tokenizer.pad)
    if prompts.dropped:
        log_info(f"{prompts.dropped} of {len(columns)} prompts dropped, longer than {longest} tokens")
    return tokenizer, prompts, prompts.length + cfg.sampling.max_tokens


def sample_candidates(
    cfg: Config, tokenizer: Tokenizer, prompts: Prompts, context: int, rewards: Rewards, start: int
) -> Iterator[Candidates]:
    """The completions of each prompt from number `start` on; what is sampled beside them does not depend on it."""
    total = min(cfg.count or len(prompts), len(prompts))
    if start >= total:
        return
    config = dataclasses.replace(hf.read_config(cfg.model, context), dtype=cfg.dtype)
    mesh = make_mesh(**dataclasses.asdict(cfg.mesh))
    params = models.load_decoder(cfg.model, config, mesh, cfg.dtype)
    lm = decoder.language_model(config)
    sampling = make_sampling(cfg.sampling, cfg.n, tokenizer, config.vocab_size)
    read = make_reader(cfg, tokenizer, config.vocab_size)
    size = max(cfg.rows // cfg.n, 1)
    with Pool(cfg.reward.workers, cfg.reward.timeout_seconds) as pool:
        answers = Path(f"{cfg.out}.answers")
        score = load_score(rewards, tokenizer, pool, mesh, cfg.dtype, cfg.model, answers) if cfg.rewards else None
        for begin in range(start // size * size, total, size):
            rows = prompts.draw(begin, min(size, total - begin))
            traj = sample(lm, params, {}, rows, sampling, cfg.seed, 0)
            traj = traj if score is None else score(traj, rows)
            yield from (found for found in candidates_of(traj, rows, cfg.n, read) if found.number >= start)


def make_reader(cfg: Config, tokenizer: Tokenizer, vocabulary: int) -> Callable[[np.ndarray], str]:
    """read(tokens) -> the text of a completion, with the space that it may begin with, without its stop."""
    strings = [data.unescape(string).encode() for string in cfg.sampling.stop_strings]
    pieces = data.token_bytes(tokenizer, vocabulary)
    for token in tokenizer.stop:
        pieces[token] = b""
    return lambda tokens: streamed_text(tokens, pieces, strings, True)


def candidates_of(traj: Trajectory, rows: PromptBatch, n: int, read: Callable) -> Iterator[Candidates]:
    """The completions of each prompt of a batch."""
    mask = np.asarray(traj.mask)
    texts = [read(tokens[own]) for tokens, own in zip(np.asarray(traj.actions), mask, strict=True)]
    scores = None if traj.rewards is None else np.asarray(traj.rewards).sum(axis=1)
    for p, (number, row) in enumerate(zip(rows.number, rows.columns, strict=True)):
        own = slice(p * n, (p + 1) * n)
        known = None if scores is None else scores[own]
        yield Candidates(int(number), row["prompt"], texts[own], mask[own].sum(axis=1), known)


# ----------------------------------------------------------------------------------------------------------- comparing


def compare_by_panel(cfg: Config, candidates: Candidates) -> list[dict]:
    """A line for each pair, by the majority of votes. Completions that could not be judged are left out."""
    judged = np.flatnonzero(~np.isnan(candidates.scores))
    if len(judged) < 2:
        return []
    all_votes = votes(candidates.scores[judged], candidates.lengths[judged], cfg.panel, cfg.seed, candidates.number)
    lines = []
    for (i, j), for_first in zip(itertools.combinations(judged.tolist(), 2), all_votes, strict=True):
        balance = 2 * int(for_first.sum()) - len(for_first)
        coin = np.random.default_rng([cfg.seed, candidates.number, i, j]).random() < 0.5
        first_wins = balance > 0 or (balance == 0 and coin)
        better, worse = (i, j) if first_wins else (j, i)
        found = {"margin": abs(balance) / len(for_first), "votes": (for_first == first_wins).tolist()}
        lines.append(line_of(candidates, better, worse) | found)
    return lines


if __name__ == "__main__":
    command_line.run(Config, main)
