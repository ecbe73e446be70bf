"""Fused decoding and cropping against Pillow, which is the definition."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mae_jax.config import AugmentConfig
from mae_jax.data.images.box import choose_box
from mae_jax.data.images.decode import BrokenImage, Decoded, JpegPicture, Squeezed, decode, open_picture, to_array
from mae_jax.data.images.resize import _enough, resize_part
from mae_jax.data.sources.folder import FolderSource
from mae_jax.rng import host_generator
from tests.data.photographs import photograph


def jpeg(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


PHOTO = Image.fromarray(photograph(240, 330))


def pillow(data: bytes, mode: str, box: tuple[int, int, int, int], image_hw: tuple[int, int]) -> np.ndarray:
    return to_array(decode(data, mode).crop(box).resize(image_hw[::-1], Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 30}]
)
def test_plain_jpeg_equals_pillow_bit_for_bit(options: dict) -> None:
    data = jpeg(PHOTO, **options)
    picture = open_picture(data, "RGB")
    assert isinstance(picture, JpegPicture)
    assert picture.size_hw == (240, 330)
    assert (to_array(picture.image()) == to_array(decode(data, "RGB"))).all()
    for box in ((0, 0, 330, 240), (11, 5, 301, 77)):
        assert (resize_part(picture, box, (64, 48)) == pillow(data, "RGB", box, (64, 48))).all()


@given(st.data())
def test_any_box_of_any_jpeg_is_pillows(data: st.DataObject) -> None:
    height, width = data.draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    left, top = data.draw(st.tuples(st.integers(0, width - 1), st.integers(0, height - 1)))
    box = left, top, data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    file = jpeg(Image.fromarray(photograph(height, width)))
    assert (resize_part(open_picture(file, "RGB"), box, (24, 40)) == pillow(file, "RGB", box, (24, 40))).all()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(PHOTO, exif=exif)


@pytest.mark.parametrize(
    ("make", "mode"),
    [
        (rotated, "RGB"),
        (lambda: jpeg(PHOTO.convert("CMYK")), "RGB"),
        (lambda: jpeg(PHOTO), "L"),
        (lambda: jpeg(PHOTO.convert("L")), "L"),
        (lambda: jpeg(PHOTO.convert("L")), "RGB"),
    ],
)
def test_every_other_kind_equals_pillow(make: Callable[[], bytes], mode: str) -> None:
    picture = open_picture(make(), mode)
    whole = decode(make(), mode)
    assert picture.size_hw == (whole.height, whole.width)
    assert (resize_part(picture, (3, 4, 200, 210), (32, 32)) == pillow(make(), mode, (3, 4, 200, 210), (32, 32))).all()


def test_upright_exif_stays_fast() -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    assert isinstance(open_picture(jpeg(PHOTO, exif=exif), "RGB"), JpegPicture)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_file_that_ends_early_is_broken(share: float) -> None:
    data = jpeg(PHOTO)
    with pytest.raises(BrokenImage, match=r"photo\.jpg"):
        resize_part(open_picture(data[: int(len(data) * share)], "RGB", "photo.jpg"), (0, 0, 9, 9), (4, 4))


def test_a_bomb_is_refused_by_its_header() -> None:
    data = bytearray(jpeg(PHOTO))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = b"\x2e\xe0\x2e\xe0"
    with pytest.raises(BrokenImage, match="pixels"):
        open_picture(bytes(data), "RGB").image()


def test_the_fast_path_is_near() -> None:
    large = Image.fromarray(photograph(900, 1300)).resize((1300, 900))
    picture = open_picture(jpeg(large), "RGB")
    for box in ((0, 0, 1300, 900), (100, 50, 300, 850), (40, 40, 90, 95)):
        exact, fast = (
            resize_part(picture, box, (64, 64)),
            resize_part(open_picture(jpeg(large), "RGB"), box, (64, 64), fast=True),
        )
        assert fast.shape == exact.shape
        assert np.abs(exact.astype(int) - fast).mean() < 1.5


def test_the_fast_path_does_not_spoil_the_exact_one() -> None:
    picture, box = open_picture(jpeg(Image.fromarray(photograph(900, 1300))), "RGB"), (0, 0, 1300, 900)
    exact = resize_part(picture, box, (32, 32))
    again = open_picture(jpeg(Image.fromarray(photograph(900, 1300))), "RGB")
    resize_part(again, box, (32, 32), fast=True)
    assert (resize_part(again, box, (32, 32)) == exact).all()


def test_a_squeezed_picture_shows_the_same_place() -> None:
    whole = Image.fromarray(photograph(120, 300))
    square = Squeezed(resize_part(Decoded(whole), (0, 0, 300, 120), (120, 120)), (120, 300))
    assert square.size_hw == (120, 300)
    assert square.image().size == (300, 120)
    assert resize_part(square, (0, 0, 300, 120), (120, 120)) is square.pixels()
    # Across, a crop of a fourth has half the pixels of the crop of the original.
    for box in ((0, 0, 150, 120), (75, 20, 225, 100)):
        off = np.abs(resize_part(Decoded(whole), box, (32, 32)).astype(int) - resize_part(square, box, (32, 32)))
        assert off.mean() < 4


def test_grey_keeps_its_channel() -> None:
    grey = open_picture(jpeg(PHOTO.convert("L")), "L")
    for fast in (False, True):
        assert resize_part(grey, (0, 0, 100, 100), (16, 24), fast).shape == (16, 24, 1)


def test_real_photographs_at_the_models_size(imagenet_sample: Path) -> None:
    """Exact is Pillow's to the bit; fast is off by less than 1.5 grey levels on average."""
    source, config = FolderSource(str(imagenet_sample)), AugmentConfig()
    off = []
    for i in range(0, 200, 4):
        box = choose_box(source.picture(i).size_hw, config, (224, 224), host_generator(0, "crop", i))
        expected = source.load(i).crop(box).resize((224, 224), Image.Resampling.BICUBIC)
        assert (resize_part(source.picture(i), box, (224, 224)) == np.asarray(expected)).all()
        fast = resize_part(source.picture(i), box, (224, 224), fast=True)
        off.append(np.abs(fast.astype(int) - np.asarray(expected)).mean())
    assert np.mean(off) < 1.5


def test_a_fast_resize_decodes_twice_what_a_crop_shows() -> None:
    """At the crop's own size the scaled decoding would be all there is to average; a file is never decoded larger."""
    assert _enough((400, 600), (0, 0, 300, 200), (50, 50)) == (200, 300)  # shrinks 6 and 4 times
    assert _enough((400, 600), (0, 0, 100, 100), (50, 50)) is None
