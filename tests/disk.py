"""What happens on the disk, in order."""

import os

import pytest

REPLACED = "replaced"


def recorded(patch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows: the path of what is synced, and REPLACED where one takes another's place."""
    order: list[str] = []
    sync, replace = os.fsync, os.replace
    patch.setattr("os.fsync", lambda file: (order.append(os.readlink(f"/proc/self/fd/{file}")), sync(file)))
    patch.setattr("os.replace", lambda *paths: (order.append(REPLACED), replace(*paths)))
    return order
