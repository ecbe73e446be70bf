"""A compiled program, read from XLA's text of it: each operation, where it comes from, and the bytes that it moves.

Loops and conditionals count as one operation, by what goes in and out; a training step has none, unless it
accumulates.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")

# They name memory, and touch none.
_FREE = frozenset({"parameter", "constant", "get-tuple-element", "tuple", "bitcast"})


class Operation(NamedTuple):
    """One step of the program, a fusion counted as one.

    kind: its name without a number, which for a fusion names what it does.
    place: where in the model it comes from, numbers of blocks left out; "" where XLA has not written it.
    moved: bytes of its operands and results, each once.
    flops: of the matrix products in it, two for each multiply-add; those of a library call are unknown, and left out.
    """

    kind: str
    place: str
    moved: int
    flops: int


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    rest: str  # what stands behind the operands


def place(op_name: str) -> str:
    """Return where in the model an `op_name` of XLA lies, without numbers of blocks or flax's compiled blocks."""
    return re.sub(r"\d+", "*", op_name.partition("/")[2].replace("jit(core_fn)/", ""))


def size_of(shape: str) -> int:
    """Return the bytes of an array or of a tuple of them, from its type as XLA writes it."""
    return sum(math.prod(_dimensions(dims)) * _bits(kind) // 8 for kind, dims in _ARRAY.findall(shape))


def _bits(kind: str) -> int:
    """Return the bits of a value from its type: bf16, f8e4m3fn, u32; a truth value takes a byte, a token none."""
    number = re.match(r"[a-z]+(\d+)", kind)
    return int(number[1]) if number else 8 * (kind == "pred")


def operations(program: str) -> Iterator[Operation]:
    """Yield the operations of the entry computation, in order."""
    computations = dict(_computations(program))
    shapes: dict[str, str] = {}
    for instruction in computations[""]:
        shapes[instruction.name] = instruction.shape
        if instruction.opcode in _FREE:
            continue
        origin = re.search(r'op_name="([^"]*)"', instruction.rest)
        yield Operation(
            re.sub(r"[.\d]+$", "", instruction.name),
            place(origin[1]) if origin else "",
            size_of(instruction.shape) + sum(size_of(shapes[name]) for name in set(instruction.operands)),
            _products(instruction, shapes, computations),
        )


def _computations(program: str) -> Iterator[tuple[str, list[_Instruction]]]:
    """Yield each computation's name, "" for the entry, and its instructions."""
    name: str | None = None
    found: list[_Instruction] = []
    for line in program.splitlines():
        if head := _COMPUTATION.match(line):
            name, found = "" if head[1] else head[2], []
        elif line.startswith("}") and name is not None:
            yield name, found
            name = None
        elif name is not None and (match := _INSTRUCTION.match(line)):
            operands, rest = _split(match[4])
            found.append(_Instruction(match[1], match[2], match[3], re.findall(r"%([\w.\-]+)", operands), rest))


def _split(text: str) -> tuple[str, str]:
    """Split a text at the bracket that closes: what lies before it, and behind it."""
    depth = 1
    for position, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return text[:position], text[position + 1 :]
    return text, ""


def _products(instruction: _Instruction, shapes: dict[str, str], computations: dict[str, list[_Instruction]]) -> int:
    """Count the FLOP of the matrix products in an instruction, and in what it calls."""
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        left = _sides(shapes[instruction.operands[0]])
        assert contracted is not None
        depth = math.prod(left[axis] for axis in _dimensions(contracted[1]))
        return 2 * depth * math.prod(_sides(instruction.shape))
    flops = 0
    for name in re.findall(r"calls=%?([\w.\-]+)", instruction.rest):
        inner: dict[str, str] = {}
        for called in computations.get(name, []):
            inner[called.name] = called.shape
            flops += _products(called, inner, computations)
    return flops


def _sides(shape: str) -> list[int]:
    array = _ARRAY.search(shape)
    assert array is not None
    return _dimensions(array[2])


def _dimensions(text: str) -> list[int]:
    return [int(side) for side in text.split(",") if side]
