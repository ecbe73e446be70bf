"""Write an encoder's features of all images of a source."""

import sys
from pathlib import Path
from typing import Literal

import tyro

from mae_jax.cli.flags import command, prepare_jax_for, progress


@command
def features(
    source: tyro.conf.Positional[str],
    data: tyro.conf.Positional[str],
    /,
    out: Path,
    split: str = "train",
    pooling: Literal["mean", "class"] = "mean",
    block: int | None = None,
    encoder_heads: int | None = None,
    batch_size: int = 256,
    workers: int | None = None,
) -> int:
    """Write an encoder's features of all images of a source: mae-jax features SOURCE DATA --out x.npz.

    The file holds the arrays features (float32), labels, class_names, names, and of (JSON: what they are features of).

    Args:
      source: A work directory, one checkpoint in it, or a PyTorch checkpoint that `mae-jax port` reads.
      data: folder:PATH, tfds:NAME[@SPLIT], records:PATH or digits.
      out: The file to write, .npz.
      split: train or val.
      pooling: The mean of the patches' tokens, or the class token.
      block: As they leave this block, counted from 0 or back from -1; by default after the last LayerNorm.
      encoder_heads: Attention heads, of a PyTorch checkpoint, where its width is of no published model.
      batch_size: Images at a time, spread over the devices of this host.
      workers: Processes that read images; by default threads of this one.
    """
    prepare_jax_for(source)
    from mae_jax.data.images.decode import prepare_decoder
    from mae_jax.data.sources.source import absolute, open_source
    from mae_jax.evaluation.encoders import load_pretrained
    from mae_jax.evaluation.features import FeatureFile, check_features, check_writable, save_features, source_features

    if batch_size < 1:
        print(f"mae-jax features: batch_size {batch_size} must be positive", file=sys.stderr)
        return 2
    if workers is not None and workers < 0:
        print(f"mae-jax features: workers {workers} must not be negative", file=sys.stderr)
        return 2
    check_writable(out)
    prepare_decoder()
    read = load_pretrained(source, encoder_heads)
    check_features(read.params, read.model, pooling, block)
    images = open_source(data, read.model.in_channels, split)
    with progress(len(images)) as report:
        found = source_features(
            read.params,
            images,
            read.model,
            read.augment,
            pooling,
            batch_size,
            block=block,
            workers=workers,
            report=report,
        )
    broken = set(found.broken.tolist())
    names = tuple(images.name(index) for index in range(len(images)) if index not in broken)
    of = {
        "source": read.source,
        "step": read.step,
        "pooling": pooling,
        "block": None if block is None else block % read.model.encoder.depth,
        "data": absolute(data),
        "split": split,
    }
    save_features(out, FeatureFile(found.values, found.labels, images.class_names, names, of))
    for index in found.broken[:20].tolist():
        print(f"left out: {images.name(index)} does not decode")
    left = f"; {len(broken):,} do not decode and are left out" if broken else ""
    print(f"wrote {out}: {len(found.values):,} images x {found.values.shape[1]}{left}")
    return 0
