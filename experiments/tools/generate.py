r"""Completions of a Hugging Face model directory, printed as they are sampled.

    python experiments/tools/generate.py --model DIR --prompt "Once upon a time" --n 2 --sampling.max_tokens 100
    python experiments/tools/generate.py --model DIR --prompts gsm8k_test.jsonl \
        --template "Question: {question}\nAnswer:" \
        --n 8 --sampling.stop_strings "\n\n" "Question:" --out completions.jsonl
    python experiments/tools/generate.py --model DIR --prompt "Who are you?" --chat --sampling.temperature 0
    python experiments/tools/generate.py --model DIR --chat      # in turns: what is typed, or the lines of a pipe

On a terminal a completion is printed token by token; in a pipe it is printed when it has ended. It depends on the seed,
on which prompt it is of, and on its own number, not on what is sampled beside it. A line of --out is a prompt with its
`columns`; of each completion the text (`completion`), the sum of its log-probs at the temperature (`logp`; at 1 where
that is 0), the number of `tokens`, and why it `ended`: stop or length. The shortest prompts come first. A conversation
in turns is one line, with its `messages`.

Reached: stories260k, 64 prompts x 8 completions of 100 tokens, --rows 64, on 2 shared AMD EPYC cores: 51,200 tokens
in 6.2 s with programs that an earlier run had compiled, typically 17,431 a second; 13.8 s the first time.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.common import command_line, data, models
from experiments.common.rows import make_shape, read_rows, text_of_prompt, unescape
from experiments.common.sampling import make_sampling
from experiments.common.settings import MeshShape, Rows, Sampling
from rljax.data.chat import encode_prompt, encode_reply
from rljax.data.files import Table, read_table
from rljax.data.prompts import Prompts, pad_left, padded_width
from rljax.data.stop_strings import streamed_text
from rljax.data.tokenizer import Tokenizer, load_tokenizer
from rljax.models import decoder, hf
from rljax.rollouts.decode_state import Completions
from rljax.rollouts.sample_token import check_sampling
from rljax.rollouts.sampler import prepare_once
from rljax.rollouts.streaming import stream
from rljax.train.log import format_number, is_interactive, log_info
from rljax.train.mesh import make_mesh
from rljax.types import PromptBatch

REASONS = ("length", "stop")


@dataclasses.dataclass(frozen=True)
class Config:
    """Which model completes which prompts."""

    model: str  # directory with config.json, *.safetensors and a tokenizer
    prompt: str = ""  # the text of one prompt
    prompts: str = ""  # or a jsonl file of many; each line an object, its fields are the columns
    template: str = "{prompt}"  # text of a prompt, columns in braces; \n is a new line
    chat: bool = False  # a prompt is a user's message, in the tokenizer's chat template; without one: talk in turns
    n: int = 1  # completions per prompt
    seed: int = 0  # of sampling
    sampling: Sampling = Sampling(max_tokens=256)
    rows: int = 32  # completions sampled at a time; all of one prompt are sampled together
    out: str = ""  # jsonl file to write
    dtype: Literal["float32", "bfloat16"] = "float32"  # of weights and computation
    mesh: MeshShape = MeshShape(fsdp=1, tensor=-1)


def main(cfg: Config) -> list[dict]:
    """Print the completions, and return what `out` holds."""
    check_settings(cfg)
    if in_turns(cfg):
        return talk(cfg, typed_lines())

    # -- tokenizer and prompts
    config = hf.read_config(cfg.model)
    tokenizer = load_tokenizer(cfg.model, config.vocab_size)
    prompts = read_prompts(cfg, tokenizer, config.max_positions)
    sampling = make_sampling(cfg.sampling, cfg.n, tokenizer, config.vocab_size)
    check_sampling(sampling)
    read = make_reader(cfg, tokenizer, config.vocab_size)

    # -- model
    mesh = make_mesh(**cfg.mesh.sizes)
    config, params = models.load_model(cfg.model, mesh, cfg.dtype, prompts.length + cfg.sampling.max_tokens)
    lm, params, frozen = prepare_once(decoder.language_model(config), params, {})

    # -- sample, print, write
    records = []
    rates = []
    start = time.perf_counter()
    for rows in prompts.batches(max(cfg.rows // cfg.n, 1)):
        texts = list(map(text_of_prompt, rows.as_read))
        labels = [f"[{i + 1}/{len(prompts)}] " if len(prompts) > 1 else "" for i in rows.number]
        gap = "\n" if cfg.chat or cfg.n > 1 else ""
        stages = stream(lm, params, frozen, rows, sampling, cfg.seed, 0, every=1 if is_interactive() else 16)
        answers = show(stages, labels, [text + gap for text in texts], cfg.n, read, rates)
        new = [record(texts[p], rows.columns[p], answers, p, cfg.n, read) for p in range(len(texts))]
        if cfg.out:
            append(cfg.out, new)
        records += new
    tokens = sum(sum(line["tokens"]) for line in records)
    rate = f", typically {format_number(statistics.median(rates))} a second" if rates else ""
    log_info(f"{tokens:,} tokens in {time.perf_counter() - start:.1f} s, compiling included{rate}", "dim")
    return records


def check_settings(cfg: Config) -> None:
    """Raise ValueError, before anything is loaded, for settings that exclude each other."""
    if cfg.out and Path(cfg.out).exists():
        raise ValueError(f"--out {cfg.out} exists; legal: a new file")
    if cfg.sampling.max_concurrent is not None:
        raise ValueError(
            f"max_concurrent = {cfg.sampling.max_concurrent}, but --rows says how many are sampled at a time; "
            "legal in a stream: max_concurrent=None"
        )
    if in_turns(cfg):
        if cfg.n != 1:
            raise ValueError(
                f"--n {cfg.n}, but a conversation goes on from one completion; legal: --n 1, or a --prompt"
            )
    elif bool(cfg.prompt) == bool(cfg.prompts):
        raise ValueError("which prompts? legal: --prompt TEXT or --prompts FILE.jsonl, one of them")


def in_turns(cfg: Config) -> bool:
    """Whether the model is talked to in turns."""
    return cfg.chat and not (cfg.prompt or cfg.prompts)


# ------------------------------------------------------------------------------------------------------------ in turns


def typed_lines() -> Iterator[str]:
    """What is typed, line by line, until an empty line or the end of the input; the lines of a pipe."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line and sys.stdin.isatty():
            return
        if line:
            yield line


