"""Hugging Face's ViTMAEForPreTraining and ViTMAEModel."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mae_jax.config import ModelConfig
from mae_jax.errors import StatedError
from mae_jax.port.keys import Part
from mae_jax.port.receivers.receiver import NotInstalledError, Outputs, Receiver
from mae_jax.port.write import hugging_face_config

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def _without_broken_torchvision() -> Iterator[None]:
    """Let a torchvision whose compiled operators do not load count as absent: transformers then works without it."""
    broken = False
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is not None:
        try:
            import torchvision  # noqa: F401, PLC0415
        except Exception:  # RuntimeError, where it was built for another torch
            broken = True
    if not broken:
        yield
        return
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    sys.modules["torchvision"] = None  # type: ignore[assignment]  # Python's own sign for: not there
    try:
        yield
    finally:
        del sys.modules["torchvision"]


def _transformers() -> Any:
    try:
        with _without_broken_torchvision():
            import transformers  # noqa: PLC0415

            _ = transformers.ViTMAEForPreTraining  # imported when it is first asked for
    except Exception as error:
        raise NotInstalledError(f"transformers ({type(error).__name__})") from error
    return transformers


def hugging_face(config: ModelConfig, part: Part, folder: Path | None) -> Receiver:
    """Load a folder into ViTMAEForPreTraining, or ViTMAEModel for an encoder; random weights where there is none.

    Raises:
      NotInstalledError: transformers is not installed.
      StatedError: keys are missing or unexpected.
    """
    import torch  # noqa: PLC0415

    transformers = _transformers()
    kind = transformers.ViTMAEForPreTraining if part == "all" else transformers.ViTMAEModel
    if folder is None:
        values = dict(hugging_face_config(config, part, "float32"))
        del values["torch_dtype"]
        module = kind(transformers.ViTMAEConfig(**values))
    else:
        with _without_progress(transformers):
            module, info = kind.from_pretrained(str(folder), output_loading_info=True)
        faults = {name: sorted(map(str, keys)) for name, keys in info.items() if keys and name != "error_msgs"}
        if faults:
            raise StatedError(f"transformers does not take {folder.name}: {faults}", field="destination")
    module = module.float().eval()
    module.config.mask_ratio = config.mask_ratio if part == "all" else 0.0

    def forward(images: "torch.Tensor", noise: "torch.Tensor") -> Outputs:
        if part == "encoder":  # without noise it would still shuffle
            in_order = torch.arange(config.num_patches).expand(len(images), -1)
            return {"latent": module(images, noise=in_order).last_hidden_state}
        latents = []
        hook = module.vit.layernorm.register_forward_hook(lambda *args: latents.append(args[2]))
        output = module(images, noise=noise)
        hook.remove()
        return {"latent": latents[0], "pred": output.logits, "loss": output.loss}

    return Receiver(f"transformers {transformers.__version__} ({kind.__name__})", module, forward)


@contextlib.contextmanager
def _without_progress(transformers: Any) -> Iterator[None]:
    """Show no progress bar and no report of missing keys, which are looked at here."""
    logging = transformers.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
