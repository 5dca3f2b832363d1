"""How numbers, times and sizes are written."""

from __future__ import annotations

from math import inf, nan

from ubmd.texts import countdown, duration, number, size, to_go, wall_time


def test_numbers_and_what_is_none() -> None:
    assert [number(value, ".2f") for value in (1.0, -0.255, 3e4)] == ["1.00", "-0.26", "30000.00"]
    assert [number(value, "g") for value in (None, nan, inf, -inf)] == ["-"] * 4


def test_times_change_their_unit() -> None:
    seconds = (3, 89, 91, 600, 5399, 5401, 9000, 172799, 3e5)
    assert [duration(s) for s in seconds] == [
        *("3 s", "89 s", "2 min", "10 min", "90 min", "1.5 h", "2.5 h", "48.0 h", "3.5 days")
    ]
    assert [wall_time(s) for s in seconds] == [
        *("3.0 s", "89.0 s", "1.5 min", "10.0 min", "90.0 min", "1.5 h", "2.5 h", "48.0 h", "83.3 h")
    ]
    assert [countdown(s) for s in (0.4, 59.4, 59.6, 185, 3599.6, 3700)] == [
        *("0 s", "59 s", "1 min 00 s", "3 min 05 s", "1 h 00 min", "1 h 01 min")
    ]


def test_what_is_soon_over_is_not_worth_a_word() -> None:
    assert [to_go(s) for s in (None, 0.49, 0.5, 600.0)] == ["", "", "about 0 s to go", "about 10 min to go"]
    assert [to_go(s, "run: ") for s in (None, 600.0)] == ["", "run: about 10 min to go"]


def test_sizes_change_their_unit() -> None:
    found = [size(count) for count in (0, 999, 1000, 12_345, 3_000_000, 1_500_000_000, 2e12)]
    assert found == ["0 bytes", "999 bytes", "1 kB", "12 kB", "3 MB", "1.5 GB", "2000.0 GB"]
