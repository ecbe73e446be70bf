"""Files made to do harm: each is refused with its name, within two seconds and 500 MB, and none runs code.

A file with the same values as it was, beside each, is read: what is refused is the harm.
"""

import argparse
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mae_jax.models.patches import fixed_positions
from mae_jax.port.infer_config import Hints
from mae_jax.port.keys import to_fair
from mae_jax.port.read import read_weights
from mae_jax.port.tensors import read_file, write_safetensors, write_torch
from tests.refusals import refused

from .conftest import CLASSIFIERS, TINY, draw_params

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}


def rewritten(path, change):
    """Write a torch archive anew, its entries changed by a function of name and bytes to (bytes, compression)."""
    with zipfile.ZipFile(path) as archive:
        held = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in held.items():
            values, compression = change(name, content)
            archive.writestr(name, values, compression)
    return path


def archive_of(path, pickled):
    """A torch archive whose pickle is this."""
    torch.save({"model": {"a": torch.ones(2)}}, path)
    return rewritten(path, lambda name, content: (pickled if name.endswith("data.pkl") else content, 0))


def safetensors_of(path, header, values=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)
    return path


# --- altered bytes -----------------------------------------------------------------------------------------------


def test_an_altered_byte_is_noticed_by_the_checksum_of_its_entry(tmp_path):
    file = tmp_path / "f.pth"
    write_torch(file, TENSORS, None)
    content = bytearray(file.read_bytes())
    place = content.index(TENSORS["a"].tobytes())
    content[place + 8] ^= 1
    file.write_bytes(content)
    assert torch.load(file, weights_only=True)["a"][0, 2] != 2  # torch does not look
    with refused("source", "f.pth is damaged: the bytes of its entry f/data/0", "Copy or download it anew"):
        read_file(file)


def test_a_file_without_checksums_is_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(3.0)}, tmp_path / "f.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert read_file(tmp_path / "f.pth").tensors["a"].tolist() == [0, 1, 2]


# --- sizes -------------------------------------------------------------------------------------------------------


def inflating(path):
    torch.save({"model": {"a": torch.ones(2)}}, path)
    zeros, deflated, stored = b"\0" * (100 << 20), zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED
    return rewritten(path, lambda name, held: (zeros, deflated) if name.endswith("data/0") else (held, stored))


def lying_about_its_size(path):
    """The directory claims an entry of 3 GB, stored as it is."""
    torch.save({"model": {"a": torch.ones(2)}}, path)
    content = path.read_bytes()
    place = content.rindex(b"PK\1\2", 0, content.rindex(b"/data/0"))
    path.write_bytes(content[: place + 20] + struct.pack("<II", 3 << 30, 3 << 30) + content[place + 28 :])
    return path


def overlapping(path):
    """A thousand entries of the directory name the same bytes."""
    torch.save({"model": {"a": torch.ones(1 << 16)}}, path)
    with zipfile.ZipFile(path, "a") as archive:
        (entry,) = [entry for entry in archive.infolist() if entry.filename.endswith("data/0")]
        archive.filelist += [entry] * 1000
        archive._didModify = True
    return path


def a_directory_of_millions(path):
    """Its end claims a directory of 3 GB."""
    torch.save({"model": {"a": torch.ones(2)}}, path)
    content = path.read_bytes()
    place = content.rindex(b"PK\5\6")
    path.write_bytes(content[:place] + b"\0" * (6 << 20) + content[place : place + 12])
    with path.open("ab") as stream:
        stream.write(struct.pack("<II", 6 << 20, place) + content[place + 20 :])
    return path


def a_long_pickle(path):
    return archive_of(path, pickle.dumps({"model": [[]] * 400_000, "more": [[] for _ in range(400_000)]}, 2))


def a_large_pickle(path):
    return archive_of(path, pickle.dumps({"text": "x" * (5 << 20)}, 2))


def a_large_pickle_before_1_6(path):
    torch.save({"text": "x" * (5 << 20)}, path, _use_new_zipfile_serialization=False)
    return path


def tuples_in_tuples(path):
    """2^60 values to hash, of 180 bytes: each tuple holds the one before twice, and the last is a key."""
    deep = b"K\x01" + b"".join(b"q%c0h%ch%c\x86" % (i, i, i) for i in range(60)) + b"K\x01"
    return archive_of(path, b"\x80\x02}(" + deep + b"u.")


