"""Files: none runs code, a damaged one gets a sentence, and a destination holds a whole one or what it held."""

import argparse
import json
import os
import pickle
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mae_jax.port.tensors import read_file, write_safetensors, write_torch
from mae_jax.port.write import beside
from tests.disk import REPLACED, recorded
from tests.refusals import refused

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}


class Runs:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("kind", ["zip", "before 1.6", "plain pickle"])
def test_code_is_not_run(tmp_path, kind):
    file, made = tmp_path / "evil.pth", tmp_path / "made"
    held = {"model": {"a": torch.zeros(1)}, "args": Runs(made)}
    if kind == "plain pickle":
        file.write_bytes(pickle.dumps(held["args"]))
    else:
        torch.save(held, file, _use_new_zipfile_serialization=kind == "zip")
    with refused("source", "could run code when it is opened (it names posix.system), and is not read"):
        read_file(file)
    assert not made.exists()
    pickle.loads(pickle.dumps(Runs(made)))  # it would have
    assert made.exists()


def test_arguments_in_a_namespace_are_read(tmp_path):
    held = {
        "model": {"a": torch.ones(2)},
        "optimizer": {"state": {}},
        "epoch": 3,
        "args": argparse.Namespace(mask_ratio=0.6),
    }
    torch.save(held, tmp_path / "fair.pth")
    contents = read_file(tmp_path / "fair.pth")
    assert contents.arguments == {"mask_ratio": 0.6}
    assert contents.left == ("optimizer", "epoch")
    assert contents.tensors["a"].tolist() == [1, 1]


