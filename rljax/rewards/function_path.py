"""Functions pickled for another process by their import path, never by their code.

Legal are functions at the top level of a module or of the running script, and `functools.partial` of such. A worker
loads the script from its file again, under another name, so that its `if __name__ == "__main__"` does not run.
"""

import functools
import importlib
import importlib.util
import operator
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

SCRIPT = "__rljax_script__"  # the name under which a worker loads the running script


def function_name(function: Callable) -> str:
    """`module:function`, for error messages; a partial has the name of what it calls."""
    while isinstance(function, functools.partial):
        function = function.func
    kind = type(function)
    module = getattr(function, "__module__", kind.__module__)
    qualname = getattr(function, "__qualname__", kind.__qualname__)
    return f"{module}:{qualname}"


def pickle_function(function: Callable) -> bytes:
    """The function's import path, for `unpickle_function`. Raises ValueError if another process cannot import it.

    Raises RuntimeError in a worker process that imports a script which hands its own functions to workers.
    """
    try:
        return pickle.dumps(_path_of(function))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{function_name(function)}: an argument bound by partial cannot be pickled: {error}"
        ) from None


def unpickle_function(pickled: bytes) -> Callable:
    """The function, its module imported if need be. Raises whatever that import raises."""
    return _function_at(pickle.loads(pickled))


def _path_of(function: Callable) -> tuple:
    """("module", name, qualname), ("script", file, qualname), or ("partial", path, args, keywords)."""
    if isinstance(function, functools.partial):
        return "partial", _path_of(function.func), function.args, function.keywords
    module = getattr(function, "__module__", None)
    qualname = getattr(function, "__qualname__", None)
    try:
        is_importable = operator.attrgetter(qualname)(sys.modules[module]) is function
    except (AttributeError, KeyError, TypeError):  # <lambda> and <locals> are no attributes
        is_importable = False
    if module == SCRIPT:
        raise RuntimeError(
            "a worker process imported this script for its function, and met the training; legal: what the script runs "
            'stands under if __name__ == "__main__":'
        )
    main = sys.modules["__main__"]
    if is_importable and module != "__main__":
        return "module", module, qualname
    if is_importable and main.__spec__ is not None:  # python -m package.module
        return "module", main.__spec__.name, qualname
    if is_importable and Path(getattr(main, "__file__", None) or "").is_file():
        return "script", str(Path(main.__file__).resolve()), qualname
    raise ValueError(
        f"{function_name(function)} cannot be sent to a worker process. Define it at the top level of a file that can "
        "be imported, or of the script you run (not a lambda, not inside another function, not in a notebook); a "
        "functools.partial of such a function is fine. Or call it in the training process, unprotected: "
        "make_score(..., pool=None)"
    )


def _function_at(path: tuple) -> Callable:
    kind, place, *rest = path
    if kind == "partial":
        args, keywords = rest
        return functools.partial(_function_at(place), *args, **keywords)
    module = importlib.import_module(place) if kind == "module" else _load_script(place)
    (qualname,) = rest
    return operator.attrgetter(qualname)(module)


def _load_script(path: str) -> ModuleType:
    if SCRIPT not in sys.modules:
        spec = importlib.util.spec_from_file_location(SCRIPT, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[SCRIPT] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[SCRIPT]
            raise
    return sys.modules[SCRIPT]
