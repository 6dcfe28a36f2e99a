"""A little of `make fuzz`: the same cases on every machine."""

from __future__ import annotations

import fuzz


def test_files_nobody_meant() -> None:
    found = fuzz.fuzz(2026, count=100)
    assert not found["FINDING"]
    assert found["packed"] >= 8  # that what is accepted is right has been looked at, too