@pytest.mark.parametrize("old", [False, True])
def test_what_training_scripts_keep_beside_weights_is_no_obstacle(tmp_path, old):
    """All of it is what torch.load with weights_only takes."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(module.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    held = {
        "state_dict": module.state_dict(),
        "parameters": dict(module.named_parameters()),
        "optimizer": optimizer.state_dict(),
        "lr_schedulers": [schedule.state_dict()],
        "random": torch.get_rng_state(),
        "hyper_parameters": {"betas": (0.9, 0.95), "dtype": torch.bfloat16, "device": torch.device("cpu"), "size": 3j},
        "names": {"a", "b"},
        "key": b"abc",
        "shape": torch.Size([1, 2]),
        ("a", ("b", 1)): None,
        "sparse": torch.eye(2).to_sparse(),
        "history": [float(i) for i in range(10_000)],
    }
    torch.save(held, tmp_path / "f.ckpt", _use_new_zipfile_serialization=not old)
    contents = read_file(tmp_path / "f.ckpt")
    assert contents.tensors.keys() == module.state_dict().keys()
    assert len(contents.left) == len(held) - 1


@pytest.mark.parametrize("key", ["model", "state_dict", None])
@pytest.mark.parametrize("old", [False, True])
def test_weights_are_found_where_checkpoints_keep_them(tmp_path, key, old):
    state = {"a": torch.ones(2), "note": "text"}
    torch.save(state if key is None else {key: state}, tmp_path / "f.pt", _use_new_zipfile_serialization=not old)
    assert read_file(tmp_path / "f.pt").tensors.keys() == {"a"}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_dtype_there_and_back(tmp_path, dtype, suffix):
    file, tensors = tmp_path / f"f{suffix}", {key: values.astype(dtype).T for key, values in TENSORS.items()}
    if suffix == ".pth":
        write_torch(file, tensors, {"encoder_heads": 3})
    else:
        write_safetensors(file, tensors, {"encoder_heads": 3})
    contents = read_file(file)
    assert contents.arguments == {"encoder_heads": 3}
    for key, values in tensors.items():
        assert contents.tensors[key].dtype == dtype
        np.testing.assert_array_equal(contents.tensors[key], values)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (torch.zeros(2, dtype=torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.ones(2, 2).to_sparse(), "sparse_coo"),
        (torch.zeros(2, device="meta"), "a tensor of device meta"),
    ],
)
def test_a_tensor_that_is_no_plain_array_is_named(tmp_path, values, kind):
    torch.save({"a": torch.ones(2), "odd": values}, tmp_path / "f.pth")
    with refused("odd", f"f.pth holds odd as {kind}, which is not read here"):
        read_file(tmp_path / "f.pth")


def test_safetensors_of_eight_bits_are_named(tmp_path):
    header = {"odd": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}
    text = json.dumps(header).encode()
    (tmp_path / "f.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0")
    with refused("odd", "f.safetensors holds odd as F8_E4M3, which is not read here"):
        read_file(tmp_path / "f.safetensors")


def cut(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def faulty(folder, name):
    """A file that is no checkpoint in this way."""
    file = folder / "file"
    if name == "empty":
        file.touch()
    elif name == "text":
        file.write_text("hello there, I am a text")
    elif name == "another zip":
        with file.open("wb") as stream:
            np.savez(stream, a=np.zeros(3))
    elif name == "one tensor":
        torch.save(torch.zeros(3), file)
    elif name == "no tensors":
        torch.save({"epoch": 3}, file)
    elif name == "cut torch":
        write_torch(file, TENSORS, None)
        cut(file)
    elif name == "cut safetensors":
        write_safetensors(file, TENSORS, {})
        cut(file)
    elif name == "cut torch before 1.6":
        torch.save({"a": torch.ones(1000)}, file, _use_new_zipfile_serialization=False)
        cut(file)
    elif name == "a folder":
        file.mkdir()
    return file


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty", "is empty"),
        ("text", "is not a checkpoint: it begins neither"),
        ("another zip", "is damaged, cut short or not a PyTorch checkpoint"),
        ("one tensor", "holds Tensor, not a dictionary of tensors"),
        ("no tensors", "holds no tensors (its keys: epoch)"),
        ("cut torch", "is damaged, cut short"),
        ("cut torch before 1.6", "is damaged, cut short"),
        ("cut safetensors", "is damaged or cut short"),
        ("not there", "cannot be read: No such file"),
        ("a folder", "cannot be read: Is a directory"),
    ],
)
def test_what_is_no_checkpoint_gets_a_sentence(tmp_path, name, words):
    file = faulty(tmp_path, name)
    with refused("source", str(file), words):
        read_file(file)


def test_a_destination_is_whole_or_as_it_was(tmp_path):
    file = tmp_path / "deep" / "f.pth"
    with pytest.raises(ZeroDivisionError), beside(file, force=False) as fresh:
        (fresh.write_text("half"), 1 // 0)
    assert list((tmp_path / "deep").iterdir()) == []
    with beside(file, force=False) as fresh:
        fresh.write_text("whole")
        assert not file.exists()
    assert file.read_text() == "whole"
    with refused("destination", "exists; --force replaces it"), beside(file, force=False):
        pass
    with pytest.raises(ZeroDivisionError), beside(file, force=True) as fresh:
        (fresh.write_text("half"), 1 // 0)
    assert file.read_text() == "whole"
    with beside(file, force=True) as fresh:
        fresh.write_text("new")
    assert file.read_text() == "new"
    assert [path.name for path in file.parent.iterdir()] == ["f.pth"]


def test_a_destination_is_on_the_disk_before_what_it_replaces_is_removed(tmp_path, monkeypatch):
    file, folder = tmp_path / "f.pth", tmp_path / "model"
    order = recorded(monkeypatch)
    with beside(file, force=False) as fresh:
        fresh.write_text("whole")
    assert order == [str(fresh), str(fresh.parent), REPLACED, str(tmp_path)]
    folder.mkdir()
    monkeypatch.setattr("shutil.rmtree", lambda path, **how: order.append("removed"))
    order.clear()
    with beside(folder, force=True) as fresh:
        fresh.mkdir()
        (fresh / "config.json").write_text("{}")
    written = [str(fresh / "config.json"), str(fresh), str(fresh.parent)]
    assert order == [*written, REPLACED, REPLACED, str(tmp_path), "removed"]


def test_only_a_ported_folder_is_replaced(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with beside(folder, force=True) as fresh:
        fresh.mkdir()
        (fresh / "model.safetensors").touch()
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    (folder / "thesis.tex").touch()
    with refused("destination", "holds other things than a ported model (thesis.tex)"), beside(folder, force=True):
        pass
    assert (folder / "thesis.tex").exists()


def test_safetensors_are_written_without_torch(tmp_path):
    code = (
        "import sys, numpy as np; from pathlib import Path; from mae_jax.port.tensors import write_safetensors\n"
        f"write_safetensors(Path({str(tmp_path / 'f.safetensors')!r}), {{'a': np.ones(2, np.float32)}}, {{}})\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert read_file(tmp_path / "f.safetensors").tensors["a"].tolist() == [1, 1]


@pytest.mark.parametrize("force", [False, True])
def test_what_came_to_the_destination_in_the_meantime_stays(tmp_path, force):
    folder = tmp_path / "model"

    def write():
        with beside(folder, force) as fresh:
            fresh.mkdir()
            folder.mkdir()
            (folder / "thesis.tex").write_text("mine")

    with refused("destination"):
        write()
    assert (folder / "thesis.tex").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("content", [b"\x80\x02garbage", b"\x80\x04\x95"])
def test_damage_is_not_called_malice(tmp_path, content):
    (tmp_path / "f.pth").write_bytes(content)
    with refused("source", "is damaged, cut short or not a PyTorch checkpoint"):
        read_file(tmp_path / "f.pth")
