"""A part of the parameters, chosen by path."""

from collections.abc import Callable
from typing import Any

Tree = dict[str, Any]


def select(params: Tree, chosen: Callable[[tuple[str, ...]], bool], path: tuple[str, ...] = ()) -> Tree:
    """The leaves of a nested dictionary whose path is chosen; branches without any are gone."""
    found: Tree = {}
    for name, value in params.items():
        here = (*path, name)
        if isinstance(value, dict):
            if branch := select(value, chosen, here):
                found[name] = branch
        elif chosen(here):
            found[name] = value
    return found


def merge(params: Tree, part: Tree) -> Tree:
    """`params` with the leaves of `part` in place of its own."""
    return {
        name: merge(value, part[name]) if isinstance(value, dict) and name in part else part.get(name, value)
        for name, value in params.items()
    }
