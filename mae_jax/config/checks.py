"""Checks that several configurations share; a refusal names the field and its value."""

import math


def require_positive(owner: object, *names: str) -> None:
    """Raise ValueError unless these fields are positive and finite."""
    for name in names:
        value = getattr(owner, name)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} {value} must be positive and finite")


def require_whole(owner: object, *names: str) -> None:
    """Raise ValueError unless these fields are whole numbers, 1 or more; True does not count as one."""
    for name in names:
        value = getattr(owner, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} {value!r} must be a whole number, 1 or more")


def require_unit_interval(owner: object, *names: str) -> None:
    """Raise ValueError unless these fields are in [0, 1)."""
    for name in names:
        value = getattr(owner, name)
        if not 0 <= value < 1:
            raise ValueError(f"{name} {value} is outside [0, 1)")
