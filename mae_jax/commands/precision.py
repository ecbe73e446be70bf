"""What JAX must be told before its first array."""

from pathlib import Path


def precision(run: Path) -> str:
    """The dtype that a run computes in.

    Raises:
      StatedError: it is neither a run nor a checkpoint.
    """
    from mae_jax.train.workdir import find_checkpoint, read_record

    return read_record(find_checkpoint(run)).config.model.dtype


def prepare_jax_for(source: str) -> None:
    """In a run's own precision; anything else is computed in float32.

    Raises:
      StatedError: it is a run that cannot be read.
    """
    from mae_jax.port.reading import is_run

    prepare_jax(precision(Path(source)) if is_run(source) else "float32")


def prepare_jax(dtype: str) -> None:
    """Settings that JAX takes before its first array."""
    import jax

    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)
