"""Checks that several configurations share; a refusal names the field and its value."""

import dataclasses
import math
from typing import Any, Literal, get_args, get_origin


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


def require_not_negative(owner: object, *names: str) -> None:
    """Raise ValueError unless these fields are finite and not negative."""
    for name in names:
        value = getattr(owner, name)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} {value} must be finite and not negative")


def require_choices(owner: Any) -> None:
    """Raise ValueError unless every field whose type is a list of choices (`Literal`) has one of them."""
    for field in dataclasses.fields(owner):
        value, choices = getattr(owner, field.name), get_args(field.type)
        if get_origin(field.type) is Literal and value not in choices:
            raise ValueError(f"{field.name} {value} is unknown (there are: {', '.join(choices)})")


def require_unit_interval(owner: object, *names: str) -> None:
    """Raise ValueError unless these fields are in [0, 1)."""
    for name in names:
        value = getattr(owner, name)
        if not 0 <= value < 1:
            raise ValueError(f"{name} {value} is outside [0, 1)")
