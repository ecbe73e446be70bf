"""Draw what a model makes of hidden patches."""

from pathlib import Path

import tyro

from mae_jax.cli.flags import command, precision, prepare_jax


@command
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
    from mae_jax.files import check_picture, save_picture

    check_picture(out)
    prepare_jax(precision(run))
    from mae_jax.data.images.decode import prepare_decoder
    from mae_jax.evaluation.sheet import reconstruction_sheet

    prepare_decoder()
    save_picture(reconstruction_sheet(run, images, mask_ratio=mask_ratio, seed=seed, samples=samples), out)
    print(f"wrote {out}")
    return 0
