r"""Answers of a Hugging Face model directory, as they are drawn.

    python experiments/generate.py --model DIR --prompt "Once upon a time" --n 2 --sampling.max_tokens 100
    python experiments/generate.py --model DIR --prompts gsm8k_test.jsonl --template "Question: {question}\nAnswer:" \
        --n 8 --sampling.stop_strings "\n\n" "Question:" --out answers.jsonl
    python experiments/generate.py --model DIR --prompt "Who are you?" --chat --sampling.temperature 0

On a terminal one reads along; in a pipe an answer is printed when it is whole. It depends on the seed, the place of its
prompt among the prompts and its own number, not on what is drawn beside it. A line of --out is a prompt with its
`columns`; of each answer the text (`answer`), the sum of its log-probs at the temperature (`logp`; at 1 where that is
0), the number of `tokens`, and why it `ended`: stop or length. The shortest prompts come first.

Reached: stories260k, 64 prompts x 8 answers of 100 tokens, --rows 64, on 2 shared AMD EPYC cores: 51,200 tokens
in 6.2 s with programs that an earlier run had compiled, typically 17,431 a second; 13.8 s the first time.
"""

import dataclasses
import json
import re
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from rljax.rollouts.decode_state import Completions
from rljax.rollouts.sample_token import check_sampling
from rljax.rollouts.streaming import stream

import options
from rljax.data.prompts import Prompts, from_template, read_jsonl
from rljax.data.stop_strings import streamed_text
from rljax.data.tokenizer import Tokenizer
from rljax.models import decoder, hf
from rljax.train import mesh as meshes
from rljax.train.log import format_number, is_interactive, log_info

ENDED = ("length", "stop")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # a model may write what a terminal obeys


@dataclasses.dataclass(frozen=True)
class Config:
    """Which model is asked what."""

    model: str  # directory with config.json, *.safetensors and a tokenizer
    prompt: str = ""  # a text
    prompts: str = ""  # or a jsonl of many; each line an object, its fields are the columns
    template: str = "{prompt}"  # of a prompt, columns in braces; \n is a new line
    chat: bool = False  # a prompt is what a user says, in the tokenizer's chat template
    n: int = 1  # answers to each
    seed: int = 0  # of the answers
    sampling: options.Sampling = options.Sampling(max_tokens=256)
    rows: int = 32  # answers drawn at a time, but all of a prompt's together
    out: str = ""  # a jsonl to write
    dtype: Literal["float32", "bfloat16"] = "float32"  # of weights and computation
    mesh: options.MeshShape = options.MeshShape(fsdp=1, tensor=-1)


