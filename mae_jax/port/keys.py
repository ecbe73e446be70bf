"""Weights between this project's parameters and the authors' checkpoints (PyTorch, `checkpoint["model"]`).

One table lists which tensor is which and how its axes are laid out; both directions read it. All is NumPy.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from mae_jax.config import ClassifierConfig, ModelConfig, TransformerConfig
from mae_jax.errors import shown_name
from mae_jax.models import Params
from mae_jax.models.patches import fixed_positions

Config = ModelConfig | ClassifierConfig
Part = Literal["all", "encoder"]

Tensors = dict[str, np.ndarray]
Layout = Literal["same", "transposed", "convolution"]

# How far a stored frozen table may be from the computed one, by the dtype that it was rounded to; some code computes
# it in float32. A trained table is further off.
_TABLE_TOLERANCE = {"float64": 1e-5, "float32": 1e-5, "float16": 1e-3, "bfloat16": 4e-3}


def is_table(stored: np.ndarray, computed: np.ndarray) -> bool:
    """Return whether a stored position table is the computed one, rounded."""
    apart = np.abs(stored.astype(np.float64) - computed).max()
    return bool(apart <= _TABLE_TOLERANCE.get(stored.dtype.name, 0.0))


@dataclass(frozen=True)
class Entry:
    """One tensor: its key and shape in the checkpoint, its path in the parameters, and what happens between.

    same: nothing. transposed: a dense kernel, (out, in) there and (in, out) here. convolution: the patch projection,
    (D, C, height, width) there, and here (P, D) with the rows of a patch vector: row, column, channel.
    """

    key: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    layout: Layout = "same"


def encoder_config(config: Config) -> ModelConfig:
    """Return the model whose encoder this is: the configuration itself, or a classifier's."""
    return config.model if config.kind == "classifier" else config


def entries(config: Config, part: Part = "all") -> Iterator[Entry]:
    """Go through the table in the order of the data: every trained tensor of a configuration, or of its encoder."""
    pools_by_mean = config.kind == "classifier" and config.pooling == "mean"
    yield from _encoder(encoder_config(config), norm=not pools_by_mean)
    if part == "encoder":
        return
    if config.kind == "classifier":
        width = config.model.encoder.width
        if pools_by_mean:
            yield from _norm("fc_norm", ("fc_norm",), width)
        yield from _dense("head", ("head",), width, config.classes)
    else:
        yield from _decoder(config)


def fitted_entries(config: Config, part: Part = "all") -> Iterator[Entry]:
    """Go through the tensors of a PCA target, which are fitted to data before training; no PyTorch library has them."""
    if config.kind == "mae" and part == "all" and config.pca_components is not None:
        yield Entry("target.mean", ("target", "mean"), (config.patch_dim,))
        yield Entry("target.basis", ("target", "basis"), (config.patch_dim, config.pca_components))


def _encoder(config: ModelConfig, norm: bool) -> Iterator[Entry]:
    stack, D = config.encoder, config.encoder.width
    yield Entry("patch_embed.proj.weight", ("encoder", "patch_embed", "kernel"),
                (D, config.in_channels, *config.patch_hw), "convolution")  # fmt: skip
    yield Entry("patch_embed.proj.bias", ("encoder", "patch_embed", "bias"), (D,))
    if config.class_token:
        yield Entry("cls_token", ("encoder", "cls_token"), (1, 1, D))
    if config.encoder_mask_tokens:
        yield Entry("encoder_mask_token", ("encoder", "mask_token"), (1, 1, D))
    if config.positions == "learned":
        yield Entry("pos_embed", ("encoder", "pos_embed"), (1, config.num_patches + config.class_token, D))
    for i in range(stack.depth):
        yield from _block(f"blocks.{i}", ("encoder", f"block_{i}"), stack)
    if norm:
        yield from _norm("norm", ("encoder", "norm"), D)


def _decoder(config: ModelConfig) -> Iterator[Entry]:
    stack, d = config.decoder, config.decoder.width
    yield from _dense("decoder_embed", ("decoder", "embed"), config.encoder.width, d)
    if not config.encoder_mask_tokens:
        yield Entry("mask_token", ("decoder", "mask_token"), (1, 1, d))
    if config.positions == "learned":
        yield Entry("decoder_pos_embed", ("decoder", "pos_embed"), (1, config.num_patches + config.class_token, d))
    for i in range(stack.depth):
        yield from _block(f"decoder_blocks.{i}", ("decoder", f"block_{i}"), stack)
    yield from _norm("decoder_norm", ("decoder", "norm"), d)
    yield from _dense("decoder_pred", ("decoder", "pred"), d, config.target_dim)


def _block(key: str, path: tuple[str, ...], config: TransformerConfig) -> Iterator[Entry]:
    width = config.width
    yield from _norm(f"{key}.norm1", (*path, "norm1"), width)
    yield from _dense(f"{key}.attn.qkv", (*path, "attn", "qkv"), width, 3 * width)
    yield from _dense(f"{key}.attn.proj", (*path, "attn", "proj"), width, width)
    yield from _norm(f"{key}.norm2", (*path, "norm2"), width)
    yield from _dense(f"{key}.mlp.fc1", (*path, "mlp", "fc1"), width, config.mlp_width)
    yield from _dense(f"{key}.mlp.fc2", (*path, "mlp", "fc2"), config.mlp_width, width)


def _dense(key: str, path: tuple[str, ...], inputs: int, outputs: int) -> Iterator[Entry]:
    yield Entry(f"{key}.weight", (*path, "kernel"), (outputs, inputs), "transposed")
    yield Entry(f"{key}.bias", (*path, "bias"), (outputs,))


