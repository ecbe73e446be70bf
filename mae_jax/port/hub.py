"""Checkpoints on the Hugging Face hub, through its own library."""

import logging
from pathlib import Path

from mae_jax.errors import StatedError

_WANTED = ("config.json", "preprocessor_config.json")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def download(repository: str) -> Path:
    """The folder of a repository OWNER/NAME in the hub's cache: its configuration and its weights.

    Raises:
      StatedError: huggingface_hub is not installed, there is no network, or the repository holds no weights.
    """
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise StatedError(f"hf:{repository} is not hf:OWNER/NAME")
    by_hand = (
        f"Download config.json and model.safetensors (or pytorch_model.bin) from "
        f"https://huggingface.co/{repository} into a folder, and give that folder instead of hf:{repository}"
    )
    try:
        from huggingface_hub import hf_hub_download  # noqa: PLC0415  (only for hf:, and optional)
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise StatedError(f"hf: needs huggingface_hub (pip install huggingface_hub). Or: {by_hand}") from error

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, name))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None

    def fetch_if_there(name: str) -> Path | None:
        try:
            return fetch(name)
        except LocalEntryNotFoundError:  # without a network, and not in the cache: the weights may be
            return None

    # Its retries are told to the log, line by line; what came of them is said below.
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        files = [file for name in _WANTED if (file := fetch_if_there(name))]
        weights = next((file for name in _WEIGHTS if (file := fetch(name))), None)
    except Exception as error:  # whatever its network layers raise
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise StatedError(f"hf:{repository} cannot be downloaded ({reason}). {by_hand}") from error
    finally:
        logger.setLevel(level)
    if weights is None:
        raise StatedError(f"hf:{repository} has neither {' nor '.join(_WEIGHTS)} (it has: {len(files)} of {_WANTED})")
    return weights.parent
