"""The same images and noise through our model and through the library that received its weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.errors import StatedError
from mae_jax.models import Params
from mae_jax.models.classifier import Classifier
from mae_jax.models.mae import MaskedAutoencoder, Output
from mae_jax.port import layouts
from mae_jax.port.compare import Comparison, compare
from mae_jax.port.formats import Format, file_in
from mae_jax.port.keys import Config, Part, Tensors, encoder_config, frozen_tables, to_fair
from mae_jax.port.layouts import from_layout, written
from mae_jax.port.receivers.hugging_face import hugging_face
from mae_jax.port.receivers.lightly import lightly
from mae_jax.port.receivers.receiver import NotInstalledError, Outputs, Receiver, as_torch
from mae_jax.port.receivers.timm import timm_model
from mae_jax.port.tensors import import_torch, read_file
from mae_jax.port.weights import Weights
from mae_jax.port.write import FileDtype

if TYPE_CHECKING:
    import torch

# The largest relative error of a written file's outputs, by its dtype, and why. None is widened to make a check pass.
BOUNDS: dict[FileDtype, float] = {
    "float32": 5e-6,  # roundings of all stages, carried along by the residual stream
    "float16": 0.01,  # every weight rounded to 11 bits: 2^-11 each, ten times that in sum
    "bfloat16": 0.08,  # every weight rounded to 8 bits: 2^-8 each, twenty times that in sum
}


def receive(path: Path, to: Format, config: Config, part: Part) -> Receiver:
    """Load the file or folder into the library that `to` is written for, by its own means.

    Raises:
      NotInstalledError: that library is not there.
      StatedError: it does not take the file.
    """
    file = file_in(path, to) if path.is_dir() else path
    if to == "timm":
        return timm_model(config, file)
    if to == "huggingface":
        assert config.kind == "mae"
        return hugging_face(config, part, path)
    if to in ("lightly", "lightly-deprecated"):
        assert config.kind == "mae"
        return lightly(config, part, to == "lightly-deprecated", file)
    raise NotInstalledError(f"{to}: no package")


def reference(config: Config, part: Part, tensors: Mapping[str, Any]) -> Receiver:
    """Load the authors' tensors into the PyTorch reference, which carries their names, strictly.

    Raises:
      StatedError: keys are missing or unexpected.
    """
    import torch  # noqa: PLC0415

    from parity import torch_mae  # noqa: PLC0415

    module: torch_mae.MaskedAutoencoder | torch_mae.Classifier
    with torch.device("meta"):  # no memory for weights that are replaced at once
        module = torch_mae.Classifier(config) if config.kind == "classifier" else torch_mae.MaskedAutoencoder(config)
    if isinstance(module, torch_mae.MaskedAutoencoder) and part == "encoder":
        for name in [name for name, _ in module.named_children() if name.startswith("decoder")]:
            delattr(module, name)
        for name in ("mask_token", "decoder_pos_embed"):
            delattr(module, name)
    try:
        module.load_state_dict(as_torch(tensors), strict=True, assign=True)
    except RuntimeError as error:
        raise StatedError(f"the reference does not take the tensors: {error}", field="source") from error
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
class Verdict:
    """What was compared with what, output by output."""

    library: str
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """Return whether there is something, and all of it is close enough."""
        return bool(self.comparisons) and all(one.passed for one in self.comparisons)

    def lines(self) -> Iterator[str]:
        """Yield a table for the terminal."""
        yield f"verified against {self.library}"
        yield f"{'':8}{'max abs':>10}{'max rel':>10}{'bound':>10}"
        for one in self.comparisons:
            verdict = "ok" if one.passed else "DIFFERS" + (f": {one.fault}" if one.fault else "")
            yield f"{one.tensor:8}{one.max_abs:>10.1e}{one.max_rel:>10.1e}{one.bound:>10.1e}   {verdict}"


def comparable(config: Config, to: Format, part: Part) -> Config:
    """Return the configuration as the format runs it: random masks, loss on hidden patches, in float32."""
    if config.kind == "classifier" and part == "all":
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
    """Compare our model with what the receiving library makes of the file or folder just written.

    Where that library is not installed, or has none, the reference in parity/ stands in for it. A port to this
    project is read back, and compared with the reference on the tensors that the source held.

    Raises:
      StatedError: PyTorch is not installed, or the library does not take the file.
    """
    import_torch("to verify what was written (--no-verify leaves that out)")
    config = comparable(weights.config, to, part)
    if to == "timm" and config.kind == "mae":
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
    return Verdict(receiver.library, tuple(comparisons(params, config, part, receiver, BOUNDS[dtype])))


def _read_back(weights: Weights, path: Path, config: Config, part: Part) -> tuple[Params, Receiver]:
    from mae_jax.storage.loading import load_params  # noqa: PLC0415

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


def comparisons(params: Params, config: Config, part: Part, receiver: Receiver, bound: float) -> Iterator[Comparison]:
    """Compare each output of our model with the receiver's, on random images and noise."""
    import torch  # noqa: PLC0415

    model = encoder_config(config)
    generator = np.random.default_rng(_SEED)
    images = generator.standard_normal((_BATCH, *model.image_hw, model.in_channels), dtype=np.float32)
    noise = generator.random((_BATCH, model.num_patches), dtype=np.float32)
    with torch.inference_mode():
        theirs = receiver.forward(torch.from_numpy(images).movedim(-1, 1).contiguous(), torch.from_numpy(noise))
    ours = outputs(params, config, part, images, noise)
    for name, values in theirs.items():
        yield compare(name, ours[name], values.numpy(), bound)


def outputs(params: Params, config: Config, part: Part, images: np.ndarray, noise: np.ndarray) -> dict[str, np.ndarray]:
    """Run our model on images (B, H, W, C) and noise (B, L); the names are those of `receivers.Outputs`."""

    def run(params: Params, images: jax.Array, noise: jax.Array) -> dict[str, jax.Array]:
        variables = {"params": params}
        if config.kind == "classifier":
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
