"""The collectives of a compiled program: what devices send each other, read from the text of its HLO.

A loop's body counts as often as it runs. XLA writes the trip count of a counted loop into the text; of a loop that may
end early (decoding) the caller says how often it runs at most.
"""

import math
import re
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
ITEM_BYTES |= {"s64": 8, "u64": 8, "f64": 8}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")
_LOOP = re.compile(r"condition=%([\w.\-]+), body=%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_COUNTED = {
    "constant",
    "parameter",
    "get-tuple-element",
    "compare",
    "fusion",
    "copy",
    "bitcast",
}  # `counter < constant`
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}")


class Collective(NamedTuple):
    """One collective operation of a program."""

    kind: str
    bytes: int  # of the whole array that is gathered or reduced over the group
    group: tuple[int, ...]  # devices of the first group, as positions in the flattened mesh
    times: int  # how often it runs in a call of the program

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a call of the program, with a ring algorithm."""
        n = len(self.group)
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(self.kind, (n - 1) / n)
        return self.times * self.bytes * share


def collectives(text: str, open_loop_trips: int = 1) -> list[Collective]:
    """The collectives of a compiled module's text.

    open_loop_trips: how often loops run whose trip count the text does not say.
    """
    computations = _computations(text)
    times = _times(computations, open_loop_trips)
    found: dict[tuple, Collective] = {}
    for name, lines in computations.items():
        for place, (result, opcode, rest) in enumerate(lines):
            kind = opcode.removesuffix("-start")
            if kind not in KINDS or not times.get(name):
                continue
            group = _group(rest)
            if len(group) > 1:
                # What a TPU does in steps beside products is written once for each step, with the same channel. All
                # that a `shard_map` asks for may have one channel too: told apart by what it is.
                channel, op = (re.search(pattern, rest) for pattern in (r"channel_id=\d+", r'op_name="[^"]*"'))
                size = _bytes(kind, result, len(group))
                key = (channel[0], kind, size, group, op and op[0]) if channel else (name, place)
                one = Collective(kind, size, group, times[name])
                found[key] = max(one, found.get(key, one), key=lambda other: other.sent)
    return list(found.values())


def _computations(text: str) -> dict[str, list[tuple[str, str, str]]]:
    """name -> (shape of the result, opcode, what follows) of each instruction; the entry's name is ""."""
    out: dict[str, list] = {}
    lines: list = []
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            lines = out.setdefault("" if line.startswith("ENTRY") else head[1], [])
            continue
        found = _INSTRUCTION.match(line)
        if found:
            lines.append(found.groups())
    return out


def _times(computations: dict, open_loop_trips: int) -> dict[str, int]:
    """How often each computation runs in a call of the entry."""
    times: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for _, opcode, rest in computations.get(name, ()):
            if opcode == "while":
                condition, body = _LOOP.search(rest).groups()
                trips = _trips(rest, computations.get(condition, ())) or open_loop_trips
                visit(condition, count * (trips + 1))
                visit(body, count * trips)
            for names in _CALLED.findall(rest):
                for called in re.findall(r"%([\w.\-]+)", names):
                    visit(called, count)

    visit("", 1)
    return times


def _trips(rest: str, condition: list) -> int | None:
    """How often a loop runs; None where its condition is more than `counter < constant`."""
    known = _TRIPS.search(rest)
    if known:
        return int(known[1])
    limits = [re.match(r"(\d+)\)", rest) for result, opcode, rest in condition if opcode == "constant"]
    if len(limits) == 1 and limits[0] and {opcode for _, opcode, _ in condition} <= _COUNTED:
        return int(limits[0][1])
    return None


def _bytes(kind: str, result: str, group: int) -> int:
    """Of the array that is gathered or reduced. An asynchronous start returns its operand and its result."""
    sizes = []
    for dtype, dims in _ARRAY.findall(result):
        if dtype in ITEM_BYTES:
            sizes.append(ITEM_BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d))
    if not sizes:
        return 0
    if kind == "reduce-scatter":  # its result is one share
        return group * min(sizes) if len(sizes) > 1 else group * sizes[0]
    if kind in ("all-reduce", "all-to-all") and result.startswith("("):
        return sum(sizes)
    return max(sizes)


def _group(rest: str) -> tuple[int, ...]:
    """Devices of the first group, in any of the forms in which XLA writes groups."""
    iota = _IOTA.search(rest)
    if iota:
        groups, size = int(iota[1]), int(iota[2])
        return tuple(_ids(iota[3], iota[4]).reshape(groups, size)[0].tolist())
    mesh = _MESH.search(rest)
    if mesh:
        return _group_of_mesh(mesh)
    listed = _LISTED.search(rest)
    return _numbers(listed[1]) if listed else ()


def _group_of_mesh(mesh: re.Match) -> tuple[int, ...]:
    """mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}: a group along the axis b; 'b':(2)2 is its second half."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    ids = np.arange(math.prod(sizes.values())) if mesh[2] is None else _ids(mesh[2], mesh[3])
    ids = ids.reshape(tuple(sizes.values()))
    along = []
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[4]):
        before, size = (int(before), int(size)) if size else (1, sizes[name])
        after = sizes[name] // (before * size)
        along.append((list(sizes).index(name), [after * i for i in range(size)]))
    group = ids[np.ix_(*[next((at for axis, at in along if axis == i), [0]) for i in range(ids.ndim)])]
    return tuple(group.ravel().tolist())


def _ids(dims: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)
