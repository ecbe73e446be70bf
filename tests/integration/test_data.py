"""`mae-jax prepare`, `inspect`, and pretraining on what they make, from the outside."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.data.photographs import photograph
from tests.processes import dies

from .conftest import ROOT, TINY, Run, Start
from .test_pretrain import rows

COLOUR = ["--model.image-size=16", "--model.patch-size=4", "--model.in-channels=3"]
COLOUR += ["--augment.mean", "0.5", "0.5", "0.5", "--augment.std", "0.5", "0.5", "0.5", "--batch-size=16"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for number in range(60):
        path = root / "train" / f"klasse {number % 3}" / f"фото {number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(60 + number, 90, number)).save(path)
    (root / "train/klasse 1/broken.jpg").write_text("not a picture")
    return root


@pytest.fixture(scope="module")
def records(run: Run, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "records"
    done = run("prepare", f"folder:{images}", folder, "--size=32", "--shard-images=25", "--workers=2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "left out: " in done.stdout
    assert "broken.jpg does not decode: not an image" in done.stdout
    assert f"60 images, shards: 3, broken and left out: 1; read them by --data records:{folder}" in done.stdout
    return folder


def test_inspect_folder_and_records(run: Run, images: Path, records: Path, tmp_path: Path) -> None:
    for data, broken in ((f"folder:{images}", 1), (f"records:{records}", 0)):
        done = run("inspect", data, f"--sheet={tmp_path}/sheet.png", "--samples=7", "--workers=0")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"{data}: {60 + broken} images" in done.stdout
        assert f"broken: {broken}" in done.stdout
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert sheet.width == 960


def test_damaged_records_fail_the_inspection(run: Run, records: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in records.iterdir():
        content = path.read_bytes()
        flipped = content[:5000] + bytes(value ^ 255 for value in content[5000:5100]) + content[5100:]
        (copy / path.name).write_bytes(flipped if "00001-of" in path.name else content)
    done = run("inspect", f"records:{copy}", f"--sheet={tmp_path}/sheet.png", "--workers=0")
    assert done.returncode == 1
    assert "images-00001-of-00003.array_record is not the file that was prepared" in done.stdout


def test_pretraining_with_crops_on_the_device_and_repeats(run: Run, records: Path, tmp_path: Path) -> None:
    views = ["--crops=device", "--canvas-size=24", "--repeats=2", "--workers=2"]
    base = ["pretrain", "digits", *TINY, *COLOUR, f"--data=records:{records}", *views, "--steps=3"]
    done = run(*base, f"--workdir={tmp_path}")
    assert (done.returncode, done.stderr) == (0, "")
    losses = [row["loss"] for row in rows(tmp_path)]
    assert len(set(losses)) == 3
    assert all(0 < loss < 2 for loss in losses)
    assert all(0 <= row["data_wait"] <= 1 for row in rows(tmp_path))


def test_prepare_killed_and_started_again(start: Start, run: Run, images: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    arguments = ["--size=64", "--shard-images=4"]
    assert run("prepare", f"folder:{images}", reference, *arguments, "--workers=0").returncode == 0
    folder = tmp_path / "killed"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {"TMPDIR": str(temporary)}
    process = start("prepare", f"folder:{images}", folder, *arguments, "--workers=1", environment=environment)
    end = time.monotonic() + 60
    while not list(folder.glob("*.array_record")):
        assert time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=180)
    assert not list(temporary.iterdir())
    done = run("prepare", f"folder:{images}", folder, *arguments, "--workers=1")
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in reference.iterdir()
    }


@pytest.mark.parametrize("how", ["ctrl-c", "a worker is killed"])
def test_prepare_stopped_leaves_no_process_behind(images: Path, tmp_path: Path, how: str) -> None:
    """In a process group of its own, as from a terminal."""
    program = (
        "import os, signal, sys, threading, time\n"
        "from pathlib import Path\n"
        "from tests.processes import children\n"
        "import mae_jax.cli.__main__ as cli\n"
        "def act():\n"
        "    while not list(Path(sys.argv[2]).glob('*record.json')): time.sleep(0.001)\n"
        "    print(*children(os.getpid()), flush=True)\n"
        "    if sys.argv[3] == 'ctrl-c': os.killpg(0, signal.SIGINT)\n"
        "    else: os.kill(children(os.getpid())[0], signal.SIGKILL)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "threading.Thread(target=act, daemon=True).start()\n"
        "sys.exit(cli.main(['prepare', sys.argv[1], sys.argv[2], '--workers=2', '--shard-images=16']))\n"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    many = tmp_path / "many"
    many.mkdir()
    for number in range(40):
        for path in images.rglob("фото*.jpg"):
            (many / f"{number} {path.name}").symlink_to(path)
    process = subprocess.Popen(
        # Ctrl-C may come while a file is opened, which Python then reports as not closed.
        [sys.executable, "-Werror", "-Wignore::ResourceWarning", script, f"folder:{many}", tmp_path / "records", how],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    out, err = process.communicate(timeout=180)
    assert "Traceback" not in err
    assert process.returncode == (130 if how == "ctrl-c" else 1)
    assert len(out.split()) == 2
    assert all(dies(int(pid)) for pid in out.split())
    if how != "ctrl-c":
        assert "a worker process was killed by SIGKILL" in err
        assert "--workers" in err
    assert not list((tmp_path / "records").glob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["prepare", "folder:/nowhere/at/all", "DEST"], 1, "/nowhere/at/all"),
        (["prepare", "digits", "DEST", "--size=0"], 2, "size 0"),
        (["prepare", "digits", "DEST", "--workers=-1"], 2, "workers -1 must not be negative"),
        (["prepare", "digits", "nosuch://bucket/x"], 1, "nosuch"),
        (["prepare", "tfds:imagenet2012", "DEST"], 1, "tfds build imagenet2012 --file_format=array_record"),
        (["inspect", "records:/nowhere"], 1, "/nowhere has no dataset.json"),
        (["inspect", "cloud"], 1, "tfds:NAME"),
        (["inspect", "digits", "--samples=-5"], 2, "samples -5 must not be negative"),
        (["inspect", "digits", "--sheet=sheet.xyz"], 1, "sheet sheet.xyz has no ending of a picture, such as .png"),
        (["inspect", "digits", "--sheet=DEST/sheet.png"], 1, "dest is no folder that can be written to"),
        (["pretrain", "digits", "--repeats=3"], 2, "batch_size 64 is not divisible by repeats 3"),
        (["pretrain", "digits", "--canvas-size=9"], 2, "canvas_size 9 is for crops"),
    ],
)
def test_bad_input_gets_a_sentence(
    run: Run, arguments: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    done = run(*[word.replace("DEST", str(tmp_path / "dest")) for word in arguments])
    assert done.returncode == code
    assert words in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "dest").exists()


def test_odd_files_and_long_ones_without_a_word(run: Run, tmp_path: Path) -> None:
    """Pillow warns of damaged metadata; JPEG does not hold more than 65,500 pixels a side."""
    folder = tmp_path / "odd"
    folder.mkdir()
    pixels = Image.fromarray(photograph(40, 60))
    pixels.save(folder / "exif.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff nothing")
    Image.new("L", (70_000, 9), 9).save(folder / "long.png")
    for workers in (0, 1):
        done = run("prepare", f"folder:{folder}", tmp_path / f"records {workers}", f"--workers={workers}")
        assert (done.returncode, done.stderr) == (0, "")
        assert "long.png does not decode: JPEG holds 65,500 pixels a side" in done.stdout
        assert "1 images, shards: 1, broken and left out: 1" in done.stdout
        done = run("inspect", f"folder:{folder}", f"--sheet={tmp_path}/sheet.png", f"--workers={workers}")
        assert (done.returncode, done.stderr) == (0, "")


def test_two_commands_do_not_write_to_one_folder(start: Start, run: Run, images: Path, tmp_path: Path) -> None:
    first = start("prepare", f"folder:{images}", tmp_path / "records", "--workers=0", "--shard-images=1")
    end = time.monotonic() + 60
    while not (tmp_path / "records/prepare.json").exists():
        assert time.monotonic() < end
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)
    try:
        done = run("prepare", f"folder:{images}", tmp_path / "records", "--workers=0", "--shard-images=1")
    finally:
        first.send_signal(signal.SIGCONT)
    assert done.returncode == 1
    assert "destination" in done.stderr
    assert f"process {first.pid} on" in done.stderr
    assert first.communicate(timeout=180)[1] == ""
    assert first.returncode == 0
