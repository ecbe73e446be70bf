"""Checkpoint files: PyTorch's and safetensors, to NumPy and back.

Files come from strangers: `untrusted.py` looks through one of PyTorch before torch opens it. The format before torch
1.6 has no checksums, nor has safetensors: a byte altered in the values of such a file is not noticed.

torch is imported where a PyTorch file is read or written, and nowhere else here.
"""

import argparse
import json
import stat
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mae_jax.errors import StatedError, shown_name
from mae_jax.files import parse_json
from mae_jax.port.keys import Tensors
from mae_jax.port.untrusted import MOST_BYTES, check_archive, check_pickles, damaged, excessive, refused

TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
SAFETENSORS = ".safetensors"
METADATA_KEY = "mae_jax"  # under which a safetensors header carries what no tensor holds

# Where checkpoints keep their weights; the first that is there. Elsewhere the file is the dictionary itself.
_STATE_DICTS = ("model", "state_dict", "model_state_dict")

# Dtypes that are read, as torch and as safetensors call them. No weight is an integer, but counts beside them are.
_TORCH_DTYPES = frozenset(
    ("float16", "bfloat16", "float32", "float64", "bool", "int8", "uint8", "int16", "int32", "int64")
)
_SAFETENSORS_DTYPES = frozenset(
    ("F16", "BF16", "F32", "F64", "BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
)

_MOST_TENSORS = 10_000
_MOST_SHARED = 4  # times the file's size: tensors may share their memory, as tied weights do


class Contents(NamedTuple):
    """A file's tensors, its arguments (what it holds beside them), and the names of what is not carried over."""

    tensors: Tensors
    arguments: dict[str, Any]
    left: tuple[str, ...] = ()


def read_file(path: Path) -> Contents:
    """Read the tensors of a PyTorch or safetensors file; what it begins with shows which it is.

    Raises:
      StatedError: it is not there, empty, cut short, damaged, no checkpoint, would run code, claims more than it
        holds, or holds tensors of a kind that is not read.
    """
    try:
        found = path.stat()
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):  # a pipe would be waited for
            raise refused(f"{path} is no file")
        with path.open("rb") as stream:
            head = stream.read(9)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise refused(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not head:
        raise refused(f"{path} is empty")
    if head[8:] == b"{":
        return _read_safetensors(path, header=int.from_bytes(head[:8], "little"))
    if head.startswith(b"PK\x03\x04") or head[0] == 0x80:
        return _read_torch(path, found.st_size, zipped=head[0] != 0x80)
    raise refused(f"{path} is not a checkpoint: it begins neither as a PyTorch file nor as safetensors")


# --- safetensors -------------------------------------------------------------------------------------------------


def _read_safetensors(path: Path, header: int) -> Contents:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415  (the one format that this branch reads)

    if header > MOST_BYTES:
        raise excessive(path, f"its header claims {header} bytes, and {MOST_BYTES} are the most")
    try:
        with safe_open(path, framework="numpy") as stream:
            names = list(stream.keys())
            _require_few(path, names)
            tensors = {}
            for key in names:
                dtype = stream.get_slice(key).get_dtype()
                if dtype not in _SAFETENSORS_DTYPES:
                    raise _kind_refused(path, key, dtype)
                tensors[key] = stream.get_tensor(key)
            metadata = stream.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise refused(f"{path} is damaged or cut short: {str(error)[:200]}") from error
    written = f"{path}: {METADATA_KEY} in its header"
    arguments = parse_json(metadata.get(METADATA_KEY, "{}").encode(), written, field="source")
    return Contents(tensors, arguments if isinstance(arguments, dict) else {})


# --- PyTorch -----------------------------------------------------------------------------------------------------


def _read_torch(path: Path, size: int, zipped: bool) -> Contents:
    if zipped:
        check_archive(path, size)
    else:
        check_pickles(path)
    torch = import_torch(f"to read {path}")
    try:
        # A namespace of arguments is all that the authors' files hold beside tensors and plain values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # whatever a damaged file makes torch raise
        raise damaged(path, error) from error
    if not isinstance(loaded, Mapping):
        raise refused(f"{path} holds {type(loaded).__name__}, not a dictionary of tensors")
    where = next((key for key in _STATE_DICTS if isinstance(loaded.get(key), Mapping)), None)
    state = loaded if where is None else loaded[where]
    found = {str(key): values.detach() for key, values in state.items() if isinstance(values, torch.Tensor)}
    if not found:
        raise refused(f"{path} holds no tensors (its keys: {_listed(map(str, loaded)) or 'none'})")
    _require_few(path, found)
    for key, values in found.items():
        _require_plain(torch, values, path, key)
    total = sum(values.numel() * values.element_size() for values in found.values())
    if total > _MOST_SHARED * size:
        raise excessive(path, f"its tensors claim {total} bytes, and the file has {size}")
    arguments = loaded.get("args")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    left = () if where is None else tuple(shown_name(str(key)) for key in loaded if key not in (where, "args"))
    return Contents(
        {key: _to_numpy(torch, values) for key, values in found.items()},
        dict(arguments) if isinstance(arguments, Mapping) else {},
        left,
    )


def _kind_refused(path: Path, key: str, kind: str) -> StatedError:
    return StatedError(
        f"{path} holds {shown_name(key)} as {kind}, which is not read here: save it as float32, dense, on the CPU",
        field=key,
    )


def _require_few(path: Path, names: Iterable[str]) -> None:
    count = len(list(names))
    if count > _MOST_TENSORS:
        raise excessive(path, f"it holds {count} tensors, and {_MOST_TENSORS} are the most")


def _listed(names: Iterable[str]) -> str:
    """List the first names."""
    return ", ".join(shown_name(name) for name, _ in zip(names, range(8), strict=False))


def _require_plain(torch: Any, values: Any, path: Path, key: str) -> None:
    for kind, read in (
        (str(values.dtype), str(values.dtype).removeprefix("torch.") in _TORCH_DTYPES),
        (str(values.layout), values.layout == torch.strided),
        (f"a tensor of device {values.device}", values.device.type == "cpu"),
    ):
        if not read:
            raise _kind_refused(path, key, kind.removeprefix("torch."))


def _to_numpy(torch: Any, values: Any) -> np.ndarray:
    if values.dtype == torch.bfloat16:  # which NumPy does not know by itself
        return values.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return values.numpy()


# --- writing -----------------------------------------------------------------------------------------------------


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
        # JAX's arrays may not be written to, and torch warns of it.
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    state = {key: tensor(values) for key, values in tensors.items()}
    torch.save(state if arguments is None else {"model": state, "args": dict(arguments)}, path)


def import_torch(why: str) -> Any:
    """Import torch; `why` is what it is needed for.

    Raises:
      StatedError: it is not installed.
    """
    try:
        import torch  # noqa: PLC0415  (seconds, and only some formats need it)
    except ModuleNotFoundError as error:
        raise StatedError(f"PyTorch is needed {why}: pip install 'mae-jax[torch]'", field="torch") from error
    return torch
