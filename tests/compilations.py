"""How often JAX compiled a jitted function, by JAX's own log.

`_cache_size()` counts something else: the entries of the C++ fast path, which takes no new ones once its table is full.
The record is written when a function is lowered, before the persistent cache is asked: a program that comes from there
counts as well.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import jax


class _Count(logging.Handler):
    """Counts the names in records "Compiling jit(name) with ..."."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        if name := re.match(r"Compiling jit\((.+?)\) with", record.getMessage()):
            self.found[name[1]] += 1


@contextmanager
def count_compilations() -> Iterator[Counter]:
    """A Counter of the names of the functions that are compiled inside the block."""
    handler, logger = _Count(), logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield handler.found
    finally:
        logger.removeHandler(handler)
