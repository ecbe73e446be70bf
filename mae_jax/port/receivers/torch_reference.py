"""The PyTorch reference in `parity`, which takes the authors' names."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mae_jax.config import ClassifierConfig
from mae_jax.errors import StatedError
from mae_jax.port.keys import Config, Part
from mae_jax.port.receivers.receiver import Outputs, Receiver, as_torch

if TYPE_CHECKING:
    import torch


def reference(config: Config, part: Part, tensors: Mapping[str, Any]) -> Receiver:
    """The PyTorch reference, which carries the authors' names; their tensors are loaded strictly.

    Raises:
      StatedError: keys are missing or unexpected.
    """
    import torch  # noqa: PLC0415

    from parity import torch_mae  # noqa: PLC0415

    module: torch_mae.MaskedAutoencoder | torch_mae.Classifier
    with torch.device("meta"):  # no memory for weights that are replaced at once
        module = (
            torch_mae.Classifier(config)
            if isinstance(config, ClassifierConfig)
            else torch_mae.MaskedAutoencoder(config)
        )
    if isinstance(module, torch_mae.MaskedAutoencoder) and part == "encoder":
        for name in [name for name, _ in module.named_children() if name.startswith("decoder")]:
            delattr(module, name)
        for name in ("mask_token", "decoder_pos_embed"):
            delattr(module, name)
    try:
        module.load_state_dict(as_torch(tensors), strict=True, assign=True)
    except RuntimeError as error:
        raise StatedError(f"the reference does not take the tensors: {error}") from error
    module = module.float().eval()

    def forward(images: "torch.Tensor", noise: "torch.Tensor") -> Outputs:
        if isinstance(module, torch_mae.Classifier):
            return {"logits": module(images)}
        if part == "encoder":
            return {"latent": module.encode_whole(images)}
        output = module(images, noise)
        return {"latent": output.latent, "pred": output.pred, "loss": output.loss}

    return Receiver(f"the reference in parity/, torch {torch.__version__}", module, forward)