def a_call_that_claims_memory(path):
    return archive_of(path, b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.")


def a_storage_from_a_number(path):
    return archive_of(path, b"\x80\x02ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R.")


def a_set_of_a_tensor(path):
    torch.save({"model": {"a": torch.zeros(1).expand(10**9)}}, path)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    start = pickled.index(b"ctorch._utils")
    made = pickled[start : pickled.rindex(b"R") + 1]
    return archive_of(path, b"\x80\x02cbuiltins\nset\n" + made + b"\x85R.")


def a_view_of_a_thousand_billions(path):
    """One stored value, repeated by strides of zero."""
    torch.save({"model": {"pos_embed": torch.zeros(1).expand(1, 10**12, 48)}}, path)
    return path


def thousands_of_tensors(path):
    one = torch.zeros(1)
    torch.save({"model": {f"{'x' * 50}{i}": one for i in range(12_000)}}, path)
    return path


def a_header_of_gigabytes(path):
    path.write_bytes((5 << 30).to_bytes(8, "little") + b"{" + b" " * 100)
    return path


def a_header_of_megabytes(path):
    entries = {f"{i:06}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(60_000)}
    return safetensors_of(path, entries)


def many_empty_tensors(path):
    entries = {f"{i:06}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(30_000)}
    return safetensors_of(path, entries)


def shapes_beyond_their_bytes(path):
    entry = {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 4]}
    return safetensors_of(path, {"a": entry}, b"\0" * 4)


def negative_shapes(path):
    return safetensors_of(path, {"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, b"\0" * 4)


def a_nested_header(path):
    return safetensors_of(path, b'{"a":' + b"[" * 100_000)


def nested_metadata(path):
    return safetensors_of(path, {"__metadata__": {"mae_jax": '{"a":' + "[" * 100_000}})


def a_number_in_metadata(path):
    return safetensors_of(path, {"__metadata__": {"mae_jax": '{"encoder_heads": ' + "1" * 5000 + "}"}})


def negative_torch_shapes(path):
    torch.save({"model": {"a": torch.ones(2, 3)}}, path)
    return rewritten(path, lambda name, content: (content.replace(b"K\x02K\x03\x86", b"J\xff\xff\xff\xffK\x03\x86"), 0))


def a_storage_of_terabytes_before_1_6(path):
    torch.save({"model": {"a": torch.ones(77)}}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"KMN", b"\x8a\x06\0\0\0\0\0\x10N"))
    return path


HARM = (
    inflating,
    lying_about_its_size,
    overlapping,
    a_directory_of_millions,
    a_long_pickle,
    a_large_pickle,
    a_large_pickle_before_1_6,
    tuples_in_tuples,
    a_call_that_claims_memory,
    a_storage_from_a_number,
    a_set_of_a_tensor,
    a_view_of_a_thousand_billions,
    thousands_of_tensors,
    a_header_of_gigabytes,
    a_header_of_megabytes,
    many_empty_tensors,
    shapes_beyond_their_bytes,
    negative_shapes,
    a_nested_header,
    nested_metadata,
    a_number_in_metadata,
    negative_torch_shapes,
    a_storage_of_terabytes_before_1_6,
)
MEASURED = """
import resource, sys, time, torch
from pathlib import Path
from mae_jax.errors import StatedError
from mae_jax.port.read import read_file
for name in sys.argv[1:]:
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_file(Path(name))
        outcome = "READ"
    except StatedError as error:
        outcome = f"{error.field}: {error}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    print(f"{time.process_time() - began:.2f} {grown} {outcome}")
"""


def test_harm_is_refused_soon_and_in_little_memory(tmp_path):
    """All in one process, so that torch is imported once; its peak of memory only grows. Time is the processor's."""
    files = [make(tmp_path / f"{make.__name__}.pth") for make in HARM]
    command = [sys.executable, "-c", MEASURED, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(files)
    for file, line in zip(files, lines, strict=True):
        seconds, megabytes, sentence = line.split(" ", 2)
        assert sentence.startswith(f"source: {file}"), line
        assert len(sentence) < 1000, line
        assert float(seconds) < 2, line
        assert int(megabytes) < 500, line


# --- what stands beside the tensors ------------------------------------------------------------------------------


def shared_list(depth):
    """A list whose text has 2^depth values."""
    values = [0.5]
    for _ in range(depth):
        values = [values, values, values]
    return values


ARGUMENTS = {
    "image_std": shared_list(50),
    "image_size": shared_list(50),
    "encoder_heads": 10**3000,
    "mask_ratio": 10**4000,
    "norm_pix_loss": shared_list(50),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_any_size_are_shown_cut(tmp_path, name):
    tensors = {key: torch.from_numpy(np.array(values)) for key, values in to_fair(draw_params(TINY), TINY).items()}
    if name == "encoder_heads" or name == "mask_ratio":  # safetensors holds numbers that torch's pickles do not
        values = {key: values.numpy() for key, values in tensors.items()}
        write_safetensors(tmp_path / "f.pth", values, {name: ARGUMENTS[name]})
    else:
        given = {"image_mean": [0.5] * 3, name: ARGUMENTS[name]}
        torch.save({"model": tensors, "args": argparse.Namespace(**given)}, tmp_path / "f.pth")
    with refused(name) as caught:
        read_weights(tmp_path / "f.pth", Hints(3, 4))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "1" * 5000 + "}", " " * (5 << 20)])
def test_json_of_any_kind_is_refused_by_its_name(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    if "index" not in name:
        write_torch(tmp_path / "pytorch_model.bin", TENSORS, None)
    with refused(name) as caught:
        read_weights(tmp_path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("place", ["../f.bin", "..", "", "a/f.bin", "f\0.bin", 3, ["f.bin"], None])
def test_an_index_names_files_beside_it(tmp_path, place):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    with refused("weight_map"):
        read_weights(tmp_path)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    with refused("source", "pipe.pth is no file"):
        read_file(tmp_path / "pipe.pth")
    (tmp_path / "zero.pth").symlink_to("/dev/zero")
    with refused("source"):
        read_file(tmp_path / "zero.pth")
    (tmp_path / "hf").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "hf" / name).symlink_to("/dev/zero")
    with refused("source", "holds no weights"):
        read_weights(tmp_path / "hf")


def test_links_to_files_are_followed(tmp_path):
    """The hub's cache consists of them."""
    write_torch(tmp_path / "blob", TENSORS, None)
    (tmp_path / "f.pth").symlink_to("blob")
    assert read_file(tmp_path / "f.pth").tensors.keys() == TENSORS.keys()


# --- shapes and names --------------------------------------------------------------------------------------------


def test_many_unknown_names_are_listed_cut(tmp_path):
    """For each a like one would be looked for among all; each may be long, and move the cursor."""
    tensors = to_fair(draw_params(TINY), TINY)
    names = [f"blocks.0.attn.qky{i:05}.weight" for i in range(6000)] + ["\x1b[2J", "x" * 100_000]
    write_torch(tmp_path / "f.pth", tensors | {name: TENSORS["b"] for name in names}, None)
    with refused("source", "is unknown (nearest:", "more") as caught:
        read_weights(tmp_path / "f.pth", Hints(3, 4))
    assert len(str(caught.value)) < 10_000
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("held", [True, False])
def test_a_table_that_no_tensor_holds_is_not_computed(tmp_path, held):
    """90,000 positions in a decoder 200,000 wide would be 144 GB, of a file of 60 MB."""
    tensors = to_fair(draw_params(TINY), TINY)
    tensors["pos_embed"] = np.float32(fixed_positions("sincos2d", 48, (300, 300), True))[None]
    tensors["decoder_embed.weight"] = np.zeros((200_000, 48), np.float32)
    if not held:
        del tensors["decoder_pos_embed"]
    write_safetensors(tmp_path / "f.safetensors", tensors, {})
    with refused("source", "decoder_embed.bias has shape (32,), not (200000,)"):
        read_weights(tmp_path / "f.safetensors", Hints(3, 4))


def test_parts_of_a_probe_that_do_not_fit_are_not_multiplied(tmp_path):
    tensors = to_fair(draw_params(CLASSIFIERS["class"]), CLASSIFIERS["class"])
    bias = tensors.pop("head.bias")
    head = {"head.1.weight": np.zeros((100_000, 1), np.float32), "head.1.bias": bias}
    head |= {name: np.zeros(100_000, np.float32) for name in ("head.0.running_mean", "head.0.running_var")}
    del tensors["head.weight"]
    write_safetensors(tmp_path / "f.safetensors", tensors | head, {})
    with refused("head.0.running_mean", "has shape (100000,), head.1.weight (100000, 1)"):
        read_weights(tmp_path / "f.safetensors", Hints(3))
