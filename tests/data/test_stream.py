"""The training stream: which image at which position, whoever reads it and from wherever it starts."""

import hashlib
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mae_jax.config import AugmentConfig, ModelConfig, PretrainConfig
from mae_jax.data import loader
from mae_jax.data.images.decode import BrokenImage, Decoded, to_array
from mae_jax.data.loader import join, part_size
from mae_jax.data.sources.source import Source, open_source
from mae_jax.data.stream import Order, TrainingBatch, augment, training_batches
from mae_jax.errors import StatedError
from mae_jax.rng import host_generator
from mae_jax.runs.loop import BrokenFiles
from mae_jax.train.crops import crop_images
from tests.refusals import refused

ROOT = Path(__file__).parents[2]
CONFIG = PretrainConfig(model=ModelConfig(image_size=(16, 24), patch_size=8), batch_size=8, seed=5, workers=0)


class Numbered:
    """`count` images in memory; image i is filled with i, and those in `broken` do not decode."""

    in_memory = True
    class_names = ()

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"number {index}"

    def label(self, index: int) -> int:
        return 1000 + index

    def load(self, index: int) -> Image.Image:
        if index in self.broken:
            raise BrokenImage(self.name(index), "planted")
        return Image.new("RGB", (30, 20), (index, index, index))

    def picture(self, index: int) -> Decoded:
        return Decoded(self.load(index))


def read(source: Source, config: PretrainConfig = CONFIG, start: int = 0, stop: int = 6) -> TrainingBatch:
    """All rows of steps `start` to `stop`."""
    with training_batches(source, config, start_step=start, stop_step=stop) as batches:
        return join(list(batches))


def digest(batch: TrainingBatch) -> str:
    return hashlib.sha256(b"".join(batch[key].tobytes() for key in sorted(batch))).hexdigest()


def test_shapes_and_kinds() -> None:
    with training_batches(Numbered(20), CONFIG) as batches:
        batch = next(batches)
    found = {key: (type(value), value.shape, value.dtype.name) for key, value in batch.items()}
    assert found == {
        "image": (np.ndarray, (8, 16, 24, 3), "uint8"),
        "position": (np.ndarray, (8,), "uint32"),
        "label": (np.ndarray, (8,), "int32"),
        "broken": (np.ndarray, (8,), "int64"),
    }


