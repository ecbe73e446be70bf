"""Files of every kind, made here with Pillow."""

import io
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mae_jax.data.images.decode import BrokenImage, decode, mode_for
from tests.data.photographs import photograph
from tests.refusals import refused


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PHOTO = Image.fromarray(photograph(40, 60))


def difference(image: Image.Image, expected: Image.Image) -> float:
    """Mean absolute, in grey levels."""
    assert image.mode == expected.mode
    return float(np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int)).mean())


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless(kind: str) -> None:
    assert difference(decode(encoded(PHOTO, kind), "RGB"), PHOTO) == 0


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "JPEG2000"])
def test_lossy(kind: str) -> None:
    assert difference(decode(encoded(PHOTO, kind), "RGB"), PHOTO) < 12


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_and_colour_become_each_other(mode: str) -> None:
    for stored in ("L", "RGB"):
        image = decode(encoded(PHOTO.convert(stored), "PNG"), mode)
        assert difference(image, PHOTO.convert(stored).convert(mode)) == 0


def test_one_bit() -> None:
    assert difference(decode(encoded(PHOTO.convert("1"), "PNG"), "L"), PHOTO.convert("1").convert("L")) == 0


def test_cmyk_jpeg() -> None:
    image = decode(encoded(PHOTO.convert("CMYK"), "JPEG", quality=95), "RGB")
    assert difference(image, PHOTO) < 6


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_alpha_is_dropped_as_pillow_does(mode: str) -> None:
    alpha = Image.new("L", PHOTO.size, 7)
    colour = PHOTO.copy()
    colour.putalpha(alpha)
    assert difference(decode(encoded(colour, "PNG"), mode), PHOTO.convert(mode)) == 0
    grey = PHOTO.convert("L")
    grey.putalpha(alpha)
    assert difference(decode(encoded(grey, "PNG"), mode), PHOTO.convert("L").convert(mode)) == 0


@pytest.mark.parametrize("transparency", [0, bytes([0, 128] * 8)])
def test_palette_with_transparency(transparency: int | bytes) -> None:
    palette = PHOTO.quantize(16)
    image = decode(encoded(palette, "PNG", transparency=transparency), "RGB")
    assert difference(image, palette.convert("RGB")) == 0


def png_16(values: np.ndarray) -> bytes:
    """A 16-bit grey PNG, written by hand: Pillow cannot write one from every mode."""
    height, width = values.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    values = np.arange(0, 65536, 257, np.uint16).reshape(16, 16)
    expected = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    big = values.astype(np.int32)
    files = {
        "png": png_16(values),
        "tiff": encoded(Image.fromarray(values), "TIFF"),
        "tiff 32": encoded(Image.fromarray(big), "TIFF"),
        "pgm": b"P5 16 16 65535\n" + values.astype(">u2").tobytes(),
    }
    for kind, data in files.items():
        assert difference(decode(data, "L"), expected) == 0, kind
        assert difference(decode(data, "RGB"), expected.convert("RGB")) == 0, kind


def test_pixels_without_a_fixed_range_are_refused() -> None:
    floats = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    integers = np.full((8, 8), 2**20, np.int32)
    for values in (floats, integers):
        with pytest.raises(BrokenImage, match="no fixed range"):
            decode(encoded(Image.fromarray(values), "TIFF"), "RGB")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(kind: str, orientation: int) -> None:
    upright = Image.new("RGB", (48, 32))
    ImageDraw.Draw(upright).rectangle((0, 0, 15, 7), fill="red")
    turns = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}  # what a camera so held stores
    stored = upright
    for turn in turns.get(orientation, []):
        stored = stored.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encoded(stored, kind, exif=exif), "RGB")
    assert image.size == upright.size
    assert difference(image, upright) < 4


def test_damaged_exif_leaves_the_picture() -> None:
    data = encoded(PHOTO, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff nothing")
    with pytest.warns(UserWarning, match="Corrupt EXIF"):  # which the pipeline turns off
        image = decode(data, "RGB")
    assert image.size == PHOTO.size


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    image = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:]), "RGB")
    assert difference(image, frames[0]) < 3


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    data = encoded(Image.new("1", (10_000, 9_000)), "PNG")
    assert len(data) < 100_000
    with pytest.raises(BrokenImage, match="pixels"):
        decode(data, "RGB")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7])
def test_a_file_that_ends_early_is_broken(kind: str, share: float) -> None:
    whole = encoded(PHOTO, kind)
    with pytest.raises(BrokenImage):
        decode(whole[: int(len(whole) * share)], "RGB")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_bytes(b""), "not an image of a kind"),
        (lambda path: path.write_text("just text\n" * 100), "not an image of a kind"),
        (lambda path: path.mkdir(), "directory"),
        (lambda path: path.symlink_to("nowhere"), "No such file"),
        (lambda path: None, "No such file"),
    ],
)
def test_broken_files_say_why(tmp_path: Path, make, reason: str) -> None:
    path = tmp_path / "ünïcode.jpg"
    make(path)
    with pytest.raises(BrokenImage, match=reason) as caught:
        decode(str(path), "RGB")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.name, again.reason) == (str(path), caught.value.reason)
    assert str(path) in str(again)


def test_random_damage_never_escapes() -> None:
    """Each file gives an RGB image or BrokenImage with a reason; either comes of some."""
    rng = np.random.default_rng(0)
    files = [encoded(PHOTO, kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")]
    images, broken = [], []
    for _ in range(50):
        for whole in files:
            data = bytearray(whole)
            for place in rng.integers(len(data), size=20):
                data[place] = rng.integers(256)
            try:
                images.append(decode(bytes(data), "RGB"))
            except BrokenImage as error:
                broken.append(error)
    assert len(images) + len(broken) == 300
    assert {image.mode for image in images} == {"RGB"}
    assert {error.name for error in broken} == {"image"}
    assert all(error.reason for error in broken)


def test_channels_that_files_cannot_give() -> None:
    assert (mode_for(1), mode_for(3)) == ("L", "RGB")
    with refused("model.in_channels", "12"):
        mode_for(12)
