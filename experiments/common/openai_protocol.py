"""OpenAI's completions and chat completions as requests of the engine, and its answers as their JSON.

Besides OpenAI's fields a request may have vLLM's `return_token_ids` and `stop_token_ids`, `top_k`, and our `key`:
[step, number], from which the samples are made as in a training run (`seed` alone is [seed, 0]). An answer names the
version of the weights as SGLang does, `metadata.weight_version`.
"""

import codecs
import secrets
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.common.engine import Answer, Request
from rljax.data.chat import encode_prompt
from rljax.data.tokenizer import Tokenizer
from rljax.rollouts.sample_token import MIN_TEMPERATURE

COMMON = {
    "model",
    "n",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "key",
    "stop",
    "stop_token_ids",
    "stream",
}
COMMON |= {"stream_options", "return_token_ids", "logprobs", "user"}
FIELDS = {False: COMMON | {"prompt"}, True: COMMON | {"messages", "max_completion_tokens", "top_logprobs"}}
# Fields that may be there with the value that changes nothing.
OFF = {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "min_p": 0}
OFF |= {"echo": False, "best_of": 1, "logit_bias": {}, "suffix": None}
DEFAULT_TOKENS = 16  # of a completion; a chat goes on to the end of the context
MAX_STOPS = 16


class RequestProblem(ValueError):
    """What is wrong with a request, for the client: a status of HTTP, and the field."""

    def __init__(self, message: str, status: int = 400, field: str | None = None):
        super().__init__(message)
        self.status = status
        self.field = field


class Model(NamedTuple):
    """What a server tells of its model, and needs to read a request."""

    name: str
    tokenizer: Tokenizer
    pieces: Sequence[bytes]  # the bytes of each id
    context: int  # most tokens of a prompt and its completion
    rows: int  # most completions of a request

    @property
    def vocabulary(self) -> int:
        """Ids are below it."""
        return len(self.pieces)


class Call(NamedTuple):
    """A call of the API: the requests it makes of the engine, and how they are answered."""

    requests: list[Request]
    is_chat: bool
    streams: bool
    with_usage: bool  # a last chunk of a stream says how many tokens there were
    with_logprobs: bool
    with_ids: bool
    identity: str
    created: int


def read_call(body: Any, is_chat: bool, model: Model) -> Call:
    """The call that a body is. Raises RequestProblem, which says what would be legal."""
    if not isinstance(body, dict):
        raise RequestProblem("the body is no JSON object")
    fields = _Fields({name: value for name, value in body.items() if value is not None})
    if fields.get("model", model.name) != model.name:
        raise RequestProblem(f"there is no model {fields['model']!r}; this server has {model.name}", 404, "model")
    for name, value in fields.items():
        if name not in FIELDS[is_chat] and (name not in OFF or value != OFF[name]):
            legal = ", ".join(sorted(FIELDS[is_chat]))
            raise RequestProblem(f"{name} is not supported here; legal fields: {legal}", field=name)
    prompts = [_read_messages(fields, model)] if is_chat else _read_prompts(fields, model)
    n = fields.integer("n", 1, 1, model.rows)
    shared = _read_sampling(fields, model)
    step, number = _read_key(fields)
    limit = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    if limit != "max_tokens" and "max_tokens" in fields:
        raise RequestProblem("max_tokens and max_completion_tokens; legal: one of them", field="max_tokens")
    requests = []
    for index, tokens in enumerate(prompts):
        room = model.context - len(tokens)
        if room < 1:
            message = f"a prompt of {len(tokens)} tokens; legal: fewer than the {model.context} of the context"
            raise RequestProblem(message, field="messages" if is_chat else "prompt")
        most = fields.integer(limit, room if is_chat else min(DEFAULT_TOKENS, room), 1, room)
        requests.append(Request(tokens, n, most, step=step, number=number + index, **shared))
    return Call(
        requests=requests,
        is_chat=is_chat,
        streams=shared["reads_along"],
        with_usage=_read_stream_options(fields),
        with_logprobs=_read_logprobs(fields, is_chat),
        with_ids=fields.boolean("return_token_ids"),
        identity=("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(12),
        created=int(time.time()),
    )


class _Fields(dict):
    """The fields of a body, whose readers say what is legal."""

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise RequestProblem(f"{name} = {_shown(value)}; legal: a whole number from {low} to {high}", field=name)
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise RequestProblem(f"{name} = {_shown(value)}; legal: a number from {low:g} to {high:g}", field=name)
        return float(value)

    def boolean(self, name: str) -> bool:
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise RequestProblem(f"{name} = {_shown(value)}; legal: true or false", field=name)
        return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."


def _read_prompts(fields: _Fields, model: Model) -> list[list[int]]:
    """The ids of each prompt: a text, ids, or a list of either."""
    given = fields.get("prompt")
    several = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    if len(several) > model.rows:
        raise RequestProblem(f"{len(several)} prompts; legal: at most {model.rows}", field="prompt")
    return [_read_prompt(prompt, model) for prompt in several]


def _read_prompt(prompt: Any, model: Model) -> list[int]:
    if isinstance(prompt, str):
        try:
            prompt = model.tokenizer.encode(prompt)
        except ValueError as error:  # a character tokenizer
            raise RequestProblem(str(error), field="prompt") from None
    is_legal = isinstance(prompt, list) and len(prompt) > 0
    if not is_legal or not all(type(token) is int and 0 <= token < model.vocabulary for token in prompt):
        legal = f"a text of at least one token, a list of ids below {model.vocabulary}, or a list of either"
        raise RequestProblem(f"prompt = {_shown(prompt)}; legal: {legal}", field="prompt")
    return prompt


def _read_messages(fields: _Fields, model: Model) -> list[int]:
    messages = fields.get("messages")
    is_legal = isinstance(messages, list) and len(messages) > 0
    if not is_legal or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and _is_content(message.get("content"))
        for message in messages
    ):
        legal = '[{"role": text, "content": a text, or parts {"type": "text", "text": text}}, ...]'
        raise RequestProblem(f"messages = {_shown(messages)}; legal: {legal}", field="messages")
    if model.tokenizer.chat is None:
        raise RequestProblem("this model has no chat template; legal: /v1/completions", field="messages")
    messages = [message | {"content": _content_text(message["content"])} for message in messages]
    try:
        return encode_prompt(model.tokenizer.chat, messages)
    except ValueError as error:
        raise RequestProblem(str(error), field="messages") from None


