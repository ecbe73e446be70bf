"""Commands that look at what was learnt."""

import sys
from pathlib import Path
from typing import Literal

import tyro

from mae_jax.commands.precision import precision, prepare_jax, prepare_jax_for
from mae_jax.commands.progress import progress
from mae_jax.errors import StatedError


def reconstruct(
    run: tyro.conf.Positional[Path],
    images: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    out: Path = Path("grid.png"),
    mask_ratio: float | None = None,
    seed: int = 0,
    samples: int = 8,
) -> int:
    """Draw what a model makes of hidden patches: mae-jax reconstruct RUN_OR_CHECKPOINT [IMAGES...] --out grid.png.

    Args:
      run: A work directory, or one checkpoint in it.
      images: Image files; without any, samples of the data that the run was trained on.
      out: The picture to write; its ending says which kind.
      mask_ratio: Share of patches to hide; by default the run's own.
      seed: Of the masks, and of the choice of samples.
      samples: How many, where no files are given.
    """
    from mae_jax.atomic import check_picture, save_picture

    check_picture(out)
    prepare_jax(precision(run))
    from mae_jax.evaluation.gallery import reconstruction_sheet

    save_picture(reconstruction_sheet(run, images, mask_ratio=mask_ratio, seed=seed, samples=samples), out)
    print(f"wrote {out}")
    return 0


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
      encoder_heads: Attention heads, where a PyTorch checkpoint does not tell them.
      batch_size: Images at a time, spread over the devices of this host.
    """
    prepare_jax_for(source)
    from mae_jax.data.sources import absolute, open_source
    from mae_jax.evaluation.encoders import load_pretrained
    from mae_jax.evaluation.feature_files import FeatureFile, check_writable, save_features
    from mae_jax.evaluation.features import check_features, source_features

    if batch_size < 1:
        print(f"mae-jax features: batch_size {batch_size} must be positive", file=sys.stderr)
        return 2
    check_writable(out)
    read = load_pretrained(source, encoder_heads)
    check_features(read.params, read.model, pooling, block)
    images = open_source(data, read.model.in_channels, split)
    with progress(len(images)) as tell:
        found = source_features(
            read.params, images, read.model, read.augment, pooling, batch_size, block=block, tell=tell
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


def knn(
    source: tyro.conf.Positional[str],
    /,
    data: str | None = None,
    queries: Path | None = None,
    k: int = 20,
    temperature: float | None = 0.07,
    pooling: Literal["mean", "class"] = "mean",
    encoder_heads: int | None = None,
) -> int:
    """Score an encoder's features by nearest neighbours, beside the same encoder untrained: mae-jax knn SOURCE.

    Or score features that are there: mae-jax knn bank.npz --queries val.npz.

    Args:
      source: A work directory, one checkpoint in it, a PyTorch checkpoint that `mae-jax port` reads, or a file of
        `mae-jax features`.
      data: A source with classes; by default what the run was trained on. Images of its split `val` are looked up
        among those of `train`; where there is no `val`, each image of `train` among the others.
      queries: A second file of `mae-jax features`, looked up among the first.
      k: Neighbours; 200 is the Lightly benchmark's setting.
      temperature: Of the vote, exp(similarity / temperature); None counts each neighbour once.
      pooling: The mean of the patches' tokens, or the class token; a file of features has its own.
      encoder_heads: Attention heads, where a PyTorch checkpoint does not tell them.
    """
    if source.endswith(".npz"):
        if data is not None:
            raise StatedError(f"data {data} is for an encoder: {source} holds features, look up others by --queries")
        from mae_jax.evaluation.knn import compare_files

        print(compare_files(Path(source), queries, k=k, temperature=temperature))
        return 0
    if queries is not None:
        raise StatedError(f"queries {queries} is to be looked up in a file of features, and {source} is none (.npz)")
    prepare_jax_for(source)
    from mae_jax.evaluation.knn import compare_with_untrained

    print(
        compare_with_untrained(source, data, k=k, temperature=temperature, pooling=pooling, encoder_heads=encoder_heads)
    )
    return 0
