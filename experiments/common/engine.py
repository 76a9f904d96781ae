"""The engine of a server: requests that wait are sampled together, and each gets its completions as they grow.

One thread owns the model. It takes the requests in their order, as many as `rows` completions allow, pads them to
shapes that are powers of two, so that few programs are compiled, and samples with `rollouts.streaming`. The key of a
completion is (seed of the engine, the request's step, its number, which of its completions it is): what it says does
not depend on what is sampled beside it, and `rollouts.sampler.sample` says the same. New weights are taken between two
batches.
"""

import dataclasses
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rljax.data.prompts import pad_left, padded_width
from rljax.data.stop_strings import streamed_text
from rljax.ops.shapes import power_of_two
from rljax.rollouts.decode_state import Completions
from rljax.rollouts.streaming import stream
from rljax.types import LM, Params, PromptBatch, Resume, Sampling

STAGE_COLUMNS = 16  # sampled between two looks at who is done; 4 while somebody reads along


@dataclasses.dataclass(eq=False)
class Request:
    """n completions of one prompt that somebody waits for."""

    tokens: list[int]
    n: int = 1
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    step: int = 0  # with the number, what its key is made of
    number: int = 0
    stop_strings: tuple[bytes, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    reads_along: bool = False
    stages: "queue.Queue[Stage]" = dataclasses.field(default_factory=queue.Queue)
    is_abandoned: threading.Event = dataclasses.field(default_factory=threading.Event)


class Answer(NamedTuple):
    """A completion so far."""

    tokens: list[int]
    logp: list[float]  # at the temperature; at 1 where that is 0
    text: str  # without the stop token or string
    finish_reason: str | None  # stop, length; None: it goes on


class Stage(NamedTuple):
    """What a request has become so far: its answers, or why there are none."""

    answers: list[Answer]
    version: str
    problem: str = ""

    @property
    def is_last(self) -> bool:
        return bool(self.problem) or all(answer.finish_reason for answer in self.answers)


class Weights(NamedTuple):
    """Parameters, and the version by which their trainer knows them."""

    params: Params
    version: str


class Engine:
    """Samples for those who ask. `close` ends its thread; what waits then, or comes later, is told so.

    Args:
      pieces: the bytes of each token. stop: ids that end every completion. rows: most completions sampled at a time.
      load: (directory) -> parameters of the same shapes.
    """

    def __init__(
        self,
        lm: LM,
        params: Params,
        pieces: Sequence[bytes],
        stop: tuple[int, ...],
        rows: int,
        seed: int,
        load: Callable[[Path], Params],
    ):
        self.lm = lm
        self.weights = Weights(params, "0")
        self.pieces = [b"" if token in stop else piece for token, piece in enumerate(pieces)]
        self.stop = stop
        self.rows = rows
        self.seed = seed
        self.load = load
        self.counts: Counter[str] = Counter()
        self._waiting: deque[Any] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request; its stages come in `request.stages`."""
        self._put(request)

    def update_weights(self, directory: Path, version: str) -> None:
        """Take the weights of a directory after the requests that wait already. Raises what loading raises."""
        job = _Update(directory, version)
        self._put(job)
        problem = job.done.get()
        if problem is not None:
            raise problem

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self.thread.join()
        while self._waiting:
            self._refuse(self._waiting.popleft())

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def _put(self, job: Any) -> None:
        with self._changed:
            if not self._is_closed:
                self._waiting.append(job)
                self._changed.notify()
                return
        self._refuse(job)

    def _refuse(self, job: Any) -> None:
        problem = "the engine has ended"
        if isinstance(job, _Update):
            job.done.put(RuntimeError(problem))
        else:
            job.stages.put(Stage([], self.weights.version, problem))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return
                batch = self._take()
            if isinstance(batch, _Update):
                self._update(batch)
            elif batch:
                self._answer(batch)

    def _take(self) -> "list[Request] | _Update":
        """The requests of the next batch, without those that were abandoned; or new weights, if they are next."""
        batch = []
        count = 0
        while self._waiting:
            job = self._waiting[0]
            if isinstance(job, _Update):
                return batch or self._waiting.popleft()
            if job.is_abandoned.is_set():
                self._waiting.popleft()
                continue
            if batch and count + job.n > self.rows:
                break
            batch.append(self._waiting.popleft())
            count += job.n
        return batch

    def _update(self, job: "_Update") -> None:
        problem = None
        try:
            self.weights = Weights(self.load(job.directory), job.version)
            self.counts["updates"] += 1
        except Exception as error:  # of the files: raised where it was asked for
            problem = error
        job.done.put(problem)

    def _answer(self, batch: list[Request]) -> None:
        """Sample the batch; send each request its stages until it has the last one."""
        self.counts["batches"] += 1
        version = self.weights.version
        unfinished = set(range(len(batch)))
        starts = np.cumsum([0, *(request.n for request in batch)])
        try:
            for completions in self._sample(batch):
                for i in sorted(unfinished):
                    answers = self.read_answers(batch[i], completions, int(starts[i]))
                    stage = Stage(answers, version)
                    if stage.is_last or batch[i].reads_along:
                        batch[i].stages.put(stage)
                    if stage.is_last or batch[i].is_abandoned.is_set():
                        unfinished.remove(i)
                        self.counts["tokens"] += sum(len(answer.tokens) for answer in answers)
                if not unfinished:
                    break
        except Exception as error:  # a bug: no client is to wait for ever
            for i in unfinished:
                batch[i].stages.put(Stage([], version, f"{type(error).__name__}: {error}"))

    def _sample(self, batch: list[Request]) -> Iterator[Completions]:
        rows, sampling = padded_batch(batch, self.stop)
        every = min(4 if request.reads_along else STAGE_COLUMNS for request in batch)
        return stream(self.lm, self.weights.params, {}, rows, sampling, self.seed, 0, every)

    def read_answers(self, request: Request, completions: Completions, start: int) -> list[Answer]:
        """The request's completions, which begin at row `start`, each cut where the request says."""
        answers = []
        for row in range(start, start + request.n):
            sampled = int(completions.num_tokens[row])
            tokens = completions.tokens[row, :sampled].tolist()
            count, reason = self._cut(request, tokens)
            text = streamed_text(tokens[:count], self.pieces, request.stop_strings, reason is not None)
            answers.append(Answer(tokens[:count], completions.logp[row, :count].tolist(), text, reason))
        return answers

    def _cut(self, request: Request, tokens: list[int]) -> tuple[int, str | None]:
        """How many of the tokens belong to the completion, and why it ended there."""
        text = b""
        for k, token in enumerate(tokens[: request.max_tokens]):
            if token in self.stop or token in request.stop_tokens:
                return k + 1, "stop"
            if request.stop_strings:
                text += self.pieces[token]
                if any(string in text for string in request.stop_strings):
                    return k + 1, "stop"
        if len(tokens) >= request.max_tokens:
            return request.max_tokens, "length"
        return len(tokens), None


class _Update:
    """New weights that somebody waits for."""

    def __init__(self, directory: Path, version: str):
        self.directory = directory
        self.version = version
        self.done: queue.Queue[Exception | None] = queue.Queue()


def padded_batch(batch: Sequence[Request], stop: tuple[int, ...]) -> tuple[PromptBatch, Sampling]:
    """The requests as one batch of prompts, in shapes of powers of two: what is added are copies of the first."""
    P = power_of_two(len(batch))
    requests = [(p, g) for p, request in enumerate(batch) for g in range(request.n)]
    requests += [(0, 0)] * (power_of_two(len(requests)) - len(requests))
    rows = [*batch, *[batch[0]] * (P - len(batch))]
    width = padded_width(max(len(request.tokens) for request in rows))
    tokens, mask = pad_left([request.tokens for request in rows], width, 0)

    def of_rows(name: str, dtype) -> np.ndarray:
        return np.array([getattr(request, name) for request in rows], dtype)

    resume = Resume(np.array(requests, np.int32), start_step=of_rows("step", np.int32))
    prompts = PromptBatch(tokens, mask, of_rows("number", np.int32), [{} for _ in rows], 0, resume)
    top_k = of_rows("top_k", np.int32)
    top_p = of_rows("top_p", np.float32)
    sampling = Sampling(
        temperature=of_rows("temperature", np.float32),
        top_p=top_p if (top_p < 1).any() else None,
        top_k=np.where(top_k > 0, top_k, 1 << 30) if (top_k > 0).any() else None,
        max_tokens=padded_width(max(request.max_tokens for request in rows)),
        stop=stop,
        logp="policy",
    )
    return prompts, sampling
