"""Lightly's backbone and decoders, the current one and the deprecated one."""

import contextlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mae_jax.config import ModelConfig
from mae_jax.errors import StatedError
from mae_jax.port.keys import Part
from mae_jax.port.receivers.receiver import NotInstalledError, Outputs, Receiver, as_torch
from mae_jax.port.receivers.timm import timm_vit
from mae_jax.port.tensors import read_file

if TYPE_CHECKING:
    import torch


def _lightly() -> Any:
    try:
        import lightly.models.modules  # noqa: PLC0415
        import lightly.models.utils  # noqa: PLC0415

        _ = lightly.models.modules.MaskedVisionTransformerTIMM  # only there where timm is
    except Exception as error:
        raise NotInstalledError(f"lightly ({type(error).__name__})") from error
    return lightly


def lightly(config: ModelConfig, part: Part, deprecated: bool, path: Path | None) -> Receiver:
    """Load a file into Lightly's modules, under the attribute names of its own examples.

    backbone, decoder, and outside of the current decoder decoder_embed and prediction_head.

    Raises:
      NotInstalledError: lightly or timm is not installed.
      StatedError: keys are missing or unexpected.
    """
    import torch  # noqa: PLC0415

    library = _lightly()
    modules, utils = library.models.modules, library.models.utils
    first, decoder = int(config.class_token), config.decoder
    common = {
        "num_patches": config.num_patches,
        "num_prefix_tokens": first,
        "mlp_ratio": decoder.mlp_ratio,
    }
    module: Any = torch.nn.Module()
    module.backbone = modules.MaskedVisionTransformerTIMM(timm_vit(config))
    if part == "all" and deprecated:
        with _no_deprecation():
            module.decoder = modules.MAEDecoderTIMM(
                patch_size=config.patch_hw[0],
                in_chans=config.in_channels,
                embed_dim=config.encoder.width,
                decoder_embed_dim=decoder.width,
                decoder_depth=decoder.depth,
                decoder_num_heads=decoder.heads,
                **common,
            )
    elif part == "all":
        module.decoder_embed = torch.nn.Linear(config.encoder.width, decoder.width)
        module.decoder = modules.MaskedVisionTransformerDecoderTIMM(
            embed_dim=decoder.width, depth=decoder.depth, num_heads=decoder.heads, **common
        )
        module.prediction_head = torch.nn.Linear(decoder.width, config.patch_dim)
    if path is not None:
        try:
            module.load_state_dict(as_torch(read_file(path).tensors), strict=True, assign=True)
        except RuntimeError as error:
            raise StatedError(f"lightly does not take {path}: {error}", field="destination") from error
    module = module.float().eval()

    def forward(images: "torch.Tensor", noise: "torch.Tensor") -> Outputs:
        if part == "encoder":
            return {"latent": module.backbone.encode(images)}
        order = noise.argsort(dim=1, stable=True) + first
        class_token = torch.zeros(len(images), first, dtype=torch.int64)
        idx_keep, idx_mask = torch.cat([class_token, order[:, : config.keep]], dim=1), order[:, config.keep :]
        latent = module.backbone.encode(images, idx_keep=idx_keep)
        size = (len(images), config.num_patches + first)
        if deprecated:
            tokens = utils.repeat_token(module.decoder.mask_token, size)
            tokens = utils.set_at_index(tokens, idx_keep, module.decoder.embed(latent).type_as(tokens))
            predict, decoded = module.decoder.predict, module.decoder.decode(tokens)
        else:
            tokens = latent.new_zeros(*size, decoder.width)
            tokens = utils.set_at_index(tokens, idx_keep, module.decoder_embed(latent))
            predict, decoded = module.prediction_head, module.decoder(tokens, idx_mask=idx_mask)
        target = utils.get_at_index(utils.patchify(images, config.patch_hw[0]), idx_mask - first)
        loss = torch.nn.functional.mse_loss(predict(utils.get_at_index(decoded, idx_mask)), target)
        return {"latent": latent, "pred": predict(decoded)[:, first:], "loss": loss}

    what = "encoder" if part == "encoder" else type(module.decoder).__name__
    return Receiver(f"lightly {importlib.metadata.version('lightly')} ({what})", module, forward)


@contextlib.contextmanager
def _no_deprecation() -> Iterator[None]:
    import warnings  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
