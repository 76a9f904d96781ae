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
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rljax.data.prompts import pad_left, padded_width
from rljax.data.stop_strings import streamed_text
from rljax.ops.shapes import power_of_two
from rljax.rollouts.decode_state import Completions
from rljax.rollouts.sampler import prepare_once
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
    """Parameters as decoding takes them (`LM.prepare`), and the version by which their trainer knows them."""

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
        self.lm, params, _ = prepare_once(lm, params, {})
        self.weights = Weights(params, "0")
        self.pieces = [b"" if token in stop else piece for token, piece in enumerate(pieces)]
        self.stop = stop
        self.rows = rows
        self.seed = seed
        self.load = lambda directory: prepare_once(lm, load(directory), {})[1]
        self.counts: Counter[str] = Counter()
        self._waiting: deque[Any] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(self, *requests: Request) -> None:
        """Queue requests, which one version of the weights answers; their stages come in `request.stages`."""
        self._put(*requests)

    def update_weights(self, directory: Path, version: str) -> None:
        """Take the weights of a directory after the requests that wait already. Raises what loading raises."""
        job = _Update(directory, version)
        self._put(job)
        problem = job.done.get()
        if problem is not None:
            raise problem

    def close(self) -> None:
        """End the thread after the stage that it samples; who waits for the rest of a completion is told so too."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self.thread.join()
        while self._waiting:
            self._refuse(self._waiting.popleft())

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def _put(self, *jobs: Any) -> None:
        with self._changed:
            if not self._is_closed:
                self._waiting.extend(jobs)
                self._changed.notify()
                return
        for job in jobs:
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
        ends = [[_End() for _ in range(request.n)] for request in batch]
        try:
            for completions in self._sample(batch):
                if self._is_closed:
                    break
                for i in sorted(unfinished):
                    request = batch[i]
                    self._read_on(request, completions, int(starts[i]), ends[i])
                    is_last = all(end.reason for end in ends[i])
                    if is_last or request.reads_along:
                        answers = self.read_answers(request, completions, int(starts[i]), ends[i])
                        request.stages.put(Stage(answers, version))
                    if is_last or request.is_abandoned.is_set():
                        unfinished.remove(i)
                        self.counts["tokens"] += sum(end.count for end in ends[i])
                if not unfinished:
                    break
            for i in unfinished:
                self._refuse(batch[i])
        except Exception as error:  # a bug: no client is to wait for ever
            traceback.print_exc()
            for i in unfinished:
                batch[i].stages.put(Stage([], version, f"{type(error).__name__}: {error}"))

    def _sample(self, batch: list[Request]) -> Iterator[Completions]:
        rows, sampling = padded_batch(batch, self.stop)
        every = min(4 if request.reads_along else STAGE_COLUMNS for request in batch)
        return stream(self.lm, self.weights.params, {}, rows, sampling, self.seed, 0, every)

    def _read_on(self, request: Request, completions: Completions, start: int, ends: "list[_End]") -> None:
        """Look for the end of each of the request's completions, which begin at row `start`, in what is new of it."""
        kept = max(map(len, request.stop_strings), default=1) - 1  # bytes that may begin a stop string
        for row, end in enumerate(ends, start):
            sampled = min(int(completions.num_tokens[row]), request.max_tokens)
            for token in completions.tokens[row, end.count : sampled].tolist():
                if end.reason:
                    break
                end.count += 1
                text = end.tail + self.pieces[token]
                end.tail = text[max(len(text) - kept, 0) :]
                is_stop = token in self.stop or token in request.stop_tokens
                if is_stop or any(string in text for string in request.stop_strings):
                    end.reason = "stop"
            if end.count == request.max_tokens and not end.reason:
                end.reason = "length"

    def read_answers(self, request: Request, completions: Completions, start: int, ends: "list[_End]") -> list[Answer]:
        """The request's completions, which begin at row `start`, each cut where it ends."""
        answers = []
        for row, end in enumerate(ends, start):
            tokens = completions.tokens[row, : end.count].tolist()
            shown = tokens[:-1] if tokens and tokens[-1] in request.stop_tokens else tokens
            text = streamed_text(shown, self.pieces, request.stop_strings, end.reason is not None)
            answers.append(Answer(tokens, completions.logp[row, : end.count].tolist(), text, end.reason))
        return answers


@dataclasses.dataclass
class _End:
    """How far a completion was read, and why it ends there."""

    count: int = 0  # tokens of it
    reason: str | None = None  # stop, length; None: it goes on
    tail: bytes = b""  # the last bytes of its text


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
