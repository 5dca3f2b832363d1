"""Values as JSON that every program reads: Python also writes NaN and Infinity, which JSON does not have."""

from __future__ import annotations

import math
from typing import Any


def valid_json(value: Any) -> Any:
    """A value whose numbers JSON has: NaN becomes null, and infinity the text "inf", as in settings."""
    if isinstance(value, dict):
        return {key: valid_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [valid_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
