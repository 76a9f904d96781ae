r"""Does rljax compute what transformers computes? Logits and log-probs of one model directory, compared in float32.

    python experiments/check_parity.py --model DIR           # needs the parity extra (torch): pip install 'rljax[parity]'

Both sides run on the CPU, transformers with eager attention. What transformers says of each text alone is the reference;
rljax must say the same with the text alone, through its KV cache, and in a batch padded on the left.

Reached (2 CPU cores, 20 s): stories260k 1.2e-5 at most, at logits of up to 18.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import options
from rljax.data.prompts import pad_left
from rljax.data.tokenizer import load_tokenizer
from rljax.models import decoder, hf
from rljax.models.policy import make_policy
from rljax.train.log import say, table
from rljax.types import trajectory_of_tokens

TEXTS = (
    "Hi.",
    "Once upon a time, there was a little girl named Lily.",
    "A bakery sold 14 loaves in the morning and 27 in the afternoon, at $3 each. How much money did it take?",
    "The moon rose over the quiet lake. A small boat drifted by, and the old man in it sang a song that no one on the "
    "shore had heard for many years; when he stopped, even the frogs were silent, and the water lay like black glass.",
)
PREFILL = 0.5  # share of a text that goes into the cache at once, the rest token by token


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare rljax with transformers on one model."""

    model: str  # a Hugging Face model directory
    tolerance: float = 2e-5  # largest difference that passes


def main(cfg: Config) -> dict[str, float]:
    """Print the largest differences. Raises ValueError where one is above the tolerance."""
    hf.read_config(cfg.model)  # says clearly what is wrong with the directory
    tokenizer = load_tokenizer(cfg.model)
    found = compare(cfg.model, [tokenizer.encode(text) for text in TEXTS])
    title = f"{cfg.model}: |rljax - transformers|, float32"
    table(title, [{"what": name, "at most": f"{value:.1e}"} for name, value in found.items()])
    wrong = [name for name, value in found.items() if not value <= cfg.tolerance]
    if wrong:
        raise ValueError(f"above the tolerance of {cfg.tolerance:g}: {', '.join(wrong)}")
    say(f"all within {cfg.tolerance:g}")
    return found


def compare(directory: str, texts: list[list[int]]) -> dict[str, float]:
    """The largest absolute difference of each comparison, over all texts (token ids of any lengths)."""
    logits, logps = transformers_says(directory, texts)
    config = hf.read_config(directory)
    params = {"decoder": hf.load(directory, config)}
    tokens, mask = pad_left(texts, max(map(len, texts)), 0)
    padded = teacher_forced(config, params, tokens, mask)
    found = {
        "logits, teacher-forced": [teacher_forced(config, params, *pad_left([ids], len(ids), 0))[0] for ids in texts],
        "logits, through the cache": [cached(config, params, ids) for ids in texts],
        "logits, batch padded on the left": [row[real] for row, real in zip(padded, mask, strict=True)],
    }
    differences = {name: _largest(ours, logits) for name, ours in found.items()}
    return differences | {"log-probs, by the trainer": _largest(trainer_logps(config, params, tokens, mask), logps)}


def transformers_says(directory: str, texts: list[list[int]]) -> tuple[list, list]:
    """Logits [T V] of each text, and the log-probs [T - 1] of its own tokens."""
    try:
        import torch
    except ModuleNotFoundError:
        raise ValueError("torch is not installed; the parity extra brings it: pip install 'rljax[parity]'") from None
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32, local_files_only=True
    ).eval()
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0] for ids in texts]
        shares = [torch.log_softmax(rows[:-1], dim=-1) for rows in logits]
        logps = [
            rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0] for rows, ids in zip(shares, texts, strict=True)
        ]
    return [rows.numpy() for rows in logits], [rows.numpy() for rows in logps]


@partial(jax.jit, static_argnames="config")
def teacher_forced(config, params, tokens, mask):
    """Logits [B T V] of rows that may be padded on either side."""
    segments = mask.astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    hidden, _ = decoder.forward(config, params["decoder"], tokens, positions, segments)
    return decoder.logits(config, params["decoder"], hidden)


def cached(config, params, ids: list[int]):
    """Logits [T V] of one text: the first part prefilled, the rest token by token."""
    lm = decoder.language_model(config)

    @jax.jit
    def feed(cache, tokens, start):
        positions = start + jnp.arange(tokens.shape[1])[None]
        hidden, cache = lm.forward(params, {}, tokens, positions, jnp.ones_like(tokens), cache)
        return cache, lm.logits(params, {}, hidden)[0]

    tokens = jnp.asarray(ids)[None]
    first = math.ceil(PREFILL * len(ids))
    cache, rows = feed(lm.init_cache(1, len(ids)), tokens[:, :first], 0)
    out = [rows]
    for t in range(first, len(ids)):
        cache, rows = feed(cache, tokens[:, t : t + 1], t)
        out.append(rows)
    return jnp.concatenate(out)


def trainer_logps(config, params, tokens, mask) -> list:
    """Log-probs [T - 1] of each row's own tokens, as the trainer computes them."""
    traj = trajectory_of_tokens(tokens, mask.astype(np.int32), jnp.asarray(mask), jnp.zeros(tokens.shape))
    logp = jax.jit(make_policy(config))(params, {}, traj).logp
    return [row[real] for row, real in zip(np.asarray(logp), np.asarray(traj.mask), strict=True)]


def _largest(ours, theirs) -> float:
    """max |ours - theirs|; NaN where anything is."""
    return float(np.max([np.abs(np.asarray(a) - b).max(initial=0.0) for a, b in zip(ours, theirs, strict=True)]))


if __name__ == "__main__":
    options.run(Config, main)
