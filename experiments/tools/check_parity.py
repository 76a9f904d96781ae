r"""Does rljax compute what transformers computes? Logits and log-probs of one model directory, compared in float32.

    pip install -e '.[parity]'                              # torch
    python experiments/tools/check_parity.py --model DIR

Both run on the CPU, transformers with eager attention. What transformers computes for each text alone is the reference;
rljax must compute the same for the text alone, through its KV cache, in a batch padded on the left, and with all texts
packed into one row. Then the model is written to a directory again, which transformers must load with the same bits.

Float32 rounds in proportion to the logits, so a difference is judged relative to the standard deviation of the logits
at its position (at least 1). On stories260k, whose logits reach 23, transformers' own eager and SDPA attention differ
by 2.3e-5, and its eager logits from exact ones by 2.0e-5. A wrong epsilon makes about 1e-3, other mistakes far more.

Reached (2 CPU cores, 21 s): stories260k 2.0e-5 at most, 3.8e-6 relative.
"""

import dataclasses
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import command_line
from rljax.data.prompts import pad_left
from rljax.data.tokenizer import load_tokenizer
from rljax.models import decoder, hf
from rljax.models.policy import make_policy
from rljax.train.log import log_info, table
from rljax.types import trajectory_of_tokens

TEXTS = (
    "Hi there.",
    "Once upon a time, there was a little girl named Lily.",
    "A bakery sold 14 loaves in the morning and 27 in the afternoon, at $3 each. How much money did it take?",
    "The moon rose over the quiet lake. A small boat drifted by, and the old man in it sang a song that no one on the "
    "shore had heard for many years; when he stopped, even the frogs were silent, and the water lay like black glass.",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare rljax with transformers on one model."""

    model: str  # a Hugging Face model directory
    tolerance: float = 2e-5  # largest relative difference that passes


class Difference(NamedTuple):
    largest: float  # absolute
    relative: float  # to the standard deviation of the logits at its position, or to 1


def main(cfg: Config) -> None:
    """Print the largest differences. Raises ValueError where one is above the tolerance."""
    config = hf.read_config(cfg.model)  # says clearly what is wrong with the directory
    encode = load_tokenizer(cfg.model, config.vocab_size).encode
    texts = [encode(text) for text in TEXTS]
    if min(map(len, texts)) < 2:  # a tokenizer that knows none of these words
        texts = [random_tokens(config.vocab_size, length) for length in (3, 20, 40)]
    found = compare(cfg.model, texts)
    table(cfg.model, [row(name, difference) for name, difference in found.items()])
    wrong = [name for name, difference in found.items() if not difference.relative <= cfg.tolerance]  # NaN is wrong too
    if wrong:
        raise ValueError(f"relative difference above the tolerance of {cfg.tolerance:g}: {'; '.join(wrong)}")
    log_info(f"all relative differences within {cfg.tolerance:g}")


def random_tokens(vocabulary: int, length: int) -> list[int]:
    """Token ids, the same for each length."""
    return np.random.default_rng(length).integers(vocabulary, size=length).tolist()


def row(name: str, difference: Difference) -> dict[str, str]:
    """A row of the table."""
    return {
        "rljax - transformers": name,
        "largest": f"{difference.largest:.1e}",
        "relative": f"{difference.relative:.1e}",
    }


def compare(directory: str, texts: list[list[int]]) -> dict[str, Difference]:
    """The largest differences of each comparison, over all texts (token ids, two at least, of any lengths)."""
    their_logits, their_logps = transformers_outputs(directory, texts)
    longest = max(map(len, texts))
    config = hf.read_config(directory, longest)
    params = {"decoder": hf.load(directory, config)}
    tokens, mask = pad_left(texts, longest, 0)
    right_tokens, right_mask = pad_right(texts, longest)
    our_logits = {
        "teacher-forced": unpadded(teacher_forced(config, params, right_tokens, right_mask), right_mask),
        "padded on the left": unpadded(teacher_forced(config, params, tokens, mask), mask),
        "through the cache": unpadded(cached(config, params, tokens, mask), mask),
        "packed": packed(config, params, texts),
    }
    scales = [np.maximum(logits.std(axis=1), 1.0) for logits in their_logits]
    out = {f"logits, {name}": largest(ours, their_logits, scales) for name, ours in our_logits.items()}
    check_written(directory, config, params)
    our_logps = trainer_logps(config, params, tokens, mask)
    out["log-probs, by the trainer"] = largest(our_logps, their_logps, [scale[:-1] for scale in scales])
    return out


def pad_right(texts: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B length] that begin in the first column, and the mask of real ones."""
    tokens, mask = pad_left([ids[::-1] for ids in texts], length, 0)
    return tokens[:, ::-1], mask[:, ::-1]


def unpadded(rows, mask) -> list[np.ndarray]:
    """The real columns of each row."""
    return [row[real] for row, real in zip(np.asarray(rows), np.asarray(mask), strict=True)]


def largest(ours, theirs, scales) -> Difference:
    """Over all texts; NaN where anything is."""
    absolute, relative = [], []
    for a, b, scale in zip(ours, theirs, scales, strict=True):
        difference = np.abs(np.asarray(a) - b).reshape(len(b), -1).max(axis=1)
        absolute.append(difference.max())
        relative.append((difference / scale).max())
    return Difference(float(np.max(absolute)), float(np.max(relative)))


def transformers_outputs(directory: str, texts: list[list[int]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Logits [T V] of each text, and the log-probs [T - 1] of its own tokens."""
    model = load_torch_model(directory)
    import torch

    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0] for ids in texts]
    logps = []
    for rows, ids in zip(logits, texts, strict=True):
        distribution = torch.log_softmax(rows[:-1], dim=-1)
        logps.append(distribution.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    return [rows.numpy() for rows in logits], [rows.numpy() for rows in logps]


def load_torch_model(directory: str | Path):
    """transformers' own model, float32, eager attention."""
    try:
        import torch
    except ModuleNotFoundError:
        raise ValueError("torch is not installed; the parity extra brings it: pip install -e '.[parity]'") from None
    import transformers

    transformers.utils.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(directory, attn_implementation="eager", dtype=torch.float32, local_files_only=True).eval()


def positions_and_segments(mask):
    """Of rows that may be padded on either side."""
    segments = jnp.asarray(mask, jnp.int32)
    return jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0), segments


@partial(jax.jit, static_argnames="config")
def feed(config: decoder.DecoderConfig, params, tokens, positions, segments, cache=None):
    """Logits [B T V], and the cache with these tokens."""
    hidden, cache = decoder.forward(config, params["decoder"], tokens, positions, segments, cache)
    return decoder.logits(config, params["decoder"], hidden), cache


def teacher_forced(config: decoder.DecoderConfig, params, tokens, mask):
    """Logits [B T V] of whole rows."""
    return feed(config, params, tokens, *positions_and_segments(mask))[0]


def cached(config: decoder.DecoderConfig, params, tokens, mask):
    """Logits [B T V]: the first half of the columns at once, then column by column."""
    B, T = tokens.shape
    positions, segments = positions_and_segments(mask)
    cache = decoder.init_cache(config, B, T)
    pieces = [slice(0, T // 2), *(slice(t, t + 1) for t in range(T // 2, T))]
    out = []
    for piece in pieces:
        logits, cache = feed(config, params, tokens[:, piece], positions[:, piece], segments[:, piece], cache)
        out.append(logits)
    return jnp.concatenate(out, axis=1)


def packed(config: decoder.DecoderConfig, params, texts: list[list[int]]) -> list[np.ndarray]:
    """Logits [T V] of each text, all in one row."""
    lengths = [len(ids) for ids in texts]
    tokens = jnp.asarray(np.concatenate(texts), jnp.int32)[None]
    positions = jnp.asarray(np.concatenate([np.arange(n) for n in lengths]), jnp.int32)[None]
    segments = jnp.asarray(np.repeat(np.arange(len(texts)) + 1, lengths), jnp.int32)[None]
    logits, _ = feed(config, params, tokens, positions, segments)
    return np.split(np.asarray(logits[0]), np.cumsum(lengths)[:-1])


def check_written(directory: str, config: decoder.DecoderConfig, params) -> None:
    """Raises ValueError unless transformers reads the same bits from what we write as from `directory`."""
    import torch

    first = load_torch_model(directory).state_dict()
    with tempfile.TemporaryDirectory() as temporary:
        written = Path(temporary, "written")
        hf.save(written, config, params["decoder"], directory, dtype="float32")
        again = load_torch_model(written).state_dict()
    different = [name for name in first.keys() | again.keys() if not torch.equal(first[name], again[name])]
    if different:
        raise ValueError(f"written again, {len(different)} tensors are not the same bits, among them {different[0]}")


def trainer_logps(config: decoder.DecoderConfig, params, tokens, mask) -> list[np.ndarray]:
    """Log-probs [T - 1] of each row's own tokens, as the trainer computes them."""
    traj = trajectory_of_tokens(tokens, mask.astype(np.int32), jnp.asarray(mask), jnp.zeros(tokens.shape))
    return unpadded(jax.jit(make_policy(config))(params, {}, traj).logp, traj.mask)


if __name__ == "__main__":
    command_line.run(Config, main, one_process=True, makes_run=False)
