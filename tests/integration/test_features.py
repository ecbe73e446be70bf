"""`mae-jax features` and what `mae-jax knn` makes of it, from the outside."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_jax.cli.__main__ import main
from mae_jax.data.sources.source import open_source
from mae_jax.evaluation.features import source_features
from mae_jax.storage.loading import load_params

from .conftest import ROOT, Run

GOLDEN = ROOT / "tests" / "golden" / "fair_tiny" / "checkpoint.pth"


def test_features_of_a_run(run: Run, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npz"
    done = run("features", trained, "digits", f"--out={out}", "--block=-2", "--pooling=class", devices=2)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"wrote {out}: 1,797 images x 32\n"
    config, params, _ = load_params(trained)
    source = open_source("digits", 1)
    expected = source_features(params, source, config.model, config.augment, "class", block=0)
    with np.load(out) as stored:
        of = json.loads(str(stored["of"]))
        np.testing.assert_allclose(stored["features"], expected.values, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(stored["labels"], expected.labels)
        assert stored["class_names"].tolist() == list(source.class_names)
        assert stored["names"][[0, -1]].tolist() == ["digits[0]", "digits[1796]"]
    assert of == {
        "source": str(trained / "checkpoints" / "12"),
        "step": 12,
        "pooling": "class",
        "block": 0,
        "data": "digits",
        "split": "train",
    }


def test_neighbours_of_features_are_those_of_the_run(run: Run, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npz"
    assert run("features", trained, "digits", f"--out={out}").returncode == 0
    files = run("knn", out, "--k=200")
    assert (files.returncode, files.stderr) == (0, "")
    begin, end = files.stdout.strip().rsplit(" ", 1)
    assert begin == "200-NN accuracy, each of 1,797 images by the others:"
    assert run("knn", trained, "--k=200").stdout.startswith(f"{begin} {end} at step 12, ")
    among = run("knn", out, f"--queries={out}", "--k=1", "--temperature=None")
    assert among.stdout == f"1-NN accuracy, 1,797 images of {out} among 1,797: 100.00%\n"


def test_a_pytorch_checkpoint(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    random = np.random.default_rng(0)
    for number in range(12):
        file = tmp_path / "images" / f"class {number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 100 + 155 * (number % 2), (40, 33, 3), np.uint8)).save(file)
    (tmp_path / "images" / "class 1" / "broken.png").write_bytes(b"not a picture")
    data = f"folder:{tmp_path}/images"
    done = run("features", GOLDEN, data, f"--out={tmp_path}/x.npz", "--encoder-heads=3")
    assert (done.returncode, done.stderr) == (0, "")
    assert "note: left out: " in done.stdout
    assert f"left out: {tmp_path}/images/class 1/broken.png does not decode" in done.stdout
    assert "12 images x 48; 1 do not decode and are left out" in done.stdout
    scored = run("knn", GOLDEN, f"--data={data}", "--encoder-heads=3", "--k=3")
    assert (scored.returncode, scored.stderr) == (0, "")
    assert "\n3-NN accuracy, each of 12 images by the others: " in scored.stdout
    assert "% with random weights. Left out: 1 do not decode" in scored.stdout


def test_bad_input_gets_a_sentence(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    run, out, bank = str(trained), f"--out={tmp_path}/x.npz", f"{tmp_path}/x.npz"
    for arguments, words in (
        (("features", run, "digits", f"--out={tmp_path}/x.txt"), "x.txt does not end in .npz"),
        (("features", run, "digits", out, "--block", "-3"), "block -3 is not in -2 .. 1: the encoder has 2 blocks"),
        (("features", run, "digits", out, "--split=val"), "digits has no split 'val'"),
        (("features", "/nowhere", "digits", out), "/nowhere does not exist"),
        (("features", str(GOLDEN), "digits", out), "encoder_heads"),
        (("knn", str(GOLDEN), "--encoder-heads=3"), "give --data"),
        (("knn", run, "--queries=x.npz"), "is to be looked up in a file of features"),
        (("knn", bank, "--data=digits"), "data digits is for an encoder"),
        (("knn", bank), "x.npz cannot be read: No such file or directory"),
    ):
        assert main(arguments) == 1
        assert words in capsys.readouterr().err
    assert main(("features", run, "digits", out, "--batch-size=0")) == 2
    assert list(tmp_path.iterdir()) == []
