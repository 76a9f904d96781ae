"""A student and a teacher on the same tokens: what the objectives of distillation call."""

from functools import partial

import jax
import jax.numpy as jnp

from rljax.models import decoder
from rljax.models.decoder import DecoderConfig
from rljax.models.policy import default_chunk_tokens, temperatures
from rljax.ops.distillation import DivergenceOfLogits, TokenComparison, columns_of_same_decisions
from rljax.ops.logprobs import chosen_logp, in_chunks
from rljax.types import CompareFn, Distillation, Params


def make_compare(
    config: DecoderConfig, teacher_config: DecoderConfig | None = None, chunk_tokens: int | None = None
) -> CompareFn:
    """compare(params, frozen, batch, divergence) -> TokenComparison [B T], the teacher's parameters being
    `frozen["teacher"]`: all of them where it has a config of its own, else those that differ from `frozen["base"]`.

    Both distributions are taken at the temperature that each token was drawn at. The logits of both models exist for
    `chunk_tokens` decisions at a time, in forward and backward pass. The teacher gets no gradient.

    Args:
      teacher_config: of a teacher of another size, with the same vocabulary; None: `config`.
      chunk_tokens: number of decisions whose logits exist at the same time; None: half of `default_chunk_tokens`, since
      there are two models.
    """
    is_whole = teacher_config is not None  # the student's base is not under it
    teacher_config = teacher_config or config
    of_one = default_chunk_tokens(config.vocab_size, config.backend, config.num_devices)
    chunk_tokens = chunk_tokens or max(1, of_one // 2)

    def compare(params: Params, frozen: Params, batch: Distillation, divergence: DivergenceOfLogits) -> TokenComparison:
        if "teacher" not in frozen:
            raise ValueError("distillation needs a teacher: put its parameters in frozen['teacher']")
        traj = batch.traj
        if traj.support is not None:
            raise ValueError(
                "distillation compares whole distributions, but Trajectory.support truncates them; "
                "legal: completions sampled with no setting but the temperature (support None)"
            )
        student = decoder.full_params(config, params, frozen)["decoder"]
        teacher_params = jax.lax.stop_gradient(decoder.on_device(frozen["teacher"]))
        teacher = decoder.full_params(teacher_config, teacher_params, {} if is_whole else frozen)["decoder"]
        hidden = decoder.hidden_of(config, student, traj)
        teacher_hidden = _teacher_hidden(teacher_config, teacher, batch)
        student_logits_of = partial(decoder.logits, config, student)
        teacher_logits_of = partial(decoder.logits, teacher_config, teacher)

        def compare_columns(hidden, teacher_hidden, tokens, temperature):
            student_logits = _at_temperature(student_logits_of(hidden), temperature)
            teacher_logits = _at_temperature(teacher_logits_of(teacher_hidden), temperature)
            one = jnp.ones_like(temperature)
            return TokenComparison(
                divergence=divergence(student_logits, teacher_logits, tokens),
                logp=chosen_logp(student_logits, tokens, one),
                teacher_logp=chosen_logp(teacher_logits, tokens, one),
            )

        return in_chunks(compare_columns, chunk_tokens, hidden, teacher_hidden, traj.actions, temperatures(traj))

    return compare


def _at_temperature(logits, temperature):
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature[..., None]


def _teacher_hidden(config, teacher, batch):
    """The teacher's hidden states at the columns of `batch.traj`."""
    view = batch.traj if batch.teacher_view is None else batch.teacher_view
    hidden = decoder.hidden_of(config, teacher, view.replace(routing=None))
    if batch.teacher_view is None:
        return hidden
    columns = columns_of_same_decisions(batch.traj.mask, view.mask)
    return jnp.take_along_axis(hidden, columns[..., None], axis=1)
