"""timm's VisionTransformer."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mae_jax.errors import StatedError
from mae_jax.port.keys import Config, encoder_config
from mae_jax.port.receivers.receiver import NotInstalledError, Outputs, Receiver

if TYPE_CHECKING:
    import torch


_TIMM_NAMES = {
    (16, 768, 12, 12): "vit_base_patch16_224.mae",
    (16, 1024, 24, 16): "vit_large_patch16_224.mae",
    (14, 1280, 32, 16): "vit_huge_patch14_224.mae",
}


def _timm() -> Any:
    try:
        import timm  # noqa: PLC0415
    except Exception as error:  # RuntimeError of torchvision, which it imports, built for another torch
        raise NotInstalledError(f"timm ({type(error).__name__})") from error
    return timm


def timm_name(config: Config) -> str | None:
    """Return the name under which `timm.create_model` makes this encoder, if there is one."""
    model = encoder_config(config)
    if model.image_size != 224 or model.in_channels != 3 or not model.class_token or model.encoder.mlp_ratio != 4:
        return None
    if config.kind == "classifier":
        return None
    stack, patch = model.encoder, model.patch_size
    return _TIMM_NAMES.get((patch, stack.width, stack.depth, stack.heads)) if isinstance(patch, int) else None


def timm_vit(config: Config) -> "torch.nn.Module":
    """Make a timm VisionTransformer with random weights.

    Raises:
      NotInstalledError: timm is not installed, or cannot be imported.
    """
    timm, model = _timm(), encoder_config(config)
    pooling = config.pooling if config.kind == "classifier" else ("class" if model.class_token else "mean")
    return timm.models.VisionTransformer(
        img_size=model.image_hw,
        patch_size=model.patch_hw,
        in_chans=model.in_channels,
        num_classes=config.classes if config.kind == "classifier" else 0,
        global_pool={"mean": "avg", "class": "token"}[pooling],
        embed_dim=model.encoder.width,
        depth=model.encoder.depth,
        num_heads=model.encoder.heads,
        mlp_ratio=model.encoder.mlp_ratio,
        class_token=model.class_token,
        fc_norm=config.kind == "classifier" and pooling == "mean",
    )


def timm_model(config: Config, path: Path | None) -> Receiver:
    """Load a file strictly into a VisionTransformer made by its name, or by its sizes where they have none.

    Raises:
      NotInstalledError: timm is not installed, or cannot be imported.
      StatedError: keys are missing or unexpected.
    """
    timm, name = _timm(), timm_name(config)
    try:
        if name is not None and path is not None:
            module = timm.create_model(name, checkpoint_path=str(path))
        else:
            module = timm_vit(config)
            if path is not None:
                timm.models.load_checkpoint(module, str(path), strict=True)
    except RuntimeError as error:
        raise StatedError(f"timm does not take {path}: {error}", field="destination") from error
    module = module.float().eval()

    def forward(images: "torch.Tensor", noise: "torch.Tensor") -> Outputs:
        if config.kind == "classifier":
            return {"logits": module(images)}
        return {"latent": module.forward_features(images)}

    return Receiver(f"timm {timm.__version__} ({name or 'VisionTransformer'})", module, forward)
