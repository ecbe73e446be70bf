"""A failure for want of memory names what to change; no other failure is taken for one."""

from dataclasses import replace

import pytest
from jax.errors import JaxRuntimeError

from mae_jax.errors import StatedError
from mae_jax.presets.pretraining import PRESETS
from mae_jax.presets.transfer import FINETUNE
from mae_jax.runs.run import too_little_is_told

CONFIG = PRESETS["digits"]()


@pytest.mark.parametrize(
    "failure", [JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), MemoryError("no 9 bytes")]
)
def test_the_fields_are_named(failure):
    told = r"batch_size 64 with accumulate 1 \(.*9 bytes.*--model\.remat;"
    with pytest.raises(StatedError, match=told), too_little_is_told(CONFIG):
        raise failure


def test_what_is_done_already_is_not_advised():
    config = replace(CONFIG, model=replace(CONFIG.model, remat=True))
    with pytest.raises(StatedError) as told, too_little_is_told(config):
        raise MemoryError("no")
    assert "remat" not in str(told.value)


@pytest.mark.parametrize("failure", [JaxRuntimeError("INTERNAL: a kernel"), ValueError("RESOURCE_EXHAUSTED")])
def test_other_failures_pass(failure):
    with pytest.raises(type(failure), match=str(failure)), too_little_is_told(CONFIG):
        raise failure


def test_only_pretraining_can_be_planned():
    with pytest.raises(StatedError, match=r"--model\.remat$"), too_little_is_told(next(iter(FINETUNE.values()))()):
        raise MemoryError("no")