def _is_content(content: Any) -> bool:
    """A text, or a list of texts as parts."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    )


def _content_text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _read_sampling(fields: _Fields, model: Model) -> dict[str, Any]:
    """The fields of a `Request` that all prompts of a call share."""
    stop = fields.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MAX_STOPS or not all(isinstance(s, str) and s for s in stop):
        raise RequestProblem(f"stop = {_shown(stop)}; legal: at most {MAX_STOPS} texts, none empty", field="stop")
    ids = fields.get("stop_token_ids", [])
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < model.vocabulary for token in ids):
        legal = f"a list of ids below {model.vocabulary}"
        raise RequestProblem(f"stop_token_ids = {_shown(ids)}; legal: {legal}", field="stop_token_ids")
    temperature = fields.number("temperature", 1.0, 0.0, 100.0)
    if 0 < temperature < MIN_TEMPERATURE:
        legal = f"0, which is greedy, or a number from {MIN_TEMPERATURE:g}"
        raise RequestProblem(f"temperature = {temperature}; legal: {legal}", field="temperature")
    return {
        "temperature": temperature,
        "top_p": fields.number("top_p", 1.0, 1e-6, 1.0),
        "top_k": max(fields.integer("top_k", 0, -1, 1 << 30), 0),
        "stop_strings": tuple(text.encode() for text in stop),
        "stop_tokens": tuple(ids),
        "reads_along": fields.boolean("stream"),
    }


def _read_key(fields: _Fields) -> tuple[int, int]:
    if "key" not in fields:
        seed = fields.integer("seed", secrets.randbelow(2**31), -(2**63), 2**63 - 1)
        return (seed + 2**31) % 2**32 - 2**31, 0  # the last 32 bits
    key = fields["key"]
    is_pair = isinstance(key, list) and len(key) == 2
    if not is_pair or not all(type(part) is int and -(2**31) <= part < 2**31 for part in key):
        raise RequestProblem(f"key = {_shown(key)}; legal: [step, number], two 32-bit integers", field="key")
    return key[0], key[1]


def _read_stream_options(fields: _Fields) -> bool:
    """Whether a stream ends with the numbers of tokens."""
    options = fields.get("stream_options", {})
    if not isinstance(options, dict) or not set(options) <= {"include_usage"}:
        legal = '{"include_usage": true or false}'
        raise RequestProblem(f"stream_options = {_shown(options)}; legal: {legal}", field="stream_options")
    return _Fields(options).boolean("include_usage")


def _read_logprobs(fields: _Fields, is_chat: bool) -> bool:
    """Whether the log-probs of the chosen tokens are wanted; those of others are not known."""
    if is_chat:
        fields.integer("top_logprobs", 0, 0, 0)
        return fields.boolean("logprobs")
    return "logprobs" in fields and fields.integer("logprobs", 0, 0, 1) >= 0


# -------------------------------------------------------------------------------------------------------------- answers


def whole_answer(call: Call, answers: Sequence[Sequence[Answer]], version: str, model: Model) -> dict[str, Any]:
    """The JSON of a call that is not streamed. answers: of each request."""
    choices = []
    for request, of_request in zip(call.requests, answers, strict=True):
        for answer in of_request:
            choices.append(_choice(call, len(choices), request, answer, answer.text, 0, model))
    for choice in choices:
        if call.is_chat:
            choice["message"] = {"role": "assistant", "content": choice.pop("text")}
    kind = "chat.completion" if call.is_chat else "text_completion"
    return _envelope(call, kind, choices, version, model) | {"usage": usage(call, answers)}


def chunk(
    call: Call, index: int, request: Request, answer: Answer, shown: Answer, version: str, model: Model
) -> dict[str, Any]:
    """A chunk of a stream: what choice `index` has gained since `shown`."""
    text = answer.text[len(shown.text) :]
    choice = _choice(call, index, request, answer, text, len(shown.tokens), model)
    if call.is_chat:
        role = {} if shown.tokens else {"role": "assistant"}
        choice["delta"] = role | {"content": choice.pop("text")}
    kind = "chat.completion.chunk" if call.is_chat else "text_completion"
    return _envelope(call, kind, [choice], version, model)


def usage(call: Call, answers: Sequence[Sequence[Answer]]) -> dict[str, int]:
    """How many tokens there were."""
    prompt = sum(len(request.tokens) for request in call.requests)
    completion = sum(len(answer.tokens) for of_request in answers for answer in of_request)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def usage_chunk(call: Call, answers: Sequence[Sequence[Answer]], version: str, model: Model) -> dict[str, Any]:
    """The last chunk of a stream whose client asked for the number of tokens."""
    kind = "chat.completion.chunk" if call.is_chat else "text_completion"
    return _envelope(call, kind, [], version, model) | {"usage": usage(call, answers)}


def _envelope(call: Call, kind: str, choices: list, version: str, model: Model) -> dict[str, Any]:
    return {
        "id": call.identity,
        "object": kind,
        "created": call.created,
        "model": model.name,
        "choices": choices,
        "metadata": {"weight_version": version},
    }


def _choice(
    call: Call, index: int, request: Request, answer: Answer, text: str, start: int, model: Model
) -> dict[str, Any]:
    """A choice from its token `start` on."""
    choice = {"index": index, "text": text, "finish_reason": answer.finish_reason, "logprobs": None}
    if call.with_logprobs:
        pieces = [model.pieces[token] for token in answer.tokens]
        choice["logprobs"] = _logprobs(call.is_chat, pieces, answer.logp, start)
    if call.with_ids:
        choice["token_ids"] = answer.tokens[start:]
        choice["prompt_token_ids"] = request.tokens
    return choice


def _logprobs(is_chat: bool, pieces: list[bytes], logp: list[float], start: int) -> dict[str, Any]:
    """Of the tokens from `start` on: their texts and bytes, and where they begin in the text of the choice.

    The text of a token that is a part of a character is U+FFFD; its bytes, joined to those of its neighbors, are right.
    """
    tokens = [piece.decode(errors="replace") for piece in pieces[start:]]
    if is_chat:
        content = [
            {"token": token, "logprob": value, "bytes": list(piece), "top_logprobs": []}
            for token, value, piece in zip(tokens, logp[start:], pieces[start:], strict=True)
        ]
        return {"content": content}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offset = len(decoder.decode(b"".join(pieces[:start])))
    offsets = []
    for piece in pieces[start:]:
        unfinished, _ = decoder.getstate()
        offsets.append(offset + bool(unfinished))
        offset += len(decoder.decode(piece))
    return {"tokens": tokens, "token_logprobs": logp[start:], "top_logprobs": None, "text_offset": offsets}


def error_body(message: str, status: int, field: str | None = None) -> dict[str, Any]:
    """An error as OpenAI words it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": field, "code": status}}
