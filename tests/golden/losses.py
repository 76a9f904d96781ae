"""Policy losses, importance corrections and masks against the peers."""

from tests.golden.entry import Entry

TABLE: dict[str, Entry] = {}