def talk(cfg: Config, lines: Iterable[str]) -> list[dict]:
    """Answer line after line; the model reads the conversation so far, its own turns as the tokens that it sampled."""
    config = hf.read_config(cfg.model)
    tokenizer = load_tokenizer(cfg.model, config.vocab_size)
    _check_chat(cfg, tokenizer)
    chat = tokenizer.chat
    sampling = make_sampling(cfg.sampling, 1, tokenizer, config.vocab_size)
    check_sampling(sampling)
    read = make_reader(cfg, tokenizer, config.vocab_size)
    context = config.max_positions
    config, params = models.load_model(cfg.model, make_mesh(**cfg.mesh.sizes), cfg.dtype, context)
    lm, params, frozen = prepare_once(decoder.language_model(config), params, {})

    messages: list[dict] = []
    ids: list[int] = []
    try:
        for turn, line in enumerate(lines):
            question = {"role": "user", "content": line}
            stopped = bool(ids) and ids[-1] in tokenizer.stop
            ids += (
                encode_reply(chat, messages[:-1], stopped, [question]) if messages else encode_prompt(chat, [question])
            )
            if len(ids) + cfg.sampling.max_tokens > context:
                log_info(
                    f"the conversation has {len(ids)} tokens: of {context} too few are left for an answer", "yellow"
                )
                break
            tokens, mask = pad_left([ids], padded_width(len(ids)), tokenizer.pad)
            rows = PromptBatch(tokens, mask, np.zeros(1, np.int32), [{}], 0)
            stages = stream(lm, params, frozen, rows, sampling, cfg.seed, turn, every=1 if is_interactive() else 16)
            answers = show(stages, [""], [""], 1, read, [])
            ids += np.asarray(answers.tokens[0, : answers.num_tokens[0]]).tolist()
            messages += [question, {"role": "assistant", "content": read(answers, 0)}]
    finally:  # also after Ctrl-C: what was said is kept
        if cfg.out:
            append(cfg.out, [{"messages": messages}])
    return [{"messages": messages}]


