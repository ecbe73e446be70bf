"""What a PyTorch file holds, looked at before torch opens it.

Files come from strangers. None is allowed to run code, and no size that one claims is believed. torch.load with
`weights_only` runs none; what it leaves open is looked at here, in the order in which a file could do harm:

1. A zip's directory: entries that would be inflated, or that claim more bytes than the file has.
2. Its pickle, instruction by instruction, without making a value of it: what it would call, how long it is, and tuples
   within tuples, which take any time to hash.
3. Every entry's bytes by the CRC-32 beside them, which torch.save writes and torch.load does not look at.
"""

import io
import pickletools
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from mae_jax.errors import StatedError, shown_name

# What a file may hold beside its values. ViT-H with its optimizer has 0.3 MiB, 60,000 instructions, 2,300 tensors.
MOST_BYTES = 4 << 20  # of a pickle, a zip's directory or a safetensors header
_MOST_OPCODES = 300_000  # of a pickle
_MOST_IN_TUPLE = 1000  # values, those in tuples within it included: all are hashed where it is a key


def refused(message: str) -> StatedError:
    """Return the error of a source that is not read."""
    return StatedError(message, field="source")


def damaged(path: Path, reason: object) -> StatedError:
    """Return the error of a file that is not as it was written."""
    first = str(reason).splitlines()[0][:200] if str(reason) else type(reason).__name__
    return refused(f"{path} is damaged, cut short or not a PyTorch checkpoint: {first}")


def excessive(path: Path, what: str) -> StatedError:
    """Return the error of a file that claims more than a checkpoint has."""
    return refused(f"{path} is not read: {what}. Save the model's state_dict alone, with torch.save or safetensors")


# --- the zip ----------------------------------------------------------------------------------------------------------


class _Bounded(io.BufferedReader):
    """A file of which no more than `MOST_BYTES` are read at once, whatever lengths it claims."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._path, self._size = path, path.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = self._size - self.tell()
        if (left if size is None or size < 0 else min(size, left)) > MOST_BYTES:
            raise excessive(self._path, f"a part of it claims more than {MOST_BYTES} bytes beside its values")
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        return super().readline(MOST_BYTES)


def check_archive(path: Path, size: int) -> None:
    """Refuse a zip that is no archive of torch.save: sizes first, then its pickle, then the bytes by their CRC-32.

    torch.save stores values as they are, so that nothing has to be inflated.
    """
    try:
        with _Bounded(path) as stream, zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                    what = f"its entry {shown_name(entry.filename)} is compressed, and inflates to {entry.file_size}"
                    raise excessive(path, f"{what} bytes")
            total = sum(entry.file_size for entry in entries)
            if total > size or len({entry.filename for entry in entries}) < len(entries):
                raise excessive(path, f"its entries overlap: they claim {total} bytes, and the file has {size}")
            pickles = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise damaged(path, "it is a zip without a data.pkl")
            summed = any(entry.CRC for entry in entries)
            for entry in [] if summed else entries:  # torch.serialization.set_crc32_options(False) wrote zeros
                del entry.CRC
            _check_pickle(path, io.BytesIO(archive.read(pickles[0])))
            altered = archive.testzip() if summed else None
    except (zipfile.BadZipFile, RuntimeError, OSError, EOFError, ValueError, struct.error) as error:
        if isinstance(error, StatedError):
            raise
        raise damaged(path, error) from error
    if altered is not None:
        raise refused(
            f"{path} is damaged: the bytes of its entry {shown_name(altered)} are not those whose checksum stands "
            "beside them. Copy or download it anew"
        )


# --- its pickle -------------------------------------------------------------------------------------------------------


def check_pickles(path: Path) -> None:
    """Look through the pickles at the beginning of a file of the format before torch 1.6."""
    with _Bounded(path) as stream:
        for _ in range(5):  # a number, a version, the system, the object, the order of the values that follow
            if not _check_pickle(path, stream):
                return


# What a pickle may call, and what it may name beside that. torch.load refuses all else too; what it allows and these
# leave out makes objects of any size from a number.
_CALLED = re.compile(
    r"collections\.(OrderedDict|Counter)|argparse\.Namespace|builtins\.(set|complex)|_codecs\.encode|torch\.(Size|device)"
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
            if count > _MOST_OPCODES or (position or 0) - start > MOST_BYTES:
                raise excessive(path, f"its pickle has more than {_MOST_OPCODES} instructions or {MOST_BYTES} bytes")
            if isinstance(argument, str):
                strings = [*strings[-1:], argument]
            if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
                words = strings if opcode.name == "STACK_GLOBAL" else str(argument).split(" ")
                name = ".".join(words).replace("__builtin__.", "builtins.")  # as Python 2 called it
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
                    raise excessive(path, f"it holds a tuple of more than {_MOST_IN_TUPLE} values")
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
    return refused(
        f"{path} could run code when it is opened (it names {shown_name(name)}), and is not read. "
        "Where you trust it, open it with the program that made it and save its state_dict alone."
    )
