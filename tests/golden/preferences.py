"""Preference losses, reward models and supervised losses against the peers."""

from tests.golden.entry import Entry

TABLE: dict[str, Entry] = {}
