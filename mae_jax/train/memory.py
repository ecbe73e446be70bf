"""What to do where a run finds too little memory."""

from collections.abc import Iterator
from contextlib import contextmanager

from jax.errors import JaxRuntimeError

from mae_jax.config import PretrainConfig, RunConfig
from mae_jax.errors import StatedError


@contextmanager
def too_little_is_told(config: RunConfig) -> Iterator[None]:
    """Name the fields that a step's memory follows from, where the device or the host lacks it.

    Raises:
      StatedError: in place of the failure for want of memory; others pass.
    """
    try:
        yield
    except (JaxRuntimeError, MemoryError) as error:
        if isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        remat = "" if config.model.remat else " or --model.remat"
        plan = "; mae-jax plan says what a step needs" if isinstance(config, PretrainConfig) else ""
        raise StatedError(
            f"too little memory for batch_size {config.batch_size} with accumulate {config.accumulate} ({error}): "
            f"give a smaller --batch-size, a larger --accumulate{remat}{plan}"
        ) from error
