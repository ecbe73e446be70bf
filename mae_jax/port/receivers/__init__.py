"""The models of the libraries that receive our weights, each fed with images and mask noise like ours.

Nothing here computes: each function calls the library's own modules, wired as its own examples wire them. torch and
the libraries are imported inside, since each takes seconds and may be missing.
"""

from pathlib import Path

from mae_jax.config import ModelConfig
from mae_jax.port.formats import Format, file_in
from mae_jax.port.keys import Config, Part
from mae_jax.port.receivers.hugging_face import hugging_face
from mae_jax.port.receivers.lightly_mae import lightly
from mae_jax.port.receivers.receiver import NotInstalledError, Outputs, Receiver
from mae_jax.port.receivers.timm_vit import timm_model, timm_name, timm_vit
from mae_jax.port.receivers.torch_reference import reference

__all__ = [
    "NotInstalledError",
    "Outputs",
    "Receiver",
    "hugging_face",
    "lightly",
    "receive",
    "reference",
    "timm_model",
    "timm_name",
    "timm_vit",
]


def receive(path: Path, to: Format, config: Config, part: Part) -> Receiver:
    """The library that `to` is written for, with the file or folder loaded by its own means.

    Raises:
      NotInstalledError: that library is not there.
      StatedError: it does not take the file.
    """
    file = file_in(path, to) if path.is_dir() else path
    if to == "timm":
        return timm_model(config, file)
    if to == "huggingface":
        assert isinstance(config, ModelConfig)
        return hugging_face(config, part, path)
    if to in ("lightly", "lightly-deprecated"):
        assert isinstance(config, ModelConfig)
        return lightly(config, part, to == "lightly-deprecated", file)
    raise NotInstalledError(f"{to}: no package")
