"""Names that are nearly right: which known name a misspelt one was meant to be."""

from __future__ import annotations

from collections.abc import Iterable

_SHORT = 3  # letters of a name in which only one mistake is forgiven


def distance(a: str, b: str) -> int:
    """Letters to insert, delete, replace or swap with their neighbour to make one text of the other."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        last, row, older = row, [i], before
        for j, other in enumerate(b, start=1):
            row.append(min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != other)))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                row[j] = min(row[j], older[j - 2] + 1)
        before = last
    return row[-1]


def nearest(name: str, known: Iterable[str], strict: Iterable[str] = ()) -> str | None:
    """The known name that is at most two letters away, or None.

    Args:
        name: what was written.
        known: what may have been meant; in names of up to three letters only one letter may differ, unless one name
            begins with the other.
        strict: names of ``known`` that must be at most one letter away.
    """
    strict = set(strict)
    found = []
    for other in sorted(known):
        least = min(len(name), len(other))
        if least > 1 and name.lower() == other.lower():  # 'ENCUT' for 'encut'
            found.append((0, other))
            continue
        begins = name.startswith(other) or other.startswith(name)  # 'rcut' for 'rc'
        allowed = 0 if least <= 1 else 1 if other in strict or (least <= _SHORT and not begins) else 2
        if abs(len(name) - len(other)) <= allowed and (away := distance(name, other)) <= allowed:
            found.append((away, other))
    return min(found)[1] if found else None
