"""The same images and noise through our model and through the library that received its weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.config import ClassifierConfig, ModelConfig
from mae_jax.errors import StatedError
from mae_jax.models import Params
from mae_jax.models.classifier import Classifier
from mae_jax.models.mae import MaskedAutoencoder, Output
from mae_jax.port import layouts
from mae_jax.port.formats import Format, file_in
from mae_jax.port.keys import Config, Part, Tensors, encoder_config, frozen_tables, to_fair
from mae_jax.port.layouts import from_layout, written
from mae_jax.port.receivers.hugging_face import hugging_face
from mae_jax.port.receivers.lightly import lightly
from mae_jax.port.receivers.receiver import NotInstalledError, Outputs, Receiver, as_torch
from mae_jax.port.receivers.timm import timm_model, timm_name, timm_vit
from mae_jax.port.tensors import import_torch, read_file
from mae_jax.port.weights import Weights
from mae_jax.port.write import FileDtype

if TYPE_CHECKING:
    import torch


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


_BATCH = 2
_SEED = 0


@dataclass(frozen=True)
class Difference:
    """How far apart one output is: max |a - b|, and that over max |b|."""

    name: str
    max_abs: float
    max_rel: float


@dataclass(frozen=True)
class Verdict:
    """What was compared with what, and how closely it has to agree."""

    library: str
    differences: tuple[Difference, ...]
    bound: float

    @property
    def passed(self) -> bool:
        return bool(self.differences) and all(d.max_rel <= self.bound for d in self.differences)  # false for nan

    def lines(self) -> Iterator[str]:
        """A table for the terminal."""
        yield f"verified against {self.library}"
        yield f"{'':8}{'max abs':>10}{'max rel':>10}{'bound':>10}"
        for d in self.differences:
            verdict = "ok" if d.max_rel <= self.bound else "DIFFERS"
            yield f"{d.name:8}{d.max_abs:>10.1e}{d.max_rel:>10.1e}{self.bound:>10.1e}   {verdict}"


def comparable(config: Config, to: Format, part: Part) -> Config:
    """The configuration as the format runs it: random masks, loss on hidden patches, in float32."""
    if isinstance(config, ClassifierConfig) and part == "all":
        return replace(config, model=replace(config.model, dtype="float32", remat=False))
    config = encoder_config(config)
    return replace(
        config,
        masking="random",
        loss_on="hidden",
        dtype="float32",
        remat=False,
        norm_pix_loss=config.norm_pix_loss and not to.startswith("lightly"),
        encoder_mask_tokens=config.encoder_mask_tokens and part == "all" and to != "timm",
    )


def verify(weights: Weights, path: Path, to: Format, part: Part, dtype: FileDtype) -> Verdict:
    """Our model against what the receiving library makes of the file or folder just written.

    Where that library is not installed, or has none, the reference in parity/ stands in for it. A port to this
    project is read back, and compared with the reference on the tensors that the source held.

    Raises:
      StatedError: PyTorch is not installed, or the library does not take the file.
    """
    from parity.tolerances import BOUNDS  # noqa: PLC0415  (parity stands on this package)

    import_torch("to verify what was written (--no-verify leaves that out)")
    config = comparable(weights.config, to, part)
    if to == "timm" and isinstance(config, ModelConfig):
        part = "encoder"
    params = weights.params
    if to == "jax":
        params, receiver = _read_back(weights, path, config, part)
    else:
        try:
            receiver = receive(path, to, config, part)
        except NotInstalledError as missing:
            receiver = reference(config, part, _read_as_fair(path, to, config, part))
            if to != "fair":
                note = f"{missing} cannot be imported; its names and configuration are unchecked"
                receiver = replace(receiver, library=f"{receiver.library} ({note})")
    bound = BOUNDS["forward" if dtype == "float32" else f"{dtype} file"].float32
    return Verdict(receiver.library, tuple(differences(params, config, part, receiver)), bound)


def _read_back(weights: Weights, path: Path, config: Config, part: Part) -> tuple[Params, Receiver]:
    from mae_jax.storage.checkpoints import load_params  # noqa: PLC0415

    _, params, _ = load_params(path)
    tensors = weights.tensors
    if tensors is None or weights.resized:
        tensors = to_fair(weights.params, config, part)
    elif part == "encoder":
        tensors = {key: tensors[key] for key in to_fair(weights.params, config, part)}
    # Frozen tables are computed here, not carried over: a file of fewer bits has them rounded.
    return params, reference(config, part, tensors | frozen_tables(config, part))


def _read_as_fair(path: Path, to: Format, config: Config, part: Part) -> Tensors:
    assert to != "jax"
    tensors = read_file(file_in(path, to) if path.is_dir() else path).tensors
    tensors.pop("backbone.mask_token", None)
    layout = layouts.hugging_face("") if to == "huggingface" and part == "encoder" else written(to)
    return from_layout(tensors, layout, config, part)


def differences(params: Params, config: Config, part: Part, receiver: Receiver) -> Iterator[Difference]:
    """Each output of our model against the receiver's, on random images and noise."""
    import torch  # noqa: PLC0415

    model = config.model if isinstance(config, ClassifierConfig) else config
    generator = np.random.default_rng(_SEED)
    images = generator.standard_normal((_BATCH, *model.image_hw, model.in_channels), dtype=np.float32)
    noise = generator.random((_BATCH, model.num_patches), dtype=np.float32)
    with torch.inference_mode():
        theirs = receiver.forward(torch.from_numpy(images).movedim(-1, 1).contiguous(), torch.from_numpy(noise))
    ours = outputs(params, config, part, images, noise)
    for name, values in theirs.items():
        expected = values.double().numpy()
        if ours[name].shape != expected.shape:
            raise StatedError(f"{name} has shape {ours[name].shape} here and {expected.shape} in {receiver.library}")
        max_abs = float(np.abs(ours[name].astype(np.float64) - expected).max())
        yield Difference(name, max_abs, max_abs / (float(np.abs(expected).max()) or 1.0))


def outputs(params: Params, config: Config, part: Part, images: np.ndarray, noise: np.ndarray) -> dict[str, np.ndarray]:
    """What our model makes of images (B, H, W, C) and noise (B, L), under the names of `receivers.Outputs`."""

    def run(params: Params, images: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
        variables = {"params": params}
        if isinstance(config, ClassifierConfig):
            logits = Classifier(config).apply(variables, images)
            assert isinstance(logits, jax.Array)
            return {"logits": logits}
        model = MaskedAutoencoder(config)
        if part == "encoder":
            latent = model.apply(variables, images, method="encode")
            assert isinstance(latent, jax.Array)
            return {"latent": latent}
        output = model.apply(variables, images, noise)
        assert isinstance(output, Output)
        return {"latent": output.latent, "pred": output.pred, "loss": output.loss}

    params = jax.tree.map(lambda values: jnp.asarray(values, jnp.float32), params)
    with jax.default_matmul_precision("highest"):
        made = jax.jit(run)(params, jnp.asarray(images), jnp.asarray(noise))
    return {name: np.asarray(values) for name, values in made.items()}
