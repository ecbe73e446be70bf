"""Carry weights to and from PyTorch libraries."""

from pathlib import Path
from typing import Literal

import tyro

from mae_jax.cli.flags import command, prepare_jax_for


@command
def port(
    source: tyro.conf.Positional[str],
    destination: tyro.conf.Positional[Path],
    /,
    to: Literal["fair", "timm", "huggingface", "lightly", "lightly-deprecated", "jax"],
    part: Literal["all", "encoder"] | None = None,
    encoder_heads: int | None = None,
    decoder_heads: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    source_image_size: int | tuple[int, int] | None = None,
    mask_ratio: float | None = None,
    norm_pix_loss: bool | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    verify: bool = True,
    force: bool = False,
) -> int:
    """Carry weights to and from PyTorch libraries: mae-jax port SOURCE DEST --to FORMAT.

    The library that receives them computes the same, or nothing is written.

    Args:
      source: A PyTorch or safetensors file, a Hugging Face folder, a run or checkpoint of this project, or
        hf:OWNER/NAME. Whose layout it has is seen from its keys.
      destination: The file or folder to write.
      to: The library that is to read it.
      part: encoder leaves the decoder out; by default all that the source has.
      encoder_heads: Attention heads, where they are not known (those of a run are).
      decoder_heads: The decoder's.
      image_size: Of images to come: sin-cos positions are recomputed, learned ones resized.
      source_image_size: What the source's positions were made for, where it is not a square.
      mask_ratio: Where the source does not say it.
      norm_pix_loss: Where the source does not say it.
      dtype: Of the file.
      verify: Run the same images and noise through this project's model and the receiving library's.
      force: Replace what is at the destination.
    """
    from mae_jax.port.convert import port
    from mae_jax.port.infer_config import Hints

    prepare_jax_for(source)
    hints = Hints(encoder_heads, decoder_heads, source_image_size, mask_ratio, norm_pix_loss)
    port(source, destination, to, part=part, hints=hints, image_size=image_size, dtype=dtype, check=verify, force=force)
    return 0
