r"""A tiny Qwen of random weights with a tokenizer of its own: to try a script, a launcher or a mesh without a download.

    python experiments/tools/tiny_model.py --out runs/tiny --texts gsm8k_train.jsonl
    python experiments/gsm8k_grpo.py --model runs/tiny --prompts gsm8k_train.jsonl --steps 2 --sampling.max_tokens 32

The tokenizer is byte-level BPE, learned from the texts of a file, with Qwen's special tokens and chat template
(ChatML).

Reached: nothing, as the model has learned nothing: its completions are noise.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax

from experiments.common import command_line
from rljax.data.files import read_table
from rljax.models import decoder, hf
from rljax.train.log import log_info

END, START_OF_TURN, END_OF_TURN = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Config:
    """A model directory of random weights."""

    out: str  # the directory to write; must be empty or absent
    family: Literal["qwen2", "qwen3"] = "qwen2"  # architecture
    texts: str = ""  # file whose texts the tokenizer is learned from; default: none, a token is a byte
    vocabulary: int = 1024  # most tokens
    width: int = 64  # of hidden states; a head has 16
    layers: int = 2  # number of layers
    context: int = 2048  # tokens of the longest row
    seed: int = 0  # of the weights


def main(cfg: Config) -> None:
    """Write the tokenizer, then the weights beside it."""
    out = Path(cfg.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; legal: a directory that does not exist yet")
    out.mkdir(parents=True, exist_ok=True)
    texts = texts_of(cfg.texts) if cfg.texts else []
    ids = write_tokenizer(out, texts, cfg.vocabulary)
    (out / "config.json").write_text(json.dumps(model_config(cfg, ids), indent=2) + "\n")
    config = hf.read_config(out)
    params = decoder.init(config, jax.random.key(cfg.seed))
    hf.save(out, config, params, out, replace=True)
    count = sum(x.size for x in jax.tree.leaves(params))
    log_info(f"{out}: {cfg.family} with {count:,} parameters and {len(ids):,} tokens")


def texts_of(path: str) -> list[str]:
    """Every text in the columns of a file, also within lists and messages. Raises ValueError where there is none."""
    found = [text for row in read_table(path).rows for text in _texts_within(row)]
    if not found:
        raise ValueError(f"no text in {path}; legal: a file with a column of texts or messages")
    return found


def _texts_within(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for one in inner for text in _texts_within(one)]


def write_tokenizer(directory: Path, texts: list[str], vocabulary: int) -> dict[str, int]:
    """Write tokenizer files as Qwen's are; the id of each token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    inner.save(str(directory / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TURN,
        "pad_token": END,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")
    return inner.get_vocab()


def model_config(cfg: Config, ids: dict[str, int]) -> dict:
    """config.json of the model, with Qwen's proportions."""
    return {
        "architectures": [{"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[cfg.family]],
        "model_type": cfg.family,
        "vocab_size": len(ids),
        "hidden_size": cfg.width,
        "intermediate_size": 4 * cfg.width,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.width // 16,
        "num_key_value_heads": max(1, cfg.width // 32),
        "head_dim": 16,
        "max_position_embeddings": cfg.context,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": ids[END],
        "eos_token_id": ids[END_OF_TURN],
        "dtype": "float32",
    }


if __name__ == "__main__":
    command_line.run(Config, main, one_process=True, makes_run=False)