def main(cfg: Config) -> list[dict]:
    """Print the answers, and return what `out` holds."""
    if cfg.out and Path(cfg.out).exists():
        raise ValueError(f"--out {cfg.out} exists; legal: a new file")
    if cfg.sampling.max_concurrent is not None:
        raise ValueError(
            f"max_concurrent = {cfg.sampling.max_concurrent}, but --rows says how many are drawn; legal in a stream: max_concurrent=None"
        )
    config, mesh = hf.read_config(cfg.model), meshes.make_mesh(**dataclasses.asdict(cfg.mesh))
    tokenizer = options.tokenizer(cfg.model, config.vocab_size)
    prompts, text = read_prompts(cfg, tokenizer, config.max_positions)
    sampling = options.sampling(cfg.sampling, cfg.n, tokenizer, config.vocab_size)
    strings = [options.new_lines(string).encode() for string in cfg.sampling.stop_strings]
    pieces = options.token_bytes(tokenizer, config.vocab_size)
    pieces = [b"" if i in tokenizer.stop else piece for i, piece in enumerate(pieces)]
    check_sampling(sampling)

    def read(answers: Completions, i: int) -> str:
        return streamed_text(answers.tokens[i, : answers.num_tokens[i]], pieces, strings, bool(answers.done[i]))

    config = hf.read_config(cfg.model, prompts.length + cfg.sampling.max_tokens)
    config = dataclasses.replace(config, dtype=cfg.dtype)
    places = meshes.param_shardings(mesh, decoder.param_axes(config), decoder.abstract(config))
    params, lm = {"decoder": hf.load(cfg.model, config, places, cfg.dtype)}, decoder.language_model(config)

    records, rates, began = [], [], time.perf_counter()
    for rows in prompts.batches(max(cfg.rows // cfg.n, 1)):
        asked = [text(row) for row in rows.columns]
        heads = [f"[{i + 1}/{len(prompts)}] " * (len(prompts) > 1) for i in rows.number]
        apart = "\n" * (cfg.chat or cfg.n > 1)
        drawn = stream(lm, params, {}, rows, sampling, cfg.seed, 0, every=1 if is_interactive() else 16)
        answers = show(drawn, heads, [prompt + apart for prompt in asked], cfg.n, read, rates)
        for p, prompt in enumerate(asked):
            records.append(record(prompt, rows.columns[p], answers, range(p * cfg.n, (p + 1) * cfg.n), read))
        if cfg.out:
            with open(cfg.out, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in records[-len(asked) :])
    tokens = sum(sum(line["tokens"]) for line in records)
    pace = f", typically {format_number(statistics.median(rates))} a second" if rates else ""
    log_info(f"{tokens:,} tokens in {time.perf_counter() - began:.1f} s{pace}", "dim")
    return records


def read_prompts(cfg: Config, tokenizer: Tokenizer, context: int) -> tuple[Prompts, Callable[[dict], str]]:
    """The prompts, and how a row becomes one. Those that leave no room for an answer are dropped and counted."""
    if bool(cfg.prompt) == bool(cfg.prompts):
        raise ValueError("what is asked? legal: --prompt TEXT or --prompts FILE.jsonl, one of them")
    if cfg.chat and tokenizer.chat is None:
        raise ValueError(f"{cfg.model}: the tokenizer has no chat template; legal: without --chat")
    columns = [{"prompt": cfg.prompt}] if cfg.prompt else read_jsonl(cfg.prompts)
    text, encode = from_template(options.new_lines(cfg.template)), tokenizer.chat if cfg.chat else tokenizer.encode
    longest = options.longest_prompt(0, cfg.sampling.max_tokens, context)
    prompts = Prompts(columns, encode, text, longest, pad=tokenizer.pad)
    if prompts.dropped:
        log_info(f"{prompts.dropped} of {len(columns)} prompts dropped, over {longest} tokens")
    return prompts, text


def show(
    drawn: Iterable[Completions], heads: list[str], asked: list[str], n: int, read: Callable, rates: list
) -> Completions:
    """Print answer after answer: on a terminal, the first that is not over as it grows. Returns the last of `drawn`.

    Appends to `rates` the tokens a second of each stretch but the first, for which the prompts are read.
    """
    at, shown, before = 0, 0, None  # shown: how much of answer `at`
    begin(heads, asked, n, at)
    for answers in drawn:
        now, tokens = time.perf_counter(), int(answers.num_tokens.sum())
        if before is not None:
            rates.append((tokens - before[1]) / (now - before[0]))
        while at < len(answers.done) and (is_interactive() or answers.done[at]):
            text = CONTROL.sub("\N{REPLACEMENT CHARACTER}", read(answers, at))
            log_info(text[shown:], end="")
            shown = len(text)
            if not answers.done[at]:
                break
            why = ENDED[bool(answers.terminated[at])]
            log_info(f"\n({answers.num_tokens[at]} tokens, {why}, log-prob {answers.logp[at].sum():.1f})", "dim")
            at, shown = at + 1, 0
            if at < len(answers.done):
                begin(heads, asked, n, at)
        before = time.perf_counter(), tokens
    return answers


def begin(heads: list[str], asked: list[str], n: int, at: int) -> None:
    """What stands before answer `at`: its prompt, and its number where there are several."""
    prompt, answer = divmod(at, n)
    if answer == 0:
        log_info(heads[prompt], "dim", end="")
        log_info(CONTROL.sub("\N{REPLACEMENT CHARACTER}", asked[prompt]), "bold", end="")
    if n > 1:
        log_info(f"{answer + 1}/{n} ", "cyan", end="")


def record(prompt: str, columns: dict, answers: Completions, which: range, read: Callable) -> dict:
    """A line of --out."""
    of = list(which)
    return {
        "prompt": prompt,
        "columns": columns,
        "answer": [read(answers, i) for i in of],
        "tokens": answers.num_tokens[of].tolist(),
        "logp": answers.logp[of].sum(axis=1).tolist(),
        "ended": [ENDED[bool(stopped)] for stopped in answers.terminated[of]],
    }


if __name__ == "__main__":
    options.run(Config, main)