def _norm(key: str, path: tuple[str, ...], width: int) -> Iterator[Entry]:
    yield Entry(f"{key}.weight", (*path, "scale"), (width,))
    yield Entry(f"{key}.bias", (*path, "bias"), (width,))


def frozen_tables(config: Config, part: Part = "all") -> dict[str, Float[np.ndarray, "1 tokens width"]]:
    """Compute the position tables that checkpoints hold though they are never trained; none where they are learned."""
    return {key: _frozen_table(config, shape[2]) for key, shape in _frozen_shapes(config, part).items()}


def _frozen_table(config: Config, width: int) -> Float[np.ndarray, "1 tokens width"]:
    model = encoder_config(config)
    return fixed_positions(model.positions, width, model.grid, model.class_token)[None].astype(np.float32)


def _frozen_shapes(config: Config, part: Part) -> dict[str, tuple[int, int, int]]:
    """Return the shapes of these tables, which a file may claim to be of any size."""
    model = encoder_config(config)
    if model.positions == "learned":
        return {}
    tokens = model.num_patches + model.class_token
    shapes = {"pos_embed": (1, tokens, model.encoder.width)}
    if part == "all" and config.kind == "mae":
        shapes["decoder_pos_embed"] = (1, tokens, model.decoder.width)
    return shapes


def shapes(config: Config, part: Part = "all") -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Return the shape of each tensor that has to be there, and of each that is not trained, which may be."""
    return (
        {entry.key: entry.shape for entry in entries(config, part)},
        _frozen_shapes(config, part) | {entry.key: entry.shape for entry in fitted_entries(config, part)},
    )


_MOST_NAMED = 50  # faults, and unknown keys for which one of a like name is looked for


def key_faults(
    tensors: Mapping[str, np.ndarray],
    required: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]],
) -> list[str]:
    """List the keys that are missing, unknown (with the missing one that is named most like it), or wrongly shaped."""
    expected = {**required, **optional}
    missing = [key for key in required if key not in tensors]
    faults = [f"{key} is missing" for key in missing]
    for number, key in enumerate(key for key in tensors if key not in expected):
        # A file can hold any number of unknown keys of any length: each comparison takes milliseconds.
        likely = number < _MOST_NAMED and len(key) < 200
        near = difflib.get_close_matches(key, missing or list(expected), n=1) if likely else []
        faults.append(f"{shown_name(key)} is unknown" + (f" (nearest: {near[0]})" if near else ""))
    faults += [
        f"{key} has shape {tuple(tensors[key].shape)}, not {shape}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    return faults


def do_not_fit(what: str, faults: list[str]) -> ValueError:
    """Return the error of tensors or parameters with these faults; it lists the first fifty."""
    rest = f"; and {len(faults) - _MOST_NAMED} more" if len(faults) > _MOST_NAMED else ""
    return ValueError(f"the {what} do not fit the configuration: " + "; ".join(faults[:_MOST_NAMED]) + rest)


def from_fair(tensors: Mapping[str, np.ndarray], config: Config, part: Part = "all") -> Params:
    """Make parameters of the authors' tensors; frozen position tables may be there, and are then checked.

    Raises:
      ValueError: keys are missing, unknown, wrongly shaped, or a frozen table is another one; all are listed.
    """
    positions = encoder_config(config).positions
    faults = key_faults(tensors, *shapes(config, part))
    faults += [
        f"{key} is not the {positions} table (load it with positions='learned')"
        for key, shape in _frozen_shapes(config, part).items()
        if key in tensors
        and tensors[key].shape == shape
        and not is_table(tensors[key], _frozen_table(config, shape[2]))
    ]
    if faults:
        raise do_not_fit("tensors", faults)

    params: Params = {}
    fitted = (entry for entry in fitted_entries(config, part) if entry.key in tensors)
    for entry in (*entries(config, part), *fitted):
        *parents, leaf = entry.path
        node = params
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = _to_flax(tensors[entry.key], entry.layout)
    return params


def to_fair(params: Mapping[str, Any], config: Config, part: Part = "all") -> Tensors:
    """Make the authors' tensors of parameters, frozen position tables included.

    Raises:
      ValueError: parameters are missing, unknown or wrongly shaped; all are listed.
    """
    leaves = dict(_leaves({"encoder": params.get("encoder", {})} if part == "encoder" else params))
    table = [*entries(config, part), *(entry for entry in fitted_entries(config, part) if entry.path in leaves)]
    faults = [f"{'/'.join(path)} is unknown" for path in leaves.keys() - {entry.path for entry in table}]
    tensors = {}
    for entry in table:
        if entry.path not in leaves:
            faults.append(f"{'/'.join(entry.path)} is missing")
            continue
        flax_shape = _to_flax(np.empty(entry.shape), entry.layout).shape
        values = np.asarray(leaves[entry.path])
        if values.shape != flax_shape:
            faults.append(f"{'/'.join(entry.path)} has shape {values.shape}, not {flax_shape}")
            continue
        tensors[entry.key] = _to_torch(values, entry)
    if faults:
        raise do_not_fit("parameters", sorted(faults))
    return tensors | frozen_tables(config, part)


def _to_flax(values: np.ndarray, layout: Layout) -> np.ndarray:
    if layout == "convolution":
        return values.transpose(2, 3, 1, 0).reshape(-1, values.shape[0])
    return values.T if layout == "transposed" else values


def _to_torch(values: np.ndarray, entry: Entry) -> np.ndarray:
    if entry.layout == "convolution":
        width, channels, height, columns = entry.shape
        return values.reshape(height, columns, channels, width).transpose(3, 2, 0, 1)
    return values.T if entry.layout == "transposed" else values


def _leaves(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value
