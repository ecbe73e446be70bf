"""`mae-jax port` from the outside, with what is installed as it is: nothing helps torchvision to load."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

import mae_jax
from mae_jax.config import ModelConfig, TransformerConfig

from ..port.conftest import TINY as MODEL
from ..port.conftest import draw_params
from .conftest import ROOT, TINY, Run

GOLDEN = ROOT / "tests" / "golden" / "fair_tiny" / "checkpoint.pth"


def test_a_run_goes_to_hugging_face_and_back(run: Run, trained: Path, tmp_path: Path) -> None:
    done = run("port", trained, tmp_path / "hf", "--to=huggingface")
    assert (done.returncode, done.stderr) == (0, "")
    assert "verified against transformers" in done.stdout
    for name in ("latent", "pred", "loss"):
        assert any(line.startswith(name) and line.endswith("ok") for line in done.stdout.splitlines())
    held = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert (held["image_mean"], held["image_std"], held["size"]) == ([0.305], [0.376], {"height": 8, "width": 8})
    back = run("port", tmp_path / "hf", tmp_path / "back", "--to=jax")
    assert (back.returncode, back.stderr) == (0, "")
    # A checkpoint like any other: the same picture comes from both.
    Image.new("L", (8, 8), 99).save(tmp_path / "grey.png")
    for name, source in {"a": trained, "b": tmp_path / "back"}.items():
        drawn = run("reconstruct", source, tmp_path / "grey.png", f"--out={tmp_path / name}.bmp")
        assert drawn.returncode == 0, drawn.stderr
    a, b = (np.asarray(Image.open(tmp_path / f"{name}.bmp"))[60:] for name in "ab")
    np.testing.assert_array_equal(a, b)
    scored = run("knn", tmp_path / "back")
    assert scored.returncode == 0, scored.stderr


def test_training_starts_from_a_port(run: Run, trained: Path, tmp_path: Path) -> None:
    done = run("port", trained, tmp_path / "f.pth", "--to=fair", "--no-verify")
    assert done.returncode == 0, done.stderr
    assert "verified" not in done.stdout
    continued = run("pretrain", "digits", *TINY, "--steps=2", f"--init={tmp_path}/f.pth", f"--workdir={tmp_path}/run")
    assert continued.returncode == 0, continued.stderr
    assert f"starting from the encoder and the decoder of {tmp_path}/f.pth" in continued.stdout
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    fresh = json.loads((trained / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert first < 0.9 * fresh
    other = run("pretrain", "digits", *TINY, "--init=/nowhere", "--steps=2", f"--workdir={tmp_path}/other")
    assert other.returncode == 1
    assert "/nowhere does not exist" in other.stderr
    deep = ("--model.encoder.depth=3", f"--init={tmp_path}/f.pth", f"--workdir={tmp_path}/deep")
    deeper = run("pretrain", "digits", *TINY, *deep)
    assert deeper.returncode == 1
    assert "has another encoder than this run" in deeper.stderr


@pytest.mark.extended
def test_to_every_format(run: Run, tmp_path: Path) -> None:
    """The authors' checkpoint, verified by what there is."""
    heads = ("--encoder-heads=3", "--decoder-heads=4")
    for to in ("fair", "timm", "huggingface", "lightly", "lightly-deprecated", "jax"):
        done = run("port", GOLDEN, tmp_path / to, f"--to={to}", *heads)
        assert (done.returncode, done.stderr) == (0, ""), to
        assert f"wrote {tmp_path / to}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["/nowhere", "OUT", "--to=fair"], 1, "/nowhere does not exist"),
        ([GOLDEN, "OUT", "--to=fair"], 1, "give --encoder-heads (width 48) and --decoder-heads (width 32)"),
        ([GOLDEN, "OUT", "--to=pytorch"], 2, "invalid choice"),
        ([GOLDEN, "OUT"], 2, "--to"),
        ([GOLDEN, "OUT.safetensors", "--to=fair"], 1, "fair cannot be a .safetensors file"),
        ([GOLDEN, "OUT", "--to=jax", "--dtype=float16"], 1, "dtype float16"),
        (["hf:nothing", "OUT", "--to=fair"], 1, "hf:nothing is not hf:OWNER/NAME"),
        ([ROOT / "tests", "OUT", "--to=fair"], 1, "holds no weights"),
    ],
)
def test_bad_input_gets_a_sentence(run: Run, tmp_path: Path, arguments: list[object], code: int, words: str) -> None:
    done = run("port", *(str(word).replace("OUT", f"{tmp_path}/out") for word in arguments))
    assert done.returncode == code
    assert words in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_existing_destination_is_kept(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out.pth").write_text("mine")
    arguments = ("port", GOLDEN, tmp_path / "out.pth", "--to=fair", "--encoder-heads=3", "--decoder-heads=4")
    refused = run(*arguments)
    assert refused.returncode == 1
    assert "out.pth exists; --force replaces it" in refused.stderr
    assert (tmp_path / "out.pth").read_text() == "mine"
    assert run(*arguments, "--force", "--no-verify").returncode == 0
    assert mae_jax.load_torch(tmp_path / "out.pth")[0].encoder.heads == 3


def test_a_difference_leaves_nothing(tmp_path: Path) -> None:
    """One of the library's numbers is moved aside; of all of a bias nothing would be seen behind a LayerNorm."""
    code = (
        "import sys; from mae_jax.cli import __main__ as cli; from mae_jax.port import verify as receivers\n"
        "reference = receivers.reference\n"
        "def planted(*args):\n"
        "    receiver = reference(*args)\n"
        "    receiver.module.blocks[1].mlp.fc2.bias.data[0] += 1e-3\n"
        "    return receiver\n"
        "receivers.reference = planted\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    arguments = ["port", str(GOLDEN), str(tmp_path / "out.pth"), "--to=fair", "--encoder-heads=3", "--decoder-heads=4"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "DIFFERS" in done.stdout
    assert "beyond the bound 5e-06. Nothing is left at" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interruption_leaves_nothing_half_written(tmp_path: Path, number: signal.Signals) -> None:
    """Stopped while it writes and verifies; after SIGKILL only a hidden folder stays beside."""
    config = replace(MODEL, encoder=TransformerConfig(width=384, depth=12, heads=6))
    mae_jax.save_torch(draw_params(config), config, tmp_path / "in.pth", layout="fair")
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from mae_jax.cli.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    folder = tmp_path / "there"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "port", str(tmp_path / "in.pth"), str(folder / "out"), "--to=huggingface"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(folder.glob(".out.*/out/*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=180)
    assert not (folder / "out").exists()
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert list(folder.iterdir()) == []
    else:
        assert [path.name.startswith(".out.") for path in folder.iterdir()] == [True]


def test_smaller_files_state_their_bound(run: Run, tmp_path: Path) -> None:
    for dtype, bound in {"float16": "1.0e-02", "bfloat16": "8.0e-02"}.items():
        heads = ("--encoder-heads=3", "--decoder-heads=4")
        done = run("port", GOLDEN, tmp_path / dtype, "--to=huggingface", f"--dtype={dtype}", *heads)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count(bound) == 3
        kept = (tmp_path / dtype / "model.safetensors").read_bytes()[:20000]
        assert {"float16": b'"F16"', "bfloat16": b'"BF16"'}[dtype] in kept


def test_a_malicious_file_does_not_run(run: Run, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/made",)

    torch.save({"model": {"a": torch.zeros(1)}, "args": Runs()}, tmp_path / "evil.pth")
    done = run("port", tmp_path / "evil.pth", tmp_path / "out", "--to=fair")
    assert done.returncode == 1
    assert "could run code when it is opened (it names posix.system), and is not read" in done.stderr
    assert not (tmp_path / "made").exists()


def test_the_hub_without_a_network(tmp_path: Path) -> None:
    """The library's own switch, which makes it find nothing."""
    command = [
        sys.executable,
        "-m",
        "mae_jax.cli.__main__",
        "port",
        "hf:facebook/vit-mae-base",
        str(tmp_path / "out"),
        "--to=fair",
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 1
    assert "Download config.json and model.safetensors" in done.stderr
    assert "https://huggingface.co/facebook/vit-mae-base into a folder" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_encoder_alone(run: Run, tmp_path: Path) -> None:
    """As `mae_pretrain_*` hold it: its decoder is asked for in vain, and it is no picture's source."""
    config: ModelConfig = MODEL
    mae_jax.save_torch(draw_params(config), config, tmp_path / "enc.pth", layout="fair", part="encoder")
    refused = run("port", tmp_path / "enc.pth", tmp_path / "out", "--to=lightly", "--part=all")
    assert refused.returncode == 1
    assert "has no decoder: --part encoder" in refused.stderr
    done = run("port", tmp_path / "enc.pth", tmp_path / "out", "--to=jax")
    assert (done.returncode, done.stderr) == (0, "")
    drawn = run("reconstruct", tmp_path / "out", f"--out={tmp_path}/no.png")
    assert drawn.returncode == 1
    assert "holds an encoder alone" in drawn.stderr


def test_a_run_in_float64(run: Run, tmp_path: Path) -> None:
    done = run("pretrain", "digits", *TINY, "--steps=1", "--precision=float64", f"--workdir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    for to in ("huggingface", "jax"):
        done = run("port", tmp_path / "run", tmp_path / to, f"--to={to}")
        assert (done.returncode, done.stderr) == (0, "")
