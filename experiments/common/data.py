"""Prompts and tokenizers, as a recipe's settings name them."""

from rljax.data.prompts import Prompts, from_template, read_jsonl, train_eval_split
from rljax.data.tokenizer import Tokenizer
from rljax.data.tokenizer import load_tokenizer as load
from rljax.train.log import log_info


def unescape(text: str) -> str:
    """A text of the command line, in which \\n is a new line."""
    return text.replace("\\n", "\n")


def load_tokenizer(directory: str, vocabulary: int) -> Tokenizer:
    """The tokenizer of a model directory. Raises ValueError where it has more ids than the model."""
    tokenizer = load(directory)
    if tokenizer.size > vocabulary:
        raise ValueError(f"{directory}: the tokenizer has {tokenizer.size} ids, the model {vocabulary}")
    return tokenizer


def token_bytes(tokenizer: Tokenizer, vocabulary: int) -> list[bytes]:
    """The bytes of each of the model's ids; empty for ids that the tokenizer lacks."""
    known = tokenizer.token_bytes()
    return known + [b""] * (vocabulary - len(known))


def max_prompt_length(wanted: int, max_completion: int, context: int) -> int:
    """Tokens that a prompt may have: `wanted`, or where that is 0 all of the context that a completion leaves."""
    room = context - max_completion
    longest = wanted or room
    if not 0 < longest <= room:
        raise ValueError(
            f"max_prompt_tokens = {wanted} and sampling.max_tokens = {max_completion} do not fit the model's context; "
            f"legal: a sum of at most {context}, with room for a prompt"
        )
    return longest


def read_prompts(
    path: str, template: str, tokenizer: Tokenizer, max_tokens: int, eval_prompts: int, seed: int
) -> tuple[Prompts, Prompts]:
    """Prompts to train on and to evaluate on; those of more than `max_tokens` tokens are dropped and counted."""
    text = from_template(unescape(template))

    def encode(rows: list[dict]) -> Prompts:
        return Prompts(rows, tokenizer.encode, text, max_tokens, seed, tokenizer.pad)

    train_rows, eval_rows = train_eval_split(read_jsonl(path), eval_prompts, seed)
    train = encode(train_rows)
    evaluation = encode(eval_rows)
    dropped = train.dropped + evaluation.dropped
    log_info(
        f"{len(train)} prompts to train on, {len(evaluation)} to evaluate on; "
        f"{dropped} dropped, longer than {max_tokens} tokens"
    )
    return train, evaluation
