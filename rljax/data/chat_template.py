"""The chat template of a Hugging Face tokenizer, as the functions that `data.chat` works with."""

import re
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import jinja2

from rljax.data.chat import MARK, Chat, Messages, Tools

TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)


def read_chat(inner: Any, name: str, encode: Callable[[str], list[int]], stop: Collection[int]) -> Chat | None:
    """The chat template of a transformers tokenizer, whose sampler stops at the ids `stop`; None where it has none."""
    if not inner.chat_template:
        return None
    render = partial(_render, inner, name)
    source = inner.chat_template if isinstance(inner.chat_template, str) else " ".join(inner.chat_template.values())
    is_marked = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
    try:
        end_of_turn, has_generation_prompt = _probe(inner, render, encode)
    except ValueError:  # the first conversation that is rendered meets it, and says which message it was
        end_of_turn, has_generation_prompt = None, True
    ends = inner.convert_ids_to_tokens(sorted({*stop, end_of_turn} - {None}))
    return Chat(
        name,
        render,
        encode,
        tuple(ends),
        end_of_turn,
        has_generation_prompt,
        partial(_render_spans, inner, name) if is_marked else None,
    )


def _probe(inner: Any, render: Callable[..., str], encode: Callable[[str], list[int]]) -> tuple[int | None, bool]:
    """The first added token after an assistant's message, and whether there is a generation prompt or need for none.

    Where the assistant's words follow without a header, as in Mistral's "[INST] ... [/INST]", it may be empty.
    """
    question = [{"role": "user", "content": "Hi"}]
    whole = render([*question, {"role": "assistant", "content": MARK}], None, False)
    before, _, after = whole.rpartition(MARK)
    ends = [token for token in encode(after) if token in inner.added_tokens_decoder]
    asked = render(question, None, False)
    has_header = bool(before.removeprefix(asked).strip())
    return ends[0] if ends else None, render(question, None, True) != asked or not has_header


def _render(inner: Any, name: str, messages: Messages, tools: Tools, add_generation_prompt: bool) -> str:
    def render(first: Messages) -> str:
        return inner.apply_chat_template(
            list(first), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    return _or_refusal(name, messages, render)


def _render_spans(inner: Any, name: str, messages: Messages, tools: Tools) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the spans of its characters that stand between {% generation %} and {% endgeneration %}."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(first: Messages) -> tuple[str, list[tuple[int, int]]]:
        texts, spans = render_jinja_template(
            [list(first)],
            tools=tools,
            chat_template=inner.get_chat_template(tools=tools),
            return_assistant_tokens_mask=True,
            **inner.special_tokens_map,
        )
        return texts[0], spans[0]

    return _or_refusal(name, messages, render)


def _or_refusal(name: str, messages: Messages, render: Callable) -> Any:
    """render(messages), or one ValueError: whose template, which message, and what the template reason."""
    try:
        return render(messages)
    except TEMPLATE_ERRORS as error:
        raise ValueError(f"the chat template of {name} {_refusal(error, messages, render)}") from None


def _refusal(error: Exception, messages: Messages, render: Callable) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"does not parse (its line {error.lineno}): {reason}"
    for number in range(1, len(messages) + 1):
        try:
            render(messages[:number])
        except TEMPLATE_ERRORS:
            return f"refuses message {number} ({messages[number - 1]['role']}): {reason}"
    return f"refuses a conversation of {len(messages)} messages: {reason}"
