"""Features of a source's images in a NumPy file: what `mae-jax features` writes and `mae-jax knn` reads."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from mae_jax.atomic import check_place, whole
from mae_jax.errors import StatedError

# Two files hold the same features of different images where these agree.
_SAME = ("source", "step", "pooling", "block")


class FeatureFile(NamedTuple):
    """One array a field, none of them pickled; row i of all is the i-th image that decodes."""

    features: Float[np.ndarray, "images width"]  # float32
    labels: Int[np.ndarray, " images"]  # index into class_names, -1 where there is no class
    class_names: tuple[str, ...]
    names: tuple[str, ...]  # of the images' files
    of: dict[str, Any]  # source, step, pooling, block (None: after the last LayerNorm), data, split


def check_writable(path: Path) -> None:
    """Refuse, before anything is computed, a file that could not be written.

    Raises:
      StatedError: it does not end in .npz, or its folder is not there or cannot be written to.
    """
    if path.suffix != ".npz":
        raise StatedError(f"out {path} does not end in .npz")
    check_place(path)


def save_features(path: Path, found: FeatureFile) -> None:
    """Write a file whole or not at all.

    Raises:
      StatedError: it cannot be written.
    """
    check_writable(path)
    try:
        with whole(path) as beside:
            np.savez(
                beside,
                features=found.features,
                labels=found.labels,
                class_names=np.array(found.class_names, np.str_),
                names=np.array(found.names, np.str_),
                of=np.array(json.dumps(found.of)),
            )
    except OSError as error:
        raise StatedError(f"out {path} cannot be written: {error.strerror or error}") from error


def load_features(path: Path) -> FeatureFile:
    """Read a file; nothing in it is executed.

    Raises:
      StatedError: it cannot be read, or is not what `mae-jax features` writes.
    """
    try:
        # Opened here: numpy leaves a file that it cannot read open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            missing = [name for name in FeatureFile._fields if name not in stored]
            if missing:
                raise StatedError(f"{path} has no array {missing}: give a file that `mae-jax features` wrote")
            features, labels, class_names, names, of = (stored[name] for name in FeatureFile._fields)
        said = json.loads(str(of))
    except OSError as error:
        raise StatedError(f"{path} cannot be read: {error.strerror or error}") from error
    except StatedError:
        raise
    except Exception as error:  # whatever a damaged file makes NumPy and its layers raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        if "allow_pickle" in reason:  # NumPy's advice, for whatever it does not know
            reason = "it is no .npz, or holds Python objects, which are not read"
        raise StatedError(f"{path} is damaged, or no file of features: {reason}") from error
    found = FeatureFile(features, labels, tuple(map(str, class_names.ravel())), tuple(map(str, names.ravel())), said)
    _check(path, found)
    return found


def _check(path: Path, found: FeatureFile) -> None:
    features, labels = found.features, found.labels
    if features.ndim != 2 or features.dtype != np.float32:
        raise StatedError(f"{path}: features are {features.dtype} {features.shape}, not float32 (images, width)")
    if labels.shape != features.shape[:1] or labels.dtype.kind != "i" or len(found.names) != len(features):
        raise StatedError(
            f"{path}: {len(features)} features, and labels {labels.dtype} {labels.shape}, {len(found.names)} names"
        )
    if labels.size and not -1 <= labels.min() <= labels.max() < len(found.class_names):
        raise StatedError(
            f"{path}: labels {labels.min()} .. {labels.max()} are not those of {len(found.class_names)} classes"
        )
    if not isinstance(found.of, dict):
        raise StatedError(f"{path}: of is {found.of!r}, not what says where features come from")


def check_alike(first: Path, one: FeatureFile, second: Path, other: FeatureFile) -> None:
    """Refuse to compare features of two kinds.

    Raises:
      StatedError: they come from different encoders, or from different places in one.
    """
    for name in _SAME:
        a, b = one.of.get(name), other.of.get(name)
        if a != b:
            raise StatedError(f"{first} and {second} do not compare: {name} {a} and {b}; make both alike")
    if one.features.shape[1] != other.features.shape[1]:
        raise StatedError(
            f"{first} and {second} do not compare: {one.features.shape[1]} and {other.features.shape[1]} wide"
        )
