"""`mae-jax port`: read, write beside, verify with the library that receives, move into place."""

from collections.abc import Callable
from pathlib import Path

from mae_jax.config import Size
from mae_jax.errors import StatedError
from mae_jax.port.compare import worst
from mae_jax.port.formats import Format, is_folder, remarks, require_expressible
from mae_jax.port.infer_config import Hints
from mae_jax.port.keys import Part, encoder_config
from mae_jax.port.read import read_weights
from mae_jax.port.verify import verify
from mae_jax.port.weights import Weights
from mae_jax.port.write import FileDtype, beside, require_replaceable, write


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
    log: Callable[[str], None] = print,
) -> None:
    """Carry a model from one format to another; at the destination stands the whole of it, or nothing.

    Raises:
      StatedError: the source cannot be read, the format cannot express the model, the destination exists, or the
        receiving library computes something else.
    """
    if to == "jax" and dtype != "float32":
        raise StatedError(f"dtype {dtype}: parameters of this project are float32", field="dtype")
    is_folder(destination, to)  # refuses a wrong ending before anything is read
    require_replaceable(destination, force)
    weights = read_weights(source, hints, image_size=image_size)
    part = _part(weights, part, to)
    log(f"{source}: {weights.origin}; {describe(weights)}")
    require_expressible(weights.config, to, part)
    for note in (*weights.notes, *remarks(weights.config, to, part)):
        log(f"note: {note}")
    with beside(destination, force) as fresh:
        write(weights, fresh, destination, to=to, part=part, dtype=dtype)
        if check:
            verdict = verify(weights, fresh, to, part, dtype)
            for line in verdict.lines():
                log(line)
            if not verdict.passed:
                last = worst(verdict.comparisons)
                apart = last.fault or f"it differs by {last.max_rel:.1e}, beyond the bound {last.bound:.0e}"
                raise StatedError(
                    f"{last.tensor} is not that of {verdict.library}: {apart}. Nothing is left at {destination}",
                    field=last.tensor,
                )
    log(f"wrote {destination}")


def _part(weights: Weights, asked: Part | None, to: Format) -> Part:
    """Return the part to be written: the one asked for, or all that there is."""
    if asked == "all" and weights.part == "encoder" and to != "timm":
        raise StatedError(f"the source ({weights.origin}) has no decoder: --part encoder", field="part")
    return asked or weights.part


def describe(weights: Weights) -> str:
    """Describe the model in half a line."""
    config, model = weights.config, encoder_config(weights.config)
    stacks = [("encoder", model.encoder)]
    if config.kind == "mae" and weights.part == "all":
        stacks.append(("decoder", model.decoder))
    sizes = ", ".join(f"{name} {stack.width} wide, {stack.depth} deep, {stack.heads} heads" for name, stack in stacks)
    head = ""
    if config.kind == "classifier":
        pooled = "mean of the patches" if config.pooling == "mean" else "class token"
        head = f", {config.classes} classes from the {pooled}"
    return f"image {model.image_size}, patch {model.patch_size}, {sizes}, positions {model.positions}{head}"
