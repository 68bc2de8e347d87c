"""JSON that every reader takes: `json.dumps` alone writes bare NaN and Infinity, which are no JSON."""

import json
import math
from typing import Any

NONFINITE = "nonfinite"
"""The key under which an object names its numbers that were not finite and are null."""


def dumps(value: Any, indent: int | None = None) -> str:
    """Write a value as JSON, with null for each number that is not finite."""
    return json.dumps(_finite(value, "", []), indent=indent, allow_nan=False)


def dumps_flagged(record: dict[str, Any], indent: int | None = None) -> str:
    """Write an object as JSON, with null for each number that is not finite, and ``nonfinite``, the keys of those.

    A number inside another object or a list is named by all keys and indices that lead to it: ``wait_seconds.1``.
    """
    keys: list[str] = []
    finite = _finite(record, "", keys)
    return json.dumps({**finite, NONFINITE: keys} if keys else finite, indent=indent, allow_nan=False)


def with_nan(record: dict[str, Any]) -> dict[str, Any]:
    """Put NaN back at the top-level keys that a record of `dumps_flagged` flags."""
    flagged = record.get(NONFINITE, [])
    kept = {key: value for key, value in record.items() if key != NONFINITE}
    return {key: math.nan if key in flagged else value for key, value in kept.items()}


def _finite(value: Any, key: str, nonfinite: list[str]) -> Any:
    prefix = f"{key}." if key else ""
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(key)
        return None
    if isinstance(value, dict):
        return {name: _finite(inner, f"{prefix}{name}", nonfinite) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner, f"{prefix}{index}", nonfinite) for index, inner in enumerate(value)]
    return value
