"""`mae-jax port`: read, write beside, verify with the library that receives, move into place."""

from collections.abc import Callable
from pathlib import Path

from mae_jax.config import ModelConfig, Size
from mae_jax.errors import StatedError
from mae_jax.port.formats import Format, is_folder, remarks, require_expressible
from mae_jax.port.infer_config import Hints
from mae_jax.port.keys import Part, encoder_config
from mae_jax.port.read import read_weights
from mae_jax.port.tensors import beside, require_replaceable
from mae_jax.port.verify import verify
from mae_jax.port.weights import Weights
from mae_jax.port.write import FileDtype, write


def port(
    source: str,
    destination: Path,
    to: Format,
    *,
    part: Part | None = None,
    hints: Hints | None = None,
    image_size: Size | None = None,
    dtype: FileDtype = "float32",
    check: bool = True,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Carry a model from one format to another; at the destination stands the whole of it, or nothing.

    Raises:
      StatedError: the source cannot be read, the format cannot express the model, the destination exists, or the
        receiving library computes something else.
    """
    if to == "jax" and dtype != "float32":
        raise StatedError(f"dtype {dtype}: parameters of this project are float32")
    is_folder(destination, to)  # refuses a wrong ending before anything is read
    require_replaceable(destination, force)
    weights = read_weights(source, hints, image_size=image_size)
    part = _part(weights, part, to)
    say(f"{source}: {weights.origin}; {describe(weights)}")
    require_expressible(weights.config, to, part)
    for note in (*weights.notes, *remarks(weights.config, to, part)):
        say(f"note: {note}")
    with beside(destination, force) as fresh:
        write(weights, fresh, destination, to=to, part=part, dtype=dtype)
        if check:
            verdict = verify(weights, fresh, to, part, dtype)
            for line in verdict.lines():
                say(line)
            if not verdict.passed:
                worst = max(verdict.differences, key=lambda d: d.max_rel)
                raise StatedError(
                    f"{worst.name} differs by {worst.max_rel:.1e} from {verdict.library}, beyond the bound "
                    f"{verdict.bound:.0e}: nothing is left at {destination}"
                )
    say(f"wrote {destination}")


def _part(weights: Weights, asked: Part | None, to: Format) -> Part:
    """What is to be written: what was asked for, or all that there is."""
    if asked == "all" and weights.part == "encoder" and to != "timm":
        raise StatedError(f"the source ({weights.origin}) has no decoder: --part encoder")
    return asked or weights.part


def describe(weights: Weights) -> str:
    """The model in half a line."""
    config, model = weights.config, encoder_config(weights.config)
    stacks = [("encoder", model.encoder)]
    if isinstance(config, ModelConfig) and weights.part == "all":
        stacks.append(("decoder", model.decoder))
    sizes = ", ".join(f"{name} {stack.width} wide, {stack.depth} deep, {stack.heads} heads" for name, stack in stacks)
    head = ""
    if not isinstance(config, ModelConfig):
        pooled = "mean of the patches" if config.pooling == "mean" else "class token"
        head = f", {config.classes} classes from the {pooled}"
    return f"image {model.image_size}, patch {model.patch_size}, {sizes}, positions {model.positions}{head}"
