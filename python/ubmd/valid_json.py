"""JSON that every program reads (Python also writes NaN and Infinity, which JSON does not have), read safely."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

_DEEPEST = 1000  # levels; Python's own limit


def parse_json(text: str | bytes) -> Any:
    """What a JSON text of anyone's file holds; as ``json.loads``, but deep nesting is an error in every process.

    Some libraries raise Python's limit to 100,000 levels (symfc, when it is imported), at which the parser's stack
    overflows: the process would crash.

    Raises:
        ValueError: it is no JSON. RecursionError: it is nested too deep.
    """
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(min(before, _DEEPEST))
    try:
        return json.loads(text)
    finally:
        sys.setrecursionlimit(before)


def valid_json(value: Any) -> Any:
    """A value whose numbers JSON has: NaN becomes null, and infinity the text "inf", as in settings."""
    if isinstance(value, dict):
        return {key: valid_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [valid_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
