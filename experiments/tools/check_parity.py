r"""Does rljax compute what transformers computes? Logits and log-probs of one model directory, compared in float32.

    pip install -e '.[parity]'                              # torch
    python experiments/check_parity.py --model DIR

Both run on the CPU, transformers with eager attention. What transformers says of each text alone is the reference;
rljax must say the same with the text alone, through its KV cache, in a batch padded on the left, and with all texts
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

import options
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
    encode = load_tokenizer(cfg.model).encode
    texts = [encode(text) for text in TEXTS]
    if min(map(len, texts)) < 2:  # a tokenizer that knows none of these words
        texts = [np.random.default_rng(n).integers(config.vocab_size, size=n).tolist() for n in (3, 20, 40)]
    found = compare(cfg.model, texts)
    cells = {name: {field: f"{x:.1e}" for field, x in d._asdict().items()} for name, d in found.items()}
    table(cfg.model, [{"rljax - transformers": name} | numbers for name, numbers in cells.items()])
    wrong = [name for name, difference in found.items() if not difference.relative <= cfg.tolerance]
    if wrong:
        raise ValueError(f"relative difference above the tolerance of {cfg.tolerance:g}: {'; '.join(wrong)}")
    log_info(f"all within {cfg.tolerance:g}")


def compare(directory: str, texts: list[list[int]]) -> dict[str, Difference]:
    """The largest differences of each comparison, over all texts (token ids, two at least, of any lengths)."""
    logits, logps = transformers_says(directory, texts)
    config = hf.read_config(directory, max(map(len, texts)))
    params = {"decoder": hf.load(directory, config)}
    tokens, mask = pad_left(texts, max(map(len, texts)), 0)
    behind, _ = pad_left([ids[::-1] for ids in texts], tokens.shape[1], 0)
    found = {
        "teacher-forced": _real(teacher_forced(config, params, behind[:, ::-1], mask[:, ::-1]), mask[:, ::-1]),
        "padded on the left": _real(teacher_forced(config, params, tokens, mask), mask),
        "through the cache": _real(cached(config, params, tokens, mask), mask),
        "packed": packed(config, params, texts),
    }
    scales = [np.maximum(rows.std(axis=1), 1.0) for rows in logits]
    out = {f"logits, {name}": _largest(ours, logits, scales) for name, ours in found.items()}
    written_again(directory, config, params)
    ours, scales = trainer_logps(config, params, tokens, mask), [scale[:-1] for scale in scales]
    return out | {"log-probs, by the trainer": _largest(ours, logps, scales)}


def _real(rows, mask) -> list[np.ndarray]:
    return [row[real] for row, real in zip(np.asarray(rows), np.asarray(mask), strict=True)]


def _largest(ours, theirs, scales) -> Difference:
    """Over all texts; NaN where anything is."""
    each = [np.abs(np.asarray(a) - b).reshape(len(b), -1).max(axis=1) for a, b in zip(ours, theirs, strict=True)]
    both = [(d.max(), (d / scale).max()) for d, scale in zip(each, scales, strict=True)]
    return Difference(*np.max(both, axis=0).tolist())


def transformers_says(directory: str, texts: list[list[int]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Logits [T V] of each text, and the log-probs [T - 1] of its own tokens."""
    model = torch_model(directory)
    import torch

    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0] for ids in texts]
    shares = [torch.log_softmax(rows[:-1], dim=-1) for rows in logits]
    logps = [rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0] for rows, ids in zip(shares, texts, strict=True)]
    return [rows.numpy() for rows in logits], [rows.numpy() for rows in logps]


def torch_model(directory: str | Path):
    """transformers' own model, float32, eager attention."""
    try:
        import torch
    except ModuleNotFoundError:
        raise ValueError("torch is not installed; the parity extra brings it: pip install -e '.[parity]'") from None
    import transformers

    transformers.utils.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    return load(directory, attn_implementation="eager", dtype=torch.float32, local_files_only=True).eval()


def _places(mask):
    """Positions and segments of rows that may be padded on either side."""
    segments = jnp.asarray(mask, jnp.int32)
    return jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0), segments


@partial(jax.jit, static_argnames="config")
def feed(config: decoder.DecoderConfig, params, tokens, positions, segments, cache=None):
    """Logits [B T V], and the cache with these tokens."""
    hidden, cache = decoder.forward(config, params["decoder"], tokens, positions, segments, cache)
    return decoder.logits(config, params["decoder"], hidden), cache


def teacher_forced(config: decoder.DecoderConfig, params, tokens, mask):
    """Logits [B T V] of whole rows."""
    return feed(config, params, tokens, *_places(mask))[0]


def cached(config: decoder.DecoderConfig, params, tokens, mask):
    """Logits [B T V]: the first half of the columns at once, then column by column."""
    B, T = tokens.shape
    cache, out = decoder.init_cache(config, B, T), []
    for start, stop in [(0, T // 2), *((t, t + 1) for t in range(T // 2, T))]:
        logits, cache = feed(config, params, *(x[:, start:stop] for x in (tokens, *_places(mask))), cache)
        out.append(logits)
    return jnp.concatenate(out, axis=1)


def packed(config: decoder.DecoderConfig, params, texts: list[list[int]]) -> list[np.ndarray]:
    """Logits [T V] of each text, all in one row."""
    lengths = [len(ids) for ids in texts]
    tokens, positions = np.concatenate(texts)[None], np.concatenate([np.arange(n) for n in lengths])[None]
    segments = np.repeat(np.arange(len(texts)) + 1, lengths)[None]
    row = np.asarray(feed(config, params, *(jnp.asarray(x, jnp.int32) for x in (tokens, positions, segments)))[0][0])
    return np.split(row, np.cumsum(lengths)[:-1])


def written_again(directory: str, config: decoder.DecoderConfig, params) -> None:
    """Raises ValueError unless transformers reads the same bits from what we write as from `directory`."""
    import torch

    with tempfile.TemporaryDirectory() as place:
        hf.save(Path(place, "again"), config, params["decoder"], directory, dtype="float32")
        first, again = (torch_model(path).state_dict() for path in (directory, Path(place, "again")))
    other = [name for name in first.keys() | again.keys() if not torch.equal(first[name], again[name])]
    if other:
        raise ValueError(f"written again, {len(other)} tensors are not the same bits, among them {other[0]}")


def trainer_logps(config: decoder.DecoderConfig, params, tokens, mask) -> list[np.ndarray]:
    """Log-probs [T - 1] of each row's own tokens, as the trainer computes them."""
    traj = trajectory_of_tokens(tokens, mask.astype(np.int32), jnp.asarray(mask), jnp.zeros(tokens.shape))
    return _real(jax.jit(make_policy(config))(params, {}, traj).logp, traj.mask)


if __name__ == "__main__":
    options.run(Config, main)
