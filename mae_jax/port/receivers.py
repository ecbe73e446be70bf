"""The models of the libraries that receive our weights, each fed with images and mask noise like ours.

Nothing here computes: each function calls the library's own modules, wired as its own examples wire them. torch and
the libraries are imported inside, since each takes seconds and may be missing.
"""

import contextlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mae_jax.config import ClassifierConfig, ModelConfig
from mae_jax.errors import StatedError
from mae_jax.port.files import read_file
from mae_jax.port.formats import Format, file_in
from mae_jax.port.keys import Config, Part, encoder_config
from mae_jax.port.writing import hugging_face_config

if TYPE_CHECKING:
    import torch

# Names of what is compared: of a masked autoencoder latent, pred and loss; of an encoder latent, where every patch is
# visible; of a classifier logits.
Outputs = dict[str, "torch.Tensor"]
Forward = Callable[["torch.Tensor", "torch.Tensor"], Outputs]  # images (B, C, H, W), noise (B, L)


@dataclass(frozen=True)
class Receiver:
    """A library's module, and how to run it."""

    library: str
    module: "torch.nn.Module"
    forward: Forward


class NotInstalledError(Exception):
    """The library is not there, or cannot be imported; the message says which."""


# --- Hugging Face ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _without_broken_torchvision() -> Iterator[None]:
    """A torchvision whose compiled operators do not load counts as absent: transformers then works without it."""
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
    sys.modules["torchvision"] = None  # type: ignore[assignment]  # Python's own way to say: not there
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
    """ViTMAEForPreTraining, or ViTMAEModel for an encoder; with random weights where there is no folder.

    Raises:
      NotInstalledError: transformers is not installed.
      StatedError: keys are missing or unexpected.
    """
    import torch  # noqa: PLC0415

    transformers = _transformers()
    kind = transformers.ViTMAEForPreTraining if part == "all" else transformers.ViTMAEModel
    if folder is None:
        said = {
            key: value for key, value in hugging_face_config(config, part, "float32").items() if key != "torch_dtype"
        }
        module = kind(transformers.ViTMAEConfig(**said))
    else:
        with _quiet(transformers):
            module, info = kind.from_pretrained(str(folder), output_loading_info=True)
        faults = {name: sorted(map(str, keys)) for name, keys in info.items() if keys and name != "error_msgs"}
        if faults:
            raise StatedError(f"transformers does not take {folder.name}: {faults}")
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
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bar and no report: what they say is looked at."""
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


# --- timm --------------------------------------------------------------------------------------------------------

_TIMM_NAMES = {
    (16, 768, 12, 12): "vit_base_patch16_224.mae",
    (16, 1024, 24, 16): "vit_large_patch16_224.mae",
    (14, 1280, 32, 16): "vit_huge_patch14_224.mae",
}


def _timm() -> Any:
    try:
        import timm  # noqa: PLC0415
    except (
        Exception
    ) as error:  # torchvision, which it imports, raises RuntimeError where it was built for another torch
        raise NotInstalledError(f"timm ({type(error).__name__})") from error
    return timm


def timm_name(config: Config) -> str | None:
    """The name under which `timm.create_model` makes this encoder, if there is one."""
    model = encoder_config(config)
    if model.image_size != 224 or model.in_channels != 3 or not model.class_token or model.encoder.mlp_ratio != 4:
        return None
    if isinstance(config, ClassifierConfig):
        return None
    stack, patch = model.encoder, model.patch_size
    return _TIMM_NAMES.get((patch, stack.width, stack.depth, stack.heads)) if isinstance(patch, int) else None


def timm_vit(config: Config) -> "torch.nn.Module":
    """A timm VisionTransformer with random weights.

    Raises:
      NotInstalledError: timm is not installed, or cannot be imported.
    """
    timm, model = _timm(), encoder_config(config)
    pooling = config.pooling if isinstance(config, ClassifierConfig) else ("class" if model.class_token else "mean")
    return timm.models.VisionTransformer(
        img_size=model.image_hw,
        patch_size=model.patch_hw,
        in_chans=model.in_channels,
        num_classes=config.classes if isinstance(config, ClassifierConfig) else 0,
        global_pool={"mean": "avg", "class": "token"}[pooling],
        embed_dim=model.encoder.width,
        depth=model.encoder.depth,
        num_heads=model.encoder.heads,
        mlp_ratio=model.encoder.mlp_ratio,
        class_token=model.class_token,
        fc_norm=isinstance(config, ClassifierConfig) and pooling == "mean",
    )


def timm_model(config: Config, path: Path | None) -> Receiver:
    """A VisionTransformer by its name, or by its sizes where they have none; the file is loaded strictly.

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
        raise StatedError(f"timm does not take {path}: {error}") from error
    module = module.float().eval()

    def forward(images: "torch.Tensor", noise: "torch.Tensor") -> Outputs:
        if isinstance(config, ClassifierConfig):
            return {"logits": module(images)}
        return {"latent": module.forward_features(images)}

    return Receiver(f"timm {timm.__version__} ({name or 'VisionTransformer'})", module, forward)


# --- Lightly -----------------------------------------------------------------------------------------------------


def _lightly() -> Any:
    try:
        import lightly.models.modules  # noqa: PLC0415
        import lightly.models.utils  # noqa: PLC0415

        _ = lightly.models.modules.MaskedVisionTransformerTIMM  # only there where timm is
    except Exception as error:
        raise NotInstalledError(f"lightly ({type(error).__name__})") from error
    return lightly


def lightly(config: ModelConfig, part: Part, deprecated: bool, path: Path | None) -> Receiver:
    """Lightly's modules under the attribute names of its own examples: backbone, decoder, and outside of the current
    decoder decoder_embed and prediction_head.

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
            raise StatedError(f"lightly does not take {path}: {error}") from error
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


# --- the reference -----------------------------------------------------------------------------------------------


def as_torch(tensors: Mapping[str, Any]) -> dict[str, "torch.Tensor"]:
    """NumPy arrays as float32 tensors, or float64 where they are."""
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    wide = {key: values if values.dtype == np.float64 else values.astype(np.float32) for key, values in tensors.items()}
    return {key: torch.from_numpy(np.array(values)) for key, values in wide.items()}


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