# -------------------------------------------------------------------------------------------------------- completions


def _check_chat(cfg: Config, tokenizer: Tokenizer) -> None:
    if tokenizer.chat is None:
        raise ValueError(f"{cfg.model}: the tokenizer has no chat template; legal: without --chat")


def read_prompts(cfg: Config, tokenizer: Tokenizer, context: int) -> Prompts:
    """The prompts. Those that leave no room for a completion are dropped and counted."""
    if cfg.chat:
        _check_chat(cfg, tokenizer)
    shape = make_shape(cfg.template, "", Rows(chat=cfg.chat))
    table = Table("--prompt", [{"prompt": cfg.prompt}], [1]) if cfg.prompt else read_table(cfg.prompts)
    found = read_rows(table, shape, data.read_prompt, tokenizer)
    longest = data.max_prompt_length(0, cfg.sampling.max_tokens, context)
    prompts = data.as_prompts(found, tokenizer, longest)
    if prompts.dropped:
        log_info(f"{prompts.dropped} of {len(found)} prompts dropped, longer than {longest} tokens")
    return prompts


def make_reader(cfg: Config, tokenizer: Tokenizer, vocabulary: int) -> Callable[[Completions, int], str]:
    """read(answers, i) -> the text of completion i so far, without its stop token or string."""
    strings = [unescape(string).encode() for string in cfg.sampling.stop_strings]
    pieces = data.token_bytes(tokenizer, vocabulary)
    for token in tokenizer.stop:
        pieces[token] = b""

    def read(answers: Completions, i: int) -> str:
        tokens = answers.tokens[i, : answers.num_tokens[i]]
        return streamed_text(tokens, pieces, strings, bool(answers.done[i]))

    return read


def show(
    stages: Iterable[Completions], labels: list[str], prompts: list[str], n: int, read: Callable, rates: list[float]
) -> Completions:
    """Print completion after completion; on a terminal, the first unfinished one as it grows. Returns the last stage.

    Appends the tokens per second of each stage to `rates`, without the first, which also reads the prompts.
    """
    current = 0
    printed = 0  # characters of the current completion
    before = None
    print_header(labels, prompts, n, current)
    for answers in stages:
        now = time.perf_counter()
        tokens = int(answers.num_tokens.sum())
        if before is not None:
            rates.append((tokens - before[1]) / (now - before[0]))
        while current < len(answers.done) and (is_interactive() or answers.done[current]):
            text = read(answers, current)
            log_info(text[printed:], end="")
            printed = len(text)
            if not answers.done[current]:
                break
            print_footer(answers, current)
            current += 1
            printed = 0
            if current < len(answers.done):
                print_header(labels, prompts, n, current)
        before = time.perf_counter(), tokens
    return answers


def print_header(labels: list[str], prompts: list[str], n: int, i: int) -> None:
    """What stands before completion i: its prompt, and its number where there are several."""
    prompt, completion = divmod(i, n)
    if completion == 0:
        log_info(labels[prompt], "dim", end="")
        log_info(prompts[prompt], "bold", end="")
    if n > 1:
        log_info(f"{completion + 1}/{n} ", "cyan", end="")


def print_footer(answers: Completions, i: int) -> None:
    """How completion i ended."""
    reason = REASONS[bool(answers.terminated[i])]
    log_info(f"\n({answers.num_tokens[i]} tokens, {reason}, log-prob {answers.logp[i].sum():.1f})", "dim")


def record(prompt: str, columns: dict, answers: Completions, p: int, n: int, read: Callable) -> dict:
    """A line of --out: the n completions of the batch's prompt p."""
    rows = list(range(p * n, (p + 1) * n))
    return {
        "prompt": prompt,
        "columns": columns,
        "completion": [read(answers, i) for i in rows],
        "tokens": answers.num_tokens[rows].tolist(),
        "logp": answers.logp[rows].sum(axis=1).tolist(),
        "ended": [REASONS[bool(stopped)] for stopped in answers.terminated[rows]],
    }


def append(path: str, records: list[dict]) -> None:
    """Append lines to a jsonl file."""
    with open(path, "a", encoding="utf-8") as file:
        for line in records:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    command_line.run(Config, main, one_process=True, makes_run=False)
