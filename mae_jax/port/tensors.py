"""Checkpoint files: PyTorch's and safetensors, to NumPy and back. No file is ever allowed to run code.

torch is imported where a PyTorch file is read or written, and nowhere else here.
"""

import argparse
import contextlib
import json
import os
import pickle
import pickletools
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mae_jax.errors import StatedError
from mae_jax.port.keys import Tensors

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
SAFETENSORS = ".safetensors"
# All that a port puts into a folder: --force replaces folders that hold nothing else.
PORTED_NAMES = frozenset(
    {
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
        "checkpoint.pth",
        "state",
        "record",
        "_CHECKPOINT_METADATA",
        "commit_success.txt",
    }
)
METADATA_KEY = "mae_jax"  # under which a safetensors header carries what no tensor tells

# Where checkpoints keep their weights; the first that is there. Elsewhere the file is the dictionary itself.
_STATE_DICTS = ("model", "state_dict", "model_state_dict")


# Dtypes that are read, as torch and as safetensors call them. No weight is an integer, but counts beside them are.
_TORCH_DTYPES = frozenset(
    ("float16", "bfloat16", "float32", "float64", "bool", "int8", "uint8", "int16", "int32", "int64")
)
_SAFETENSORS_DTYPES = frozenset(
    ("F16", "BF16", "F32", "F64", "BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
)


class Contents(NamedTuple):
    """A file's tensors, what it says beside them, and which other things it holds that are not carried over."""

    tensors: Tensors
    arguments: dict[str, Any]
    left: tuple[str, ...] = ()


def read_file(path: Path) -> Contents:
    """The tensors of a PyTorch or safetensors file, told apart by what they begin with.

    Raises:
      StatedError: it is not there, empty, cut short, no checkpoint, would run code, or holds tensors of a kind that is
        not read.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(9)
    except OSError as error:
        raise StatedError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise StatedError(f"{path} is empty")
    if head[8:] == b"{":
        return _read_safetensors(path)
    if head.startswith(b"PK\x03\x04") or head[0] == 0x80:
        return _read_torch(path, zipped=head[0] != 0x80)
    raise StatedError(f"{path} is not a checkpoint: it begins neither as a PyTorch file nor as safetensors")


def _read_safetensors(path: Path) -> Contents:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415  (the one format that this branch reads)

    try:
        with safe_open(path, framework="numpy") as stream:
            tensors = {}
            for key in stream.keys():  # noqa: SIM118  (not a mapping)
                dtype = stream.get_slice(key).get_dtype()
                if dtype not in _SAFETENSORS_DTYPES:
                    raise StatedError(_kind_refused(path, key, dtype))
                tensors[key] = stream.get_tensor(key)
            metadata = stream.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise StatedError(f"{path} is damaged or cut short: {error}") from error
    try:
        arguments = json.loads(metadata.get(METADATA_KEY, "{}"))
    except json.JSONDecodeError:
        arguments = {}
    return Contents(tensors, arguments if isinstance(arguments, dict) else {})


def _read_torch(path: Path, zipped: bool) -> Contents:
    torch = import_torch(f"to read {path}")
    try:
        # A namespace of arguments is all that the authors' files hold beside tensors and plain values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise StatedError(_unpickling_refused(torch, path, error)) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise StatedError(f"{path} is damaged, cut short or not a PyTorch checkpoint: {reason}") from error
    if not isinstance(loaded, Mapping):
        raise StatedError(f"{path} holds {type(loaded).__name__}, not a dictionary of tensors")
    where = next((key for key in _STATE_DICTS if isinstance(loaded.get(key), Mapping)), None)
    state = loaded if where is None else loaded[where]
    tensors = {
        str(key): _to_numpy(torch, values, path, str(key))
        for key, values in state.items()
        if isinstance(values, torch.Tensor)
    }
    if not tensors:
        raise StatedError(f"{path} holds no tensors (its keys: {', '.join(map(str, list(loaded)[:8])) or 'none'})")
    arguments = loaded.get("args")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    left = () if where is None else tuple(str(key) for key in loaded if key not in (where, "args"))
    return Contents(tensors, dict(arguments) if isinstance(arguments, Mapping) else {}, left)


def _unpickling_refused(torch: Any, path: Path, error: Exception) -> str:
    try:
        named = sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - {"argparse.Namespace"})
    except Exception:  # the format before torch 1.6, or damaged as well
        named = re.findall(r"GLOBAL (\S+)", str(error))
    if not named and not _names_code(path):
        return f"{path} is damaged, cut short or not a PyTorch checkpoint: {str(error).splitlines()[0][:200]}"
    names = f" (it names {', '.join(named)})" if named else ""
    return (
        f"{path} could run code when it is opened{names}, and is not read. "
        "Where you trust it, open it with the program that made it and save its state_dict alone."
    )


def _names_code(path: Path) -> bool:
    """Whether a bare pickle says that something is to be called; it is looked through, not opened."""
    try:
        with path.open("rb") as stream:
            return any(code.name in ("GLOBAL", "STACK_GLOBAL", "REDUCE") for code, _, _ in pickletools.genops(stream))
    except Exception:  # no pickle, or one that is cut short
        return False


def _kind_refused(path: Path, key: str, kind: str) -> str:
    return f"{path} holds {key} as {kind}, which is not read here: save it as float32, dense, on the CPU"


def _to_numpy(torch: Any, values: Any, path: Path, key: str) -> np.ndarray:
    values = values.detach()
    for kind, read in (
        (str(values.dtype), str(values.dtype).removeprefix("torch.") in _TORCH_DTYPES),
        (str(values.layout), values.layout == torch.strided),
        (f"a tensor of device {values.device}", values.device.type == "cpu"),
    ):
        if not read:
            raise StatedError(_kind_refused(path, key, kind.removeprefix("torch.")))
    if values.dtype == torch.bfloat16:  # which NumPy does not know by itself
        return values.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return values.numpy()


def write_safetensors(path: Path, tensors: Tensors, arguments: Mapping[str, Any]) -> None:
    """Write a safetensors file; `format` pt is what PyTorch's readers ask for.

    Raises:
      OSError: the operating system refuses, as where the disk is full.
    """
    from safetensors import SafetensorError  # noqa: PLC0415  (as in reading)
    from safetensors.numpy import save_file  # noqa: PLC0415

    metadata = {"format": "pt", METADATA_KEY: json.dumps(dict(arguments))}
    try:
        save_file({key: np.ascontiguousarray(values) for key, values in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def write_torch(path: Path, tensors: Tensors, arguments: Mapping[str, Any] | None) -> None:
    """Write a PyTorch file: {"model": tensors, "args": arguments}, or the tensors alone."""
    torch = import_torch(f"to write {path.name}")

    def tensor(values: np.ndarray) -> Any:
        values = np.ascontiguousarray(values)
        if values.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        # JAX's arrays may not be written to, and torch says so.
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    state = {key: tensor(values) for key, values in tensors.items()}
    torch.save(state if arguments is None else {"model": state, "args": dict(arguments)}, path)


def import_torch(why: str) -> Any:
    """torch.

    Raises:
      StatedError: it is not installed; `why` says what it is needed for.
    """
    try:
        import torch  # noqa: PLC0415  (seconds, and only some formats need it)
    except ModuleNotFoundError as error:
        raise StatedError(f"PyTorch is needed {why}: pip install 'mae-jax[torch]'") from error
    return torch


@contextlib.contextmanager
def beside(destination: Path, force: bool) -> Iterator[Path]:
    """A path beside the destination to write a file or folder to; moved into place when all went well, else removed.

    Raises:
      StatedError: the destination exists and `force` is not given, holds other things than a port, or its folder
        cannot be written to.
    """
    destination = destination.absolute()
    require_replaceable(destination, force)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        room = destination.parent / f".{destination.name}.{uuid.uuid4().hex[:8]}"
        room.mkdir()
    except OSError as error:
        raise StatedError(f"{destination.parent} cannot be written to: {error.strerror}") from error
    old, fresh = room / "old", room / destination.name
    try:
        yield fresh
        require_replaceable(destination, force)  # once more: it may have come, or changed, in the meantime
        if os.path.lexists(destination):
            os.replace(destination, old)  # a folder cannot be moved onto another
        os.replace(fresh, destination)
    finally:
        if os.path.lexists(old) and not os.path.lexists(destination):
            os.replace(old, destination)
        shutil.rmtree(room, ignore_errors=True)


def require_replaceable(destination: Path, force: bool) -> None:
    """Refuse to replace what is not to be replaced.

    Raises:
      StatedError: the destination exists and `force` is not given, or it holds other things than a port.
    """
    if not os.path.lexists(destination):
        return
    if not force:
        raise StatedError(f"{destination} exists; --force replaces it")
    if destination.is_dir():
        others = sorted(child.name for child in destination.iterdir() if child.name not in PORTED_NAMES)
        if others:
            raise StatedError(
                f"{destination} holds other things than a ported model ({', '.join(others[:5])}) and is not replaced: "
                "choose another folder, or remove it"
            )
