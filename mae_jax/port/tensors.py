"""Checkpoint files: PyTorch's and safetensors, to NumPy and back.

Files come from strangers. None is allowed to run code, and no size that one claims is believed: its directory and its
pickle are looked through before anything of it is opened.

torch.save puts a CRC-32 beside every entry of its zip and torch.load does not look at it; here it is compared. The
format before torch 1.6 has none, nor has safetensors: a byte altered in the values of such a file is not noticed.

torch is imported where a PyTorch file is read or written, and nowhere else here.
"""

import argparse
import io
import json
import pickletools
import re
import stat
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mae_jax.errors import StatedError, shown_name
from mae_jax.files import parse_json
from mae_jax.port.keys import Tensors

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

# What a file may hold beside its values. ViT-H with its optimizer has 0.3 MiB, 60,000 instructions, 2,300 tensors.
_MOST_BYTES = 4 << 20  # of a pickle, a zip's directory or a safetensors header
_MOST_OPCODES = 300_000  # of a pickle
_MOST_TENSORS = 10_000
_MOST_IN_TUPLE = 1000  # values, those in tuples within it included: all are hashed where it is a key
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
            raise _refused(f"{path} is no file")
        with path.open("rb") as stream:
            head = stream.read(9)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise _refused(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not head:
        raise _refused(f"{path} is empty")
    if head[8:] == b"{":
        return _read_safetensors(path, header=int.from_bytes(head[:8], "little"))
    if head.startswith(b"PK\x03\x04") or head[0] == 0x80:
        return _read_torch(path, found.st_size, zipped=head[0] != 0x80)
    raise _refused(f"{path} is not a checkpoint: it begins neither as a PyTorch file nor as safetensors")


def _refused(message: str) -> StatedError:
    return StatedError(message, field="source")


def _damaged(path: Path, reason: object) -> StatedError:
    """Name a fault that whatever made or moved the file is to blame for."""
    first = str(reason).splitlines()[0][:200] if str(reason) else type(reason).__name__
    return _refused(f"{path} is damaged, cut short or not a PyTorch checkpoint: {first}")


def _excessive(path: Path, what: str) -> StatedError:
    return _refused(f"{path} is not read: {what}. Save the model's state_dict alone, with torch.save or safetensors")


# --- safetensors -------------------------------------------------------------------------------------------------


def _read_safetensors(path: Path, header: int) -> Contents:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415  (the one format that this branch reads)

    if header > _MOST_BYTES:
        raise _excessive(path, f"its header claims {header} bytes, and {_MOST_BYTES} are the most")
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
        raise _refused(f"{path} is damaged or cut short: {str(error)[:200]}") from error
    written = f"{path}: {METADATA_KEY} in its header"
    arguments = parse_json(metadata.get(METADATA_KEY, "{}").encode(), written, field="source")
    return Contents(tensors, arguments if isinstance(arguments, dict) else {})


# --- PyTorch -----------------------------------------------------------------------------------------------------


def _read_torch(path: Path, size: int, zipped: bool) -> Contents:
    if zipped:
        _check_archive(path, size)
    else:
        _check_pickles(path)
    torch = import_torch(f"to read {path}")
    try:
        # A namespace of arguments is all that the authors' files hold beside tensors and plain values.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # whatever a damaged file makes torch raise
        raise _damaged(path, error) from error
    if not isinstance(loaded, Mapping):
        raise _refused(f"{path} holds {type(loaded).__name__}, not a dictionary of tensors")
    where = next((key for key in _STATE_DICTS if isinstance(loaded.get(key), Mapping)), None)
    state = loaded if where is None else loaded[where]
    found = {str(key): values.detach() for key, values in state.items() if isinstance(values, torch.Tensor)}
    if not found:
        raise _refused(f"{path} holds no tensors (its keys: {_listed(map(str, loaded)) or 'none'})")
    _require_few(path, found)
    for key, values in found.items():
        _require_plain(torch, values, path, key)
    total = sum(values.numel() * values.element_size() for values in found.values())
    if total > _MOST_SHARED * size:
        raise _excessive(path, f"its tensors claim {total} bytes, and the file has {size}")
    arguments = loaded.get("args")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    left = () if where is None else tuple(shown_name(str(key)) for key in loaded if key not in (where, "args"))
    return Contents(
        {key: _to_numpy(torch, values) for key, values in found.items()},
        dict(arguments) if isinstance(arguments, Mapping) else {},
        left,
    )


class _Bounded(io.BufferedReader):
    """A file of which no more than `_MOST_BYTES` are read at once, whatever lengths it claims."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._path, self._size = path, path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = self._size - self.tell()
        if (left if size is None or size < 0 else min(size, left)) > _MOST_BYTES:
            raise _excessive(self._path, f"a part of it claims more than {_MOST_BYTES} bytes beside its values")
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        return super().readline(_MOST_BYTES)


def _check_archive(path: Path, size: int) -> None:
    """Refuse a zip that is no archive of torch.save: sizes first, then its pickle, then the bytes by their CRC-32.

    torch.save stores values as they are, so that nothing has to be inflated.
    """
    try:
        with _Bounded(path) as stream, zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                    what = f"its entry {shown_name(entry.filename)} is compressed, and inflates to {entry.file_size}"
                    raise _excessive(path, f"{what} bytes")
            total = sum(entry.file_size for entry in entries)
            if total > size or len({entry.filename for entry in entries}) < len(entries):
                raise _excessive(path, f"its entries overlap: they claim {total} bytes, and the file has {size}")
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise _damaged(path, "it is a zip without a data.pkl")
            summed = any(entry.CRC for entry in entries)
            for entry in [] if summed else entries:  # torch.serialization.set_crc32_options(False) wrote zeros
                del entry.CRC
            _check_pickle(path, io.BytesIO(archive.read(pickles[0])))
            damaged = archive.testzip() if summed else None
    except (zipfile.BadZipFile, RuntimeError, OSError, EOFError, ValueError, struct.error) as error:
        if isinstance(error, StatedError):
            raise
        raise _damaged(path, error) from error
    if damaged is not None:
        raise _refused(
            f"{path} is damaged: the bytes of its entry {shown_name(damaged)} are not those whose checksum stands "
            "beside them. Copy or download it anew"
        )


def _check_pickles(path: Path) -> None:
    """Look through the pickles at the beginning of a file of the format before torch 1.6."""
    with _Bounded(path) as stream:
        for _ in range(5):  # a number, a version, the system, the object, the order of the values that follow
            if not _check_pickle(path, stream):
                return


# What a pickle may call, and what it may name beside that. torch.load refuses all else too; what it allows and these
# leave out makes objects of any size from a number.
_CALLED = re.compile(
    r"collections\.(OrderedDict|Counter)|argparse\.Namespace|builtins\.set|_codecs\.encode|torch\.(Size|device)"
    r"|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout"
    r"|torch\._tensor\._rebuild_from_type_v2|torch\._utils\._rebuild_\w+"
)
_NAMED = re.compile(r"torch\.((cuda\.|storage\.)?\w+Storage|(bool|b?float|u?int|complex|bits|qu?int|per_)\w*)")
_TAKES_TENSORS = re.compile(r"torch\.(nn|_tensor|_utils)\..*")


class _Value(NamedTuple):
    """What is known of a value on a pickle's stack without making it."""

    size: int = 1  # of a tuple: the values in it, and in the tuples in it
    name: str = ""  # of what is named by GLOBAL
    made: bool = False  # by a call, as tensors are, or a tuple that holds such


def _check_pickle(path: Path, stream: Any) -> bool:
    """Look through one pickle without opening it; return whether it is whole. torch.load names what is wrong where not.

    It is followed instruction by instruction as pickletools describes them, with sizes in place of values.

    Raises:
      StatedError: it would call what is no part of a checkpoint, is too long, or holds tuples within tuples that take
        longer to hash than anyone waits.
    """
    stack: list[_Value | None] = []  # None: a mark
    memo: dict[Any, _Value | None] = {}
    strings: list[str] = []  # the last ones, of which STACK_GLOBAL takes two
    start = stream.tell()
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
            if count > _MOST_OPCODES or (position or 0) - start > _MOST_BYTES:
                raise _excessive(path, f"its pickle has more than {_MOST_OPCODES} instructions or {_MOST_BYTES} bytes")
            if isinstance(argument, str):
                strings = [*strings[-1:], argument]
            if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
                words = strings if opcode.name == "STACK_GLOBAL" else str(argument).split(" ")
                name = ".".join(words)
                if opcode.name != "GLOBAL" or not (_CALLED.fullmatch(name) or _NAMED.fullmatch(name)):
                    raise _code_refused(path, name)
                stack.append(_Value(name=name))
                continue
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                memo[len(memo) if argument is None else argument] = stack[-1]
                continue
            popped = _pop(opcode, stack)
            if opcode.name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif opcode.name == "DUP":
                stack += [popped[-1]] * 2
            elif opcode.name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "BUILD"):
                _require_harmless(path, opcode.name, popped)
                stack.append(_Value(made=True))
            elif opcode.name.startswith("TUPLE"):
                values = [value for value in popped if value is not None]
                stack.append(_Value(1 + sum(value.size for value in values), made=any(v.made for v in values)))
                if sum(value.size for value in values) > _MOST_IN_TUPLE:
                    raise _excessive(path, f"it holds a tuple of more than {_MOST_IN_TUPLE} values")
            else:
                stack += [None if kind is pickletools.markobject else _Value() for kind in opcode.stack_after]
    except StatedError:
        raise
    except Exception:  # whatever pickletools makes of what is no pickle
        return False
    return True


