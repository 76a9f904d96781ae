"""Every recorded file and case of the peers' own code, values and gradients, in float64.

    python -m pytest tests/test_golden.py --golden-dir DIR      # default: tests/golden/data

TABLE says which function of rljax each file pins. Hyperparameters come from the files, so that a directory recorded
with other seeds, shapes and hyperparameters passes too. Cases with a mask are also fed with their rows in another order
and garbage columns on the right: the answer must be the same, in that order. By day that is one case a file;
`-m "not parity"` runs all.
"""

import fnmatch
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import credit, estimation, losses, preferences
from tests.golden.entry import Case, Entry, moved

DATA = Path(__file__).parent / "golden" / "data"
TABLE: dict[str, Entry] = {**estimation.TABLE, **credit.TABLE, **losses.TABLE, **preferences.TABLE}


def pytest_generate_tests(metafunc):
    if {"file", "case"} <= set(metafunc.fixturenames):
        directory = Path(metafunc.config.getoption("--golden-dir") or DATA)
        if not list(directory.glob("*.npz")):
            raise pytest.UsageError(f"{directory}: no .npz files there")
        found = [(path, name) for path in sorted(directory.glob("*.npz")) for name in names_of(path)]
        if metafunc.function is test_rows_in_another_order_and_garbage_on_the_right_change_nothing:
            found = [(path, name) for path, name in found if is_moved(path, name)]
            by_day = dict(sorted(found, key=lambda pair: "holes" in pair[1]))  # with holes in the mask, if a case has
            night = [() if name == by_day[path] else pytest.mark.nightly for path, name in found]
        else:
            night = [()] * len(found)
        cases = zip(found, night, strict=True)
        cases = [pytest.param(path, name, id=f"{path.stem}-{name}", marks=marks) for (path, name), marks in cases]
        metafunc.parametrize(("file", "case"), cases)


def is_moved(path: Path, name: str) -> bool:
    """Whether the case has a mask, and nothing that hangs on the place of a row or column."""
    entry = TABLE.get(path.stem)
    return entry is not None and entry.mask is not None and not entry.not_moved and not reason(name, entry.not_run)


def names_of(path: Path) -> list[str]:
    with np.load(path) as z:
        return list(json.loads(str(z["__meta__"]))["cases"])


def read(path: Path, name: str) -> Case:
    """The case, with groups as ids: peers that count on contiguous groups say how many rows make one."""
    with np.load(path) as z:
        about = json.loads(str(z["__meta__"]))["cases"][name]
        ins = {x: z[f"{name}/in/{x}"] for x in about["inputs"]}
        outs = {x: z[f"{name}/out/{x}"] for x in about["outputs"]}
    hyper = about["hyper"]
    ins = {x: y.astype(np.float64) if y.dtype.kind == "f" else y for x, y in ins.items()}
    size = hyper.get("num_generations") or hyper.get("n_samples_per_prompt")
    if size and "index" not in ins:
        rows = next(np.shape(x)[0] for x_name, x in ins.items() if x_name != "reward_weights")
        ins["index"] = np.arange(rows) // size
    width = max((np.shape(x)[1] for x in ins.values() if np.ndim(x) > 1), default=0)
    return Case(name, hyper, ins, outs, width)


def reason(name: str, patterns: dict[str, str]) -> str | None:
    return next((why for pattern, why in patterns.items() if fnmatch.fnmatchcase(name, pattern)), None)


def answer(entry: Entry, case: Case) -> dict:
    return jax.device_get(entry.run(case._replace(ins=jax.tree.map(jnp.asarray, case.ins))))


def compare(entry: Entry, case: Case, got: dict, order=None, mask=None) -> None:
    """`order`: rows of `got` are the recorded rows in this order, and its columns may be more."""
    compared = [name for name in case.outs if not reason(name, entry.not_compared)]
    assert compared, "nothing is compared"
    assert set(compared) <= set(got), f"no answer for {sorted(set(compared) - set(got))}"
    for name in compared:
        want, ours = np.asarray(case.outs[name]), np.asarray(got[name])
        if order is not None and want.ndim:
            rows = order if want.shape[0] == len(order) else order[: len(order) // 2]
            if want.shape[0] in (len(order), len(order) // 2):
                want = want[rows]
            ours = ours[tuple(slice(0, n) for n in want.shape)]
        assert ours.shape == want.shape, f"{name}: {ours.shape} instead of {want.shape}"
        if entry.at_mask and mask is not None and want.shape == mask.shape:
            here = mask if order is None else mask[order]
            want, ours = want[here], ours[here]
        scale = max(1.0, np.abs(want[np.isfinite(want)]).max(initial=0.0))
        np.testing.assert_allclose(ours, want, rtol=entry.rtol, atol=entry.rtol * scale, err_msg=name)


def test_every_recorded_case(file, case):
    assert file.stem in TABLE, f"no row of TABLE for {file.name}"
    entry = TABLE[file.stem]
    if why := reason(case, entry.not_run):
        pytest.skip(why)
    recorded = read(file, case)
    with jax.enable_x64(True):
        compare(entry, recorded, answer(entry, recorded), mask=mask_of(entry, recorded))


def test_rows_in_another_order_and_garbage_on_the_right_change_nothing(file, case):
    entry, recorded = TABLE[file.stem], read(file, case)
    with jax.enable_x64(True):
        other, order = moved(recorded, entry)
        compare(entry, recorded, answer(entry, other), order, mask_of(entry, recorded))


def mask_of(entry: Entry, case: Case) -> np.ndarray | None:
    return None if entry.mask is None else np.asarray(case.ins[entry.mask]) > 0


def test_the_table_has_a_row_for_every_file_and_no_other():
    assert {path.stem for path in DATA.glob("*.npz")} == set(TABLE)
