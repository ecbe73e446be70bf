"""Reads that are left behind by one that failed."""

import sys
import types
from pathlib import Path

import orbax.checkpoint as ocp

from mae_jax.storage.checkpoints import quiet_threads

LEFT_BEHIND = """
async def read(waiting):
    try:
        await waiting
    except BaseException as error:  # its own end too, as Orbax does
        raise Exception("while reading") from error
"""


def test_reads_that_are_left_behind_are_not_reported(monkeypatch):
    """What Orbax waits for when its loop is closed; a coroutine of anyone else is reported as ever."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(unraisable.object.cr_code))
    files = [f"{Path(ocp.__file__).parent}/serialization.py", "elsewhere.py"]
    with quiet_threads():
        for file in files:
            scope = {}
            exec(compile(LEFT_BEHIND, file, "exec"), scope)
            left = scope["read"](never())
            left.send(None)  # until it waits
            del left
    assert [code.co_filename for code in reported] == files[1:]


@types.coroutine
def never():
    """Waits for ever."""
    yield
