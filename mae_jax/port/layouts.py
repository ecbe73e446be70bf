"""How each library spells the authors' tensor names, and which spelling a file has.

Every layout is a renaming of the authors' names (`port/keys.py`). Hugging Face stores queries, keys and values
apart, so one name may become three. Found by reading timm 1.0, transformers 4.57 and 5.23, and lightly 1.6.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

from mae_jax.errors import StatedError, shown_name
from mae_jax.port.keys import Config, Part, Tensors, do_not_fit, key_faults, shapes

Name = Literal["fair", "timm", "huggingface", "lightly", "lightly-deprecated"]

PATCH_PROJECTION = "patch_embed.proj.weight"


@dataclass(frozen=True)
class Layout:
    """A library's spelling: one of the authors' names to one name there, or to three parts to be stacked.

    unused: a pattern of the names of tensors that may be there and are no part of the model.
    """

    name: Name
    rename: Callable[[str], tuple[str, ...]]
    unused: str = r"(?!)"


def in_decoder(key: str) -> bool:
    """Return whether one of the authors' names is the decoder's."""
    return key == "mask_token" or key.startswith("decoder_")


def _same(key: str) -> tuple[str, ...]:
    return (key,)


def _lightly_deprecated(key: str) -> tuple[str, ...]:
    return (f"decoder.{key}",) if in_decoder(key) else (f"backbone.vit.{key}",)


def _lightly(key: str) -> tuple[str, ...]:
    if not in_decoder(key):
        return (f"backbone.vit.{key}",)
    for ours, theirs in {
        "decoder_embed.": "decoder_embed.",
        "decoder_pred.": "prediction_head.",
        "mask_token": "decoder.mask_token",
        "decoder_": "decoder.",
    }.items():
        if key.startswith(ours):
            return (theirs + key.removeprefix(ours),)
    raise KeyError(key)


# What a block's modules are called, in transformers up to 4 and on the hub, and in 5.
Spelling = Mapping[str, str | tuple[str, ...]]
_BLOCK_OLD: Spelling = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_BLOCK_NEW: Spelling = dict(_BLOCK_OLD) | {
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "norm.": "layernorm.",
}
# Where the blocks lie and how they are spelled; `save_pretrained` of 5.23 mixes the last of the decoder with the first.
_ENCODER_STACKS = (("encoder.layer.", _BLOCK_OLD), ("layers.", _BLOCK_NEW))
_DECODER_STACKS = (
    ("decoder.decoder_layers.", _BLOCK_OLD),
    ("decoder.decoder_layers.", _BLOCK_NEW),
    ("decoder.decoder_encoder.layer.", _BLOCK_OLD),
)
Stack = tuple[str, Spelling]


def hugging_face(
    prefix: str = "vit.", encoder: Stack = _ENCODER_STACKS[0], decoder: Stack = _DECODER_STACKS[0]
) -> Layout:
    """Return the layout of ViTMAEForPreTraining (prefix `vit.`) or ViTMAEModel (none), by default as transformers 4."""

    def rename(key: str) -> tuple[str, ...]:
        block = re.fullmatch(r"(decoder_)?blocks\.(\d+)\.(.+)\.(weight|bias)", key)
        if block:
            of_decoder, number, module, kind = block.groups()
            stack, spelling = decoder if of_decoder else encoder
            theirs = spelling[module]
            root = stack if of_decoder else prefix + stack
            return tuple(
                f"{root}{number}.{name}.{kind}" for name in (theirs if isinstance(theirs, tuple) else (theirs,))
            )
        if in_decoder(key):
            return (f"decoder.{key}",)
        for ours, theirs in _EMBEDDINGS.items():
            if key.startswith(ours):
                return (prefix + theirs + key.removeprefix(ours),)
        return (prefix + key,)

    return Layout("huggingface", rename)


FAIR = Layout("fair", _same)
TIMM = Layout("timm", _same)
_LIGHTLY_UNUSED = r"backbone\.(mask_token|vit\.(head|fc_norm)\..*)|(online_classifier|criterion)\..*"
LIGHTLY = Layout("lightly", _lightly, _LIGHTLY_UNUSED)
LIGHTLY_DEPRECATED = Layout("lightly-deprecated", _lightly_deprecated, _LIGHTLY_UNUSED)

# In the order in which they are tried: where two explain a file equally well, the first is taken.
LAYOUTS = (
    FAIR,
    LIGHTLY,
    LIGHTLY_DEPRECATED,
    *(
        hugging_face(prefix, encoder, decoder)
        for prefix, encoder, decoder in product(("vit.", ""), _ENCODER_STACKS, _DECODER_STACKS)
    ),
)


def written(name: Name) -> Layout:
    """Return the layout that is written under this name."""
    return {
        "fair": FAIR,
        "timm": TIMM,
        "huggingface": hugging_face(),
        "lightly": LIGHTLY,
        "lightly-deprecated": LIGHTLY_DEPRECATED,
    }[name]


# Keys in which the layouts differ; each has several in a block, so that one that is missing can still be named.
_SIGNATURE = tuple(f"blocks.0.{module}.weight" for module in ("norm1", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
_DECODER_SIGNATURE = ("decoder_embed.weight", *(f"decoder_{key}" for key in _SIGNATURE))


def detect(keys: Iterable[str]) -> tuple[Layout, str] | None:
    """Find the layout of these names, and what stands before each of them (`module.`, a Lightning attribute, nothing).

    Raises:
      StatedError: there are two such models beside each other.
    """
    names = set(keys)
    best: tuple[int, Layout, str] | None = None
    alike: set[str] = set()  # prefixes of the best score
    for layout in LAYOUTS:
        for prefix in _prefixes(names, layout):
            found = [
                all(prefix + name in names for name in layout.rename(key)) for key in (*_SIGNATURE, *_DECODER_SIGNATURE)
            ]
            score = sum(found)
            if not any(found[: len(_SIGNATURE)]) or (best is not None and score < best[0]):
                continue
            if best is None or score > best[0]:
                best, alike = (score, layout, prefix), {prefix}
            elif layout is best[1]:
                alike.add(prefix)
    if len(alike) > 1:
        raise StatedError(
            f"two models lie beside each other, under {' and '.join(repr(shown_name(p)) for p in sorted(alike)[:4])}: "
            "save the one alone",
            field="source",
        )
    return None if best is None else best[1:]


def _prefixes(names: set[str], layout: Layout) -> list[str]:
    """Find what stands before the tensors that begin a model, by any of those that might be there."""
    first = [layout.rename(key)[0] for key in (PATCH_PROJECTION, "patch_embed.proj.bias", *_SIGNATURE[:2])]
    found = {key.removesuffix(name) for name in first for key in names if key.endswith(name)}
    return sorted((prefix for prefix in found if not prefix or prefix.endswith(".")), key=lambda p: (len(p), p))


def from_layout(tensors: Tensors, layout: Layout, config: Config, part: Part = "all") -> Tensors:
    """Rename another library's tensors to the authors' names.

    Raises:
      ValueError: keys are missing, unknown or wrongly shaped; all are listed, under that library's names.
    """
    required, optional = (_renamed(table, layout) for table in shapes(config, part))
    faults = key_faults(tensors, required, optional)
    if faults:
        raise do_not_fit("tensors", faults)
    renamed = {}
    for table in shapes(config, part):
        for key in table:
            names = layout.rename(key)
            if all(name in tensors for name in names):
                parts = [tensors[name] for name in names]
                renamed[key] = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return renamed


def to_layout(tensors: Tensors, layout: Layout) -> Tensors:
    """Rename the authors' tensors to another library's names."""
    renamed: Tensors = {}
    for key, values in tensors.items():
        names = layout.rename(key)
        renamed |= zip(names, np.split(values, len(names)) if len(names) > 1 else [values], strict=True)
    return renamed


def _renamed(table: Mapping[str, tuple[int, ...]], layout: Layout) -> dict[str, tuple[int, ...]]:
    """Return a table of shapes under the layout's names."""
    return {
        name: (shape[0] // len(names), *shape[1:]) for key, shape in table.items() for names in [layout.rename(key)]
        for name in names
    }  # fmt: skip
