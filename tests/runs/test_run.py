"""A failure for want of memory names what to change; no other failure is taken for one."""

from dataclasses import replace

import pytest
from jax.errors import JaxRuntimeError

from mae_jax.presets.pretraining import PRESETS
from mae_jax.presets.transfer import FINETUNE
from mae_jax.runs.run import memory_errors
from tests.refusals import refused

CONFIG = PRESETS["digits"]()


@pytest.mark.parametrize(
    "failure", [JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), MemoryError("no 9 bytes")]
)
def test_the_fields_are_named(failure):
    with refused("batch_size", "batch_size 64 with accumulate 1", "9 bytes", "--model.remat"), memory_errors(CONFIG):
        raise failure


def test_what_is_done_already_is_not_advised():
    config = replace(CONFIG, model=replace(CONFIG.model, remat=True))
    with refused("batch_size") as caught, memory_errors(config):
        raise MemoryError("no")
    assert "remat" not in str(caught.value)


@pytest.mark.parametrize("failure", [JaxRuntimeError("INTERNAL: a kernel"), ValueError("RESOURCE_EXHAUSTED")])
def test_other_failures_pass(failure):
    with pytest.raises(type(failure), match=str(failure)), memory_errors(CONFIG):
        raise failure


def test_only_pretraining_can_be_planned():
    with refused("batch_size") as caught, memory_errors(FINETUNE["digits"]()):
        raise MemoryError("no")
    assert "plan" not in str(caught.value)
