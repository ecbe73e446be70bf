"""How tests look at refusals: by the field that is named, and for one test a message by its words."""

import contextlib
from collections.abc import Iterator

import pytest

from mae_jax.errors import StatedError


@contextlib.contextmanager
def refused(field: str | None, *words: str, kind: type[StatedError] = StatedError) -> Iterator[pytest.ExceptionInfo]:
    """Expect a stated error about a field; `words` must stand in its message, for the one test that reads it."""
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.field == field, f"it names {caught.value.field!r}: {caught.value}"
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
