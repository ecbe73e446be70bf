"""Score features by nearest neighbours."""

from pathlib import Path
from typing import Literal

import tyro

from mae_jax.cli.flags import command, prepare_jax_for
from mae_jax.errors import StatedError


@command
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
      encoder_heads: Attention heads, of a PyTorch checkpoint, where its width is of no published model.
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
    from mae_jax.data.images.decode import prepare_decoder
    from mae_jax.evaluation.knn import compare_with_untrained

    prepare_decoder()
    print(
        compare_with_untrained(source, data, k=k, temperature=temperature, pooling=pooling, encoder_heads=encoder_heads)
    )
    return 0
