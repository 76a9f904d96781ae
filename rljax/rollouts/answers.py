"""What the engines share: prompts as arrays, reading them, what was drawn, and the trajectory that it makes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rljax.ops import sampling as ops
from rljax.rollouts.sample_token import Memory, Settings, follow
from rljax.types import LM, Array, Params, Rows, Sampling, Trajectory, trajectory_of_tokens

PAST = ("chosen", "logp", "temperature", "version", "terminated", "truncated")


@struct.dataclass
class Prompts:
    """`Rows` on the device: what a compiled sampler reads."""

    tokens: Array  # [P L]
    mask: Array  # [P L]
    number: Array  # [P]
    step: Array  # [P] whose key draws the row
    version: Array  # [] the policy's
    requests: Array | None  # [R 2]
    past: dict[str, Array] | None  # [P L] each, of the tokens before

    @property
    def chosen(self) -> Array:
        """[P L] tokens that a policy drew earlier."""
        return jnp.zeros_like(self.mask) if self.past is None else self.past["chosen"]

    @property
    def ended(self) -> Array:
        """[P] whether a stop was met earlier."""
        return jnp.zeros(len(self.number), bool) if self.past is None else self.past["terminated"].any(axis=1)

    def answers(self, n: int) -> tuple[Array, Array]:
        """Of each of R answers, the row of its prompt and which answer it is."""
        if self.requests is not None:
            return self.requests[:, 0], self.requests[:, 1]
        rows = jnp.arange(len(self.number), dtype=jnp.int32)
        return jnp.repeat(rows, n), jnp.tile(jnp.arange(n, dtype=jnp.int32), len(rows))


@struct.dataclass
class Answers:
    """R answers so far, N columns."""

    tokens: Array  # [R N]
    logp: Array  # [R N]
    drawn: Array  # [R] how many they are
    ended: Array  # [R] a stop token or string was met
    over: Array  # [R] that, or the limit

    @classmethod
    def none(cls, settings: Settings, columns: int) -> "Answers":
        """None drawn yet."""
        blank, ended = jnp.zeros((len(settings.before), columns)), settings.ended
        drawn = jnp.zeros_like(settings.before)
        return cls(blank.astype(jnp.int32), blank, drawn, ended, over=ended | (settings.before >= columns))


@struct.dataclass
class Work:
    """What drawing took. Utilisation of the rows: tokens / row_steps."""

    steps: Array  # passes of one token through the model
    row_steps: Array  # rows computed in them
    tokens: Array  # drawn


def place(rows: Rows, step: int) -> Prompts:
    """The rows as arrays. Raises ValueError for requests of rows that do not exist."""
    number, began = jnp.asarray(rows.number), rows.began
    if rows.requests is not None:
        requests = np.asarray(rows.requests)
        legal = requests.ndim == 2 and len(requests) and requests.min() >= 0 and requests[:, 0].max() < len(rows.number)
        if not legal:
            raise ValueError(f"rows.requests: legal: [R 2] of (row below {len(rows.number)}, answer), at least one")
    return Prompts(
        tokens=jnp.asarray(rows.tokens),
        mask=jnp.asarray(rows.mask),
        number=number,
        step=jnp.full(number.shape, step, jnp.int32) if began is None else jnp.asarray(began, jnp.int32),
        version=jnp.int32(step),
        requests=None if rows.requests is None else jnp.asarray(rows.requests, jnp.int32),
        past=None if rows.past is None else {name: jnp.asarray(rows.past[name]) for name in PAST},
    )


def bind(lm: LM, params: Params, frozen: Params) -> LM:
    """The model with its parameters, made ready once."""
    params, frozen = (params, frozen) if lm.prepare is None else lm.prepare(params, frozen)
    return lm._replace(forward=partial(lm.forward, params, frozen), logits=partial(lm.logits, params, frozen))


def read(lm: LM, prompts: Prompts, sampling: Sampling):
    """The prompts through a bound model: cache, hidden states [P D] and memory, of which the first draw is made."""
    segments = prompts.mask.astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)
    hidden, cache = lm.forward(prompts.tokens, positions, segments, lm.init_cache(*prompts.tokens.shape))
    vocabulary = jax.eval_shape(lm.logits, hidden).shape[-1]
    return cache, hidden[:, -1], remember(prompts, sampling, vocabulary)


def settle(prompts: Prompts, sampling: Sampling, seed) -> Settings:
    """The settings of each answer."""
    (source, answer), P = prompts.answers(sampling.n), len(prompts.number)

    def of_prompt(value, dtype):
        return None if value is None else jnp.broadcast_to(jnp.asarray(value, dtype), P)[source]

    bias = sampling.logit_bias
    return Settings(
        keys=ops.row_keys(seed, prompts.step[source], prompts.number[source], answer),
        length=prompts.mask.sum(axis=1)[source],
        before=prompts.chosen.sum(axis=1)[source],
        ended=prompts.ended[source],
        temperature=of_prompt(sampling.temperature, jnp.float32),
        top_k=of_prompt(sampling.top_k, jnp.int32),
        top_p=of_prompt(sampling.top_p, jnp.float32),
        min_p=of_prompt(sampling.min_p, jnp.float32),
        repetition_penalty=of_prompt(sampling.repetition_penalty, jnp.float32),
        logit_bias=bias if bias is None or jnp.ndim(bias) == 1 else bias[source],
        min_tokens=of_prompt(sampling.min_tokens, jnp.int32),
    )


def remember(prompts: Prompts, sampling: Sampling, vocabulary: int) -> Memory:
    """Of each prompt, what its tokens mean for the first draw."""
    rows, seen, read = jnp.arange(len(prompts.number))[:, None], None, None
    if sampling.repetition_penalty is not None:
        seen = jnp.zeros((len(rows), vocabulary), bool).at[rows, prompts.tokens].max(prompts.mask)
    if sampling.stop_strings is not None:

        def column(state, token_and_chosen):
            token, chosen = token_and_chosen
            return jnp.where(chosen, follow(sampling.stop_strings, state, token), state), None

        start = jnp.zeros(len(rows), jnp.int32)
        read, _ = jax.lax.scan(column, start, (prompts.tokens.T, prompts.chosen.T))
    return Memory(seen, read)


def unfinished(answers: Answers, count: int, sampling: Sampling) -> Array:
    """Whether there is anything left to draw of `count` answers."""
    return answers.over[:count].sum() < min(sampling.stop_after or count, count)


def trajectory(
    prompts: Prompts, settings: Settings, sampling: Sampling, answers: Answers, routing: Array | None
) -> Trajectory:
    """Facts of the answers, each after its prompt."""
    (R, N), (source, _) = answers.tokens.shape, prompts.answers(sampling.n)
    of = (lambda x: x[source]) if prompts.requests is not None else partial(jnp.repeat, repeats=sampling.n, axis=0)
    columns = jnp.arange(N)[None]
    alive = columns < answers.drawn[:, None]
    last = alive & (columns == answers.drawn[:, None] - 1)
    used = jnp.where(settings.temperature == 0, 1.0, settings.temperature)[:, None]
    no, zeros = jnp.zeros((R, prompts.tokens.shape[1]), bool), jnp.zeros(prompts.tokens.shape)
    past = prompts.past or {"logp": zeros, "temperature": zeros, "version": zeros.astype(jnp.int32)}
    ends = [no, no] if prompts.past is None else [of(past["terminated"]), of(past["truncated"])]
    temperature = jnp.broadcast_to(used, (R, N))
    join = lambda before, new: jnp.concatenate([before, new], axis=1)  # noqa: E731
    fields = {}
    if prompts.past is not None or sampling.stop_after is not None:
        fields["version"] = join(of(past["version"]), jnp.broadcast_to(prompts.version, (R, N)))
    traj = trajectory_of_tokens(
        tokens=join(of(prompts.tokens), answers.tokens),
        segments=join(of(prompts.mask).astype(jnp.int32), alive.astype(jnp.int32)),
        chosen=join(of(prompts.chosen), alive),
        logp=join(of(past["logp"]), answers.logp),
        temperature=join(jnp.where(of(prompts.chosen), of(past["temperature"]), used), temperature),
        terminated=join(ends[0], last & answers.ended[:, None]),
        truncated=join(ends[1], last & (answers.over & ~answers.ended)[:, None]),
        group=of(prompts.number),
        **fields,
    )
    return traj if routing is None else traj.replace(routing=routing[:, :-1])