def test_each_epoch_shows_every_image_once_in_a_new_order() -> None:
    rows = read(Numbered(20), replace(CONFIG, batch_size=10), stop=20)
    assert rows["position"].tolist() == list(range(200))
    epochs = rows["label"].reshape(10, 20) - 1000
    assert (np.sort(epochs, axis=1) == np.arange(20)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 10
    assert (rows["image"] == rows["label"].astype(np.uint8).reshape(-1, 1, 1, 1) - np.uint8(1000 % 256)).all()
    assert (rows["broken"] == -1).all()


def test_a_batch_larger_than_the_source() -> None:
    rows = read(Numbered(3), replace(CONFIG, batch_size=8), stop=3)
    assert (np.sort((rows["label"] - 1000).reshape(8, 3), axis=1) == [0, 1, 2]).all()


def test_seed_decides() -> None:
    source = Numbered(20)
    assert digest(read(source)) == digest(read(source))
    other = replace(CONFIG, seed=6)
    assert digest(read(source)) != digest(read(source, other))
    # Grain counts epochs into its seed: run 5's second epoch must not be run 6's first.
    assert read(source, replace(CONFIG, batch_size=20), 1, 2)["label"].tolist() != (
        read(source, replace(other, batch_size=20), 0, 1)["label"].tolist()
    )


@pytest.mark.parametrize("batch_size", [1, 7, 8, 96])
def test_continuing_at_any_step_is_the_same_stream(batch_size: int) -> None:
    config, source = replace(CONFIG, batch_size=batch_size), Numbered(50)
    whole = read(source, config, 0, 6)
    for start in range(6):
        rest = {key: value[start * batch_size :] for key, value in whole.items()}
        assert digest(read(source, config, start, 6)) == digest(rest)


@pytest.mark.parametrize(("batch_size", "hosts"), [(8, 2), (8, 8), (96, 2), (12, 3)])
def test_hosts_read_the_rows_of_one_batch_between_them(batch_size: int, hosts: int) -> None:
    config = replace(CONFIG, batch_size=batch_size)
    whole = read(Numbered(50), config, 3, 7)
    shares = []
    for host in range(hosts):
        with training_batches(
            Numbered(50), config, start_step=3, stop_step=7, process_index=host, process_count=hosts
        ) as batches:
            shares.append(list(batches))
    together = [share[step] for step in range(4) for share in shares]
    assert all(len(share["position"]) == batch_size // hosts for share in together)
    assert digest(join(together)) == digest(whole)


def test_a_late_step_costs_nothing() -> None:
    rows = read(Numbered(50), CONFIG, 10**8, 10**8 + 1)
    assert rows["position"].tolist() == list(range(8 * 10**8, 8 * 10**8 + 8))


def test_positions_end_at_32_bits() -> None:
    last = 2**32 // 8 - 1
    assert read(Numbered(50), CONFIG, last - 1, last)["position"][-1] == 2**32 - 9
    with refused("steps", "pass position 2^32"):
        training_batches(Numbered(50), CONFIG, stop_step=last + 1)


def test_the_image_is_the_files_own_crop(make_folder: Callable[..., Path]) -> None:
    source = open_source(f"folder:{make_folder('photos', 10)}", 3)
    rows = read(source)
    originals = [source.load(i) for i in range(10)]
    for position, image, label in zip(rows["position"], rows["image"], rows["label"], strict=True):
        draws = partial(host_generator, CONFIG.seed, position=int(position))
        candidates = [augment(Decoded(original), CONFIG.augment, (16, 24), draws) for original in originals]
        matches = [i for i, candidate in enumerate(candidates) if (candidate == image).all()]
        assert len(matches) == 1
        assert source.label(matches[0]) == label


def test_workers_do_not_change_the_batches(make_folder: Callable[..., Path]) -> None:
    source = open_source(f"folder:{make_folder('photos', 30, broken=(3, 4, 17))}", 3)
    config = replace(CONFIG, batch_size=40)  # two parts
    expected = digest(read(source, config, 2, 5))
    for workers in (1, 2):
        assert digest(read(source, replace(config, workers=workers), 2, 5)) == expected


def test_a_broken_file_is_replaced_and_no_position_moves() -> None:
    broken = (3, 4, 11, 12, 13)
    whole, rows = read(Numbered(20), stop=12), read(Numbered(20, broken), stop=12)
    assert (whole["position"] == rows["position"]).all()
    own = whole["label"] - 1000
    hit = np.isin(own, broken)
    assert (rows["broken"] == np.where(hit, own, -1)).all()
    for key in ("image", "label"):
        assert (rows[key][~hit] == whole[key][~hit]).all()
    for place in np.flatnonzero(hit[:-6]):
        following = next(i for i in own[place + 1 :] if i not in broken)
        assert rows["label"][place] == 1000 + following
        assert (rows["image"][place] == following).all()


def test_a_replacement_gets_the_crop_of_its_position(make_folder: Callable[..., Path]) -> None:
    source = open_source(f"folder:{make_folder('photos', 12, broken=(5,))}", 3)
    rows = read(source)
    order = read(_WithoutPixels(12))["label"]
    place = int(np.flatnonzero(rows["broken"] == 5)[0])
    draws = partial(host_generator, CONFIG.seed, position=place)
    following = source.load(int(order[place + 1]))
    assert (rows["image"][place] == augment(Decoded(following), CONFIG.augment, (16, 24), draws)).all()


class _WithoutPixels(Numbered):
    """A source that shows the order of a stream: the label is the index."""

    def label(self, index: int) -> int:
        return index


def test_a_disk_that_has_gone_stops() -> None:
    with refused("data", "64 images in a row do not decode", "planted", "Remove it or write it again."):
        read(Numbered(100, tuple(range(100))))


ODD = """
import sys
from mae_jax.config import ModelConfig, PretrainConfig
from mae_jax.data.images.decode import prepare_decoder
from mae_jax.data.sources.source import open_source
from mae_jax.data.stream import training_batches

prepare_decoder()  # as the command line does for its own process
for workers in (0, 1):
    config = PretrainConfig(model=ModelConfig(image_size=16, patch_size=8), batch_size=8, workers=workers)
    with training_batches(open_source(f"folder:{sys.argv[1]}", 3), config, stop_step=2) as batches:
        assert all((batch["broken"] == -1).all() for batch in batches)
"""


def test_odd_files_are_read_without_a_word(tmp_path: Path) -> None:
    pixels = Image.new("RGB", (30, 20), "red")
    pixels.save(tmp_path / "exif.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff nothing")
    pixels.quantize(4).save(tmp_path / "palette.png", transparency=bytes([0, 128]))
    done = subprocess.run([sys.executable, "-c", ODD, tmp_path], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_reading_leaves_pillow_and_opencv_as_they_are(make_folder: Callable[..., Path]) -> None:
    def settings() -> tuple[object, ...]:
        return cv2.getNumThreads(), Image.core.get_blocks_max(), list(warnings.filters)

    before = settings()
    for workers in (0, 1):
        read(open_source(f"folder:{make_folder('photos', 10)}", 3), replace(CONFIG, workers=workers))
    assert settings() == before


def test_the_order_stays_with_every_version_of_grain() -> None:
    """A run that is continued elsewhere shows the same images."""
    assert [Order(10, 7)[group] for group in range(20)] == [4, 0, 3, 7, 2, 9, 6, 8, 1, 5, 5, 3, 6, 7, 9, 1, 0, 2, 4, 8]
    assert [Order(1_281_167, 2**32 - 1)[group] for group in (0, 1, 1_281_166, 1_281_167, 10**9)] == [
        815659,
        649924,
        810921,
        1141324,
        986588,
    ]


def test_images_that_are_too_large_are_no_fault_of_the_disk(tmp_path: Path) -> None:
    for number in range(3):
        Image.new("1", (10_000, 9_000)).save(tmp_path / f"{number}.png")
    source = open_source(f"folder:{tmp_path}", 3)
    with refused("data", "89,478,485", "Cut or shrink images as large as that first.") as caught:
        read(source)
    assert "disk" not in str(caught.value)


def test_a_closed_stream_has_ended() -> None:
    batches = training_batches(Numbered(20), CONFIG)
    next(batches)
    batches.close()
    batches.close()
    assert list(batches) == []


def test_defaults_for_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "available_cores", lambda: 3)
    assert (loader.default_readers(True), loader.default_readers(False)) == (0, 3)
    monkeypatch.setattr(loader, "available_cores", lambda: 200)
    assert loader.default_readers(False) == 16


@pytest.mark.parametrize(("batch_size", "part"), [(1, 1), (8, 8), (37, 1), (64, 32), (96, 32), (100, 25), (4096, 32)])
def test_parts_fill_a_batch(batch_size: int, part: int) -> None:
    assert part_size(batch_size) == part


def rows_with(*indices: int) -> np.ndarray:
    return np.array(indices, np.int64)


def test_broken_files_are_named_once() -> None:
    reported: list[str] = []
    account = BrokenFiles(Numbered(100, (3, 7)), reported.append)
    for batch in (rows_with(-1, 3, -1), rows_with(-1, -1), rows_with(3, 7, 3)):
        account.update(batch)
    assert account.count == 2
    assert reported == [
        "number 3 does not decode: planted; the next image in the stream takes its place",
        "number 7 does not decode: planted; the next image in the stream takes its place",
    ]


def test_a_file_that_failed_once() -> None:
    reported: list[str] = []
    BrokenFiles(Numbered(100), reported.append).update(rows_with(5))
    assert reported == ["number 5 did not decode, though it does now; the next image in the stream takes its place"]


@pytest.mark.parametrize(("count", "limit"), [(20, 10), (10_999, 10), (11_000, 11), (1_281_167, 1281)])
def test_too_many_broken_files_stop(count: int, limit: int) -> None:
    account = BrokenFiles(Numbered(count, range(count)), lambda line: None)
    account.update(rows_with(*range(limit), *range(limit)))
    with pytest.raises(
        StatedError, match=rf"{limit + 1} of {count:,} images are broken.*the {limit} .*number 0.*number 2"
    ):
        account.update(rows_with(limit))


@pytest.mark.parametrize("workers", [0, 2])
def test_real_photographs(imagenet_sample: Path, workers: int) -> None:
    source = open_source(f"folder:{imagenet_sample}", 3)
    assert len(source) == 200
    config = PretrainConfig(batch_size=50, seed=1, workers=workers)
    rows = read(source, config, 0, 1)
    assert rows["image"].shape == (50, 224, 224, 3)
    assert (rows["broken"] == -1).all()
    place, order = 7, read(source, replace(config, augment=AugmentConfig(crop="center", flip=False)), 0, 1)
    own = next(i for i in range(200) if _is_center_crop(source.load(i), order["image"][place]))
    draws = partial(host_generator, 1, position=place)
    assert (rows["image"][place] == augment(Decoded(source.load(own)), config.augment, (224, 224), draws)).all()


def _is_center_crop(original: Image.Image, image: np.ndarray) -> bool:
    draws = partial(host_generator, 0, position=0)
    return bool(
        (augment(Decoded(original), AugmentConfig(crop="center", flip=False), (224, 224), draws) == image).all()
    )


def test_digits_stream() -> None:
    config = PretrainConfig(
        model=ModelConfig(image_size=8, patch_size=2, in_channels=1),
        augment=AugmentConfig(crop="center", flip=False, mean=(0.5,), std=(0.5,)),
        batch_size=599,
    )
    source = open_source("digits", 1)
    rows = read(source, config, stop=3)
    originals = {to_array(source.load(i)).tobytes() for i in range(1797)}
    assert {image.tobytes() for image in rows["image"]} == originals
    assert np.bincount(rows["label"]).tolist() == np.bincount([source.label(i) for i in range(1797)]).tolist()


VIEWS = {
    "host": CONFIG,
    "device": replace(CONFIG, crops="device", canvas_size=32),
    "repeats": replace(CONFIG, repeats=2),
    "device, repeats": replace(CONFIG, crops="device", repeats=4),
    "fast": replace(CONFIG, augment=AugmentConfig(resize="fast")),
    "fixed, distorted": replace(CONFIG, augment=AugmentConfig(crop="fixed", color_jitter=0.4, rand_augment=9.0)),
    "fixed, device": replace(CONFIG, augment=AugmentConfig(crop="fixed"), crops="device"),
}


@pytest.mark.parametrize("view", VIEWS)
def test_hosts_workers_and_resuming_give_the_same_hash(make_folder: Callable[..., Path], view: str) -> None:
    """Every example, crop and position, on 1, 2 and 4 hosts, with 2 workers, and from the middle."""
    source = open_source(f"folder:{make_folder('photos', 30, broken=(3, 4, 17))}", 3)
    config = replace(VIEWS[view], batch_size=16)
    whole = read(source, config, 0, 5)
    expected = digest(whole)
    for hosts in (1, 2, 4):
        assert digest(on_hosts(source, config, hosts)) == expected, hosts
    rest = {key: value[2 * 16 :] for key, value in whole.items()}
    assert digest(read(source, config, 2, 5)) == digest(rest)
    assert digest(read(source, replace(config, workers=2), 2, 5)) == digest(rest)


@pytest.mark.parametrize(("workers", "hosts"), [(1, 2), (4, 1)])
def test_workers_on_hosts_give_the_same_hash(make_folder: Callable[..., Path], workers: int, hosts: int) -> None:
    source = open_source(f"folder:{make_folder('photos', 30, broken=(3, 4, 17))}", 3)
    config = replace(VIEWS["device, repeats"], batch_size=16)
    expected = digest(read(source, config, 0, 5))
    assert digest(on_hosts(source, replace(config, workers=workers), hosts)) == expected


def on_hosts(source: Source, config: PretrainConfig, hosts: int) -> TrainingBatch:
    """The rows of steps 0 to 5, as several hosts read them, laid together in the order of the hosts."""
    batches = []
    for host in range(hosts):
        with training_batches(source, config, stop_step=5, process_index=host, process_count=hosts) as stream:
            batches.append(list(stream))
    return join([join(list(rows)) for rows in zip(*batches, strict=True)])


def test_repeats_show_one_image_in_a_row_with_crops_of_their_own(make_folder: Callable[..., Path]) -> None:
    source = open_source(f"folder:{make_folder('photos', 12)}", 3)
    loads: list[int] = []

    class Counted(Numbered):
        def picture(self, index: int) -> Decoded:
            loads.append(index)
            return Decoded(source.load(index))

    rows = read(Counted(12), replace(CONFIG, repeats=4), stop=6)
    groups = (rows["label"] - 1000).reshape(12, 4)
    assert (groups == groups[:, :1]).all()
    assert sorted(groups[:, 0].tolist()) == list(range(12))  # an epoch of images is four of crops
    assert len(loads) == 12
    assert len({image.tobytes() for image in rows["image"]}) == 48
    alone = read(source, CONFIG, stop=6)
    assert (alone["position"] == rows["position"]).all()


def test_repeats_show_each_epoch_every_image() -> None:
    rows = read(Numbered(10), replace(CONFIG, batch_size=20, repeats=2), stop=4)
    epochs = rows["label"].reshape(4, 10, 2)[:, :, 0] - 1000
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()


def test_device_crops_are_the_hosts(make_folder: Callable[..., Path]) -> None:
    """The same box and flip of the same image; pixels differ by the squeeze alone."""
    source = open_source(f"folder:{make_folder('photos', 10)}", 3)
    host = read(source)
    device = read(source, replace(CONFIG, crops="device", canvas_size=64))
    assert (device["position"] == host["position"]).all()
    assert (device["label"] == host["label"]).all()
    assert device["image"].shape == (48, 64, 64, 3)
    assert device["crop"].dtype == np.float32
    cut = np.asarray(crop_images(device["image"], device["crop"], (16, 24)))
    off = np.abs(cut.astype(int) - host["image"]).mean(axis=(1, 2, 3))
    assert off.mean() < 4  # these pictures have noise in every pixel, which a second resampling smooths
    mirrored = np.abs(cut[:, :, ::-1].astype(int) - host["image"]).mean(axis=(1, 2, 3))
    assert (off < mirrored).all()


def test_a_batch_that_hosts_cannot_share() -> None:
    with refused("batch_size", "repeats 2 x 3 hosts"):
        training_batches(Numbered(20), replace(CONFIG, repeats=2), process_count=3)
    with pytest.raises(ValueError, match="batch_size 8 is not divisible by repeats 3"):
        replace(CONFIG, repeats=3)
    with pytest.raises(ValueError, match="canvas_size 64"):
        replace(CONFIG, canvas_size=64)
    assert (CONFIG.canvas, PretrainConfig().canvas) == (27, 256)