def _pop(opcode: pickletools.OpcodeInfo, stack: list[_Value | None]) -> list[_Value | None]:
    """Take from the stack what an instruction takes, in order; a slice is what lies above the last mark."""
    before = opcode.stack_before
    popped: list[_Value | None] = []
    if pickletools.markobject in before:
        while (value := stack.pop()) is not None:
            popped.append(value)
        before = before[: before.index(pickletools.markobject)]
    popped += [stack.pop() for _ in before]
    return popped[::-1]


def _require_harmless(path: Path, opcode: str, popped: list[_Value | None]) -> None:
    """Refuse a call of what is not to be called, or of a plain type with a tensor, which may claim any length."""
    if opcode == "BUILD":
        return
    called, *arguments = popped
    name = called.name if called is not None else ""
    if not _CALLED.fullmatch(name):
        raise _code_refused(path, name or "a value that is called")
    if not _TAKES_TENSORS.fullmatch(name) and any(value is not None and value.made for value in arguments):
        raise _code_refused(path, f"{name} of a tensor")


def _code_refused(path: Path, name: str) -> StatedError:
    return _refused(
        f"{path} could run code when it is opened (it names {shown_name(name)}), and is not read. "
        "Where you trust it, open it with the program that made it and save its state_dict alone."
    )


def _kind_refused(path: Path, key: str, kind: str) -> StatedError:
    return StatedError(
        f"{path} holds {shown_name(key)} as {kind}, which is not read here: save it as float32, dense, on the CPU",
        field=key,
    )


def _require_few(path: Path, names: Iterable[str]) -> None:
    count = len(list(names))
    if count > _MOST_TENSORS:
        raise _excessive(path, f"it holds {count} tensors, and {_MOST_TENSORS} are the most")


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
