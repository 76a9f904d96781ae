"""Random tool dialogues with real tokenizers and chat templates: what is trained on is what was sampled, id for id.

The model draws any ids, special tokens included: most turns are no text that encodes to the same ids again. Where
they would be decoded and encoded, as a stack that passes text around does, the policy would learn ids it never chose.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.conversations import make_codec
from rljax.data.tokenizer import Tokenizer, load_tokenizer
from rljax.rollouts.conversations import sample_conversations
from rljax.types import LM, Observation, PromptBatch, Sampling, Turn

TOKENIZERS = {"stories260k": "models/stories260k", "qwen2_5": "chat/qwen2_5", "gemma": "chat/gemma"}
REPLIES = (
    "42",
    " 3.5",
    "",
    "na\u00efve caf\u00e9\n",
    "\U0001f600 \u65e5\u672c",
    "  two  spaces",
    "error: no such tool",
    "</tool>",
)
MAX_TURNS, CONTEXT = 4, 640


def random_model(tokenizer: Tokenizer) -> LM:
    """Every id is as likely as any other, but the stop tokens come every eighth time."""
    logits = np.zeros(tokenizer.size, np.float32)
    logits[list(tokenizer.stop)] = np.log(tokenizer.size / 8 / len(tokenizer.stop))

    def forward(params, frozen, tokens, positions, segments, cache):
        return jnp.zeros((*tokens.shape, 1)), {"length": cache["length"] + tokens.shape[1]}

    return LM(
        init_cache=lambda rows, length: {"length": jnp.zeros(rows, jnp.int32)},
        forward=forward,
        logits=lambda params, frozen, hidden: hidden + logits.reshape((1,) * (hidden.ndim - 1) + (-1,)),
        gather=lambda cache, rows: {"length": cache["length"][rows]},
        scatter=lambda cache, rows, other: {"length": cache["length"].at[rows].set(other["length"])},
        fork=None,
        grow=lambda cache, columns: cache,
        crop=lambda cache, length: {"length": length},
    )


class ToolDialogues:
    """Answers with random replies of a tool, and keeps each conversation as ids and as messages."""

    def __init__(self, tokenizer: Tokenizer, count: int):
        self.codec = make_codec(tokenizer)
        self.random = np.random.default_rng(0)
        self.messages = [[{"role": "user", "content": f"{i} and {REPLIES[i % len(REPLIES)]}?"}] for i in range(count)]
        self.ids = [list(self.codec.encode_prompt(messages)) for messages in self.messages]
        self.chosen = [[False] * len(ids) for ids in self.ids]

    def prompts(self) -> PromptBatch:
        count, width = len(self.ids), max(map(len, self.ids))
        tokens, mask = np.zeros((count, width), np.int32), np.zeros((count, width), bool)
        for i, ids in enumerate(self.ids):
            tokens[i, width - len(ids) :], mask[i, width - len(ids) :] = ids, True
        return PromptBatch(tokens, mask, np.arange(count, dtype=np.int32), [{}] * count, 0)

    def respond(self, turns: list[Turn]) -> list[Observation]:
        return [self.answer(turn) for turn in turns]

    def answer(self, turn: Turn) -> Observation:
        messages = self.messages[turn.row]
        reply = [{"role": "tool", "name": "tool", "content": str(self.random.choice(REPLIES))}]
        added = self.codec.encode_reply(messages, turn, reply)
        messages += [{"role": "assistant", "content": self.codec.decode_turn(turn)}, *reply]
        self.ids[turn.row] += turn.tokens
        self.chosen[turn.row] += [True] * len(turn.tokens)
        is_over = sum(message["role"] == "assistant" for message in messages) == MAX_TURNS or self.random.random() < 0.1
        if is_over or len(self.ids[turn.row]) + len(added) >= CONTEXT:
            return Observation(added, 0.0, terminated=bool(is_over))
        self.ids[turn.row] += added
        self.chosen[turn.row] += [False] * len(added)
        return Observation(added, 0.0)


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_trained_ids_are_sampled_ids(name, count, shared):
    tokenizer = load_tokenizer(shared / TOKENIZERS[name])
    dialogues = ToolDialogues(tokenizer, count)
    prompts = dialogues.prompts()
    sampling = Sampling(max_tokens=12, stop=tokenizer.stop, max_concurrent=max(8, count // 4))
    settings = {"max_turns": MAX_TURNS + 1, "max_context": CONTEXT}
    traj, counts = sample_conversations(
        random_model(tokenizer), {}, {}, prompts, dialogues.respond, sampling, 0, 0, **settings
    )
    inputs, actions, mask = (np.asarray(x) for x in (traj.inputs, traj.actions, traj.mask))
    changed = 0
    for i, (ids, chosen) in enumerate(zip(dialogues.ids, dialogues.chosen, strict=True)):
        T = len(ids) - 1
        assert inputs[i, :T].tolist() == ids[:-1]
        assert actions[i, :T].tolist() == ids[1:]
        assert mask[i, :T].tolist() == chosen[1:]
        assert not mask[i, T:].any()
        sampled = actions[i][mask[i]]
        again = tokenizer.encode_more(tokenizer.decode_all(sampled.tolist()))
        changed += again != sampled.tolist()
    assert counts.turns.max() == MAX_TURNS
    assert changed > 0.9 * count  # of so many another id sequence would come out of the text
