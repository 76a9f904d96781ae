"""How a function travels to another process: by where it is written, never by its code.

Legal are functions at the top level of a module or of the running script, and `functools.partial` of such. A script is
loaded again in the worker from its file, under another name, so that its `if __name__ == "__main__"` does not run.
"""

import functools
import importlib
import importlib.util
import operator
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

SCRIPT = "__rljax_script__"  # the name under which a worker loads the running script


def name_of(function: Callable) -> str:
    """`module:function`, for messages; a partial has the name of what it calls."""
    while isinstance(function, functools.partial):
        function = function.func
    kind = type(function)
    return f"{getattr(function, '__module__', kind.__module__)}:{getattr(function, '__qualname__', kind.__qualname__)}"


def refer(function: Callable) -> bytes:
    """What `resolve` needs to find the function again. Raises ValueError if another process cannot."""
    try:
        return pickle.dumps(_refer(function))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(f"{name_of(function)}: an argument bound by partial cannot travel: {error}") from None


def resolve(reference: bytes) -> Callable:
    """The function of a reference, its module imported if need be. Raises whatever that import raises."""
    return _resolve(pickle.loads(reference))


def _refer(function: Callable):
    if isinstance(function, functools.partial):
        return "partial", _refer(function.func), function.args, function.keywords
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    try:
        found = operator.attrgetter(qualname)(sys.modules[module]) is function
    except (AttributeError, KeyError, TypeError):  # <lambda> and <locals> are no attributes
        found = False
    main = sys.modules["__main__"]
    if found and module != "__main__":
        return "module", module, qualname
    if found and main.__spec__ is not None:  # python -m package.module
        return "module", main.__spec__.name, qualname
    if found and Path(getattr(main, "__file__", None) or "").is_file():
        return "script", str(Path(main.__file__).resolve()), qualname
    raise ValueError(
        f"{name_of(function)} cannot be sent to a worker process. Define it at the top level of a file that can be "
        "imported, or of the script you run (not a lambda, not inside another function, not in a notebook); a "
        "functools.partial of such a function is fine. Or call it in the training process, unprotected: "
        "make_score(..., pool=None)"
    )


def _resolve(parts) -> Callable:
    kind, place, *rest = parts
    if kind == "partial":
        return functools.partial(_resolve(place), *rest[0], **rest[1])
    module = importlib.import_module(place) if kind == "module" else _script(place)
    return operator.attrgetter(rest[0])(module)


def _script(path: str):
    if SCRIPT not in sys.modules:
        spec = importlib.util.spec_from_file_location(SCRIPT, path)
        module = sys.modules[SCRIPT] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[SCRIPT]
            raise
    return sys.modules[SCRIPT]
