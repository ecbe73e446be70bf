"""The columns of the picture, and the sheet that they are drawn on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.config import AugmentConfig, ModelConfig, TransformerConfig
from mae_jax.evaluation.reconstruct import STAR, View, draw, reconstruct, sample_noise
from mae_jax.models.mae import MaskedAutoencoder

PLAIN = ModelConfig(
    image_size=(8, 12),
    patch_size=4,
    encoder=TransformerConfig(width=16, depth=1, heads=2, mlp_ratio=2.0),
    decoder=TransformerConfig(width=8, depth=1, heads=2, mlp_ratio=2.0),
    mask_ratio=0.5,
)


def augment_for(channels):
    return AugmentConfig(mean=(0.4,) * channels, std=(0.25,) * channels)


@pytest.fixture(scope="module", params=[(3, False), (3, True), (1, False), (4, True)], ids=str)
def picture(request):
    """Configuration, parameters, bytes, noise and the views of them."""
    channels, normalised = request.param
    config = dataclasses.replace(PLAIN, in_channels=channels, norm_pix_loss=normalised)
    augment, noise = augment_for(channels), sample_noise(0, 3, config)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 8, 12, channels), np.uint8)
    shapes = jax.eval_shape(MaskedAutoencoder(config).init, jax.random.key(0), jnp.zeros(images.shape), noise)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.2, p.shape), p.dtype), shapes["params"])
    return config, augment, params, images, noise, reconstruct(params, images, noise, config, augment)


def hidden_pixels(config, noise):
    """True where a pixel's patch is hidden; the smallest half of the noise is seen."""
    ranks = np.asarray(noise).argsort(axis=1).argsort(axis=1).reshape(3, *config.grid)
    return (ranks >= config.keep).repeat(4, axis=1).repeat(4, axis=2)[..., None]


def test_the_columns_and_their_captions(picture):
    config, _, _, images, _, views = picture
    captions = ["original", "masked", "reconstruction", "with visible"]
    if config.norm_pix_loss:
        captions = ["original", "masked", "raw prediction", "denormalised*", "with visible*"]
    assert [view.caption for view in views] == captions
    assert {(view.images.dtype, view.images.shape) for view in views} == {(images.dtype, images.shape)}


def test_the_original_comes_back_as_it_is(picture):
    _, _, _, images, _, views = picture
    np.testing.assert_array_equal(views[0].images, images)


def test_hidden_patches_are_grey_in_the_masked_column(picture):
    config, _, _, images, noise, views = picture
    hidden = hidden_pixels(config, noise)
    assert hidden.mean() == 0.5
    np.testing.assert_array_equal(views[1].images, np.where(hidden, 128, images))


def test_visible_patches_are_the_originals_and_hidden_ones_the_prediction(picture):
    config, _, _, images, noise, views = picture
    hidden = hidden_pixels(config, noise)
    np.testing.assert_array_equal(views[-1].images, np.where(hidden, views[-2].images, images))
    assert (views[-2].images != images).any(axis=(1, 2, 3)).all()


def test_the_reconstruction_is_the_prediction_in_bytes(picture):
    """Worked out in NumPy from the model's output, denormalised by patch where the target was normalised."""
    config, augment, params, images, noise, views = picture
    pixels = (images / 255 - augment.mean[0]) / augment.std[0]
    out = jax.jit(MaskedAutoencoder(config).apply)({"params": params}, jnp.asarray(pixels, jnp.float32), noise)

    def in_bytes(patches):
        rows, columns = config.grid
        cells = patches.reshape(3, rows, columns, 4, 4, config.in_channels).transpose(0, 1, 3, 2, 4, 5)
        unit = cells.reshape(images.shape) * augment.std[0] + augment.mean[0]
        return np.clip(unit, 0, 1) * 255

    raw = np.asarray(out.pred, np.float64)
    expected = [raw]
    if config.norm_pix_loss:
        cells = pixels.reshape(3, config.grid[0], 4, config.grid[1], 4, -1).transpose(0, 1, 3, 2, 4, 5)
        truth = cells.reshape(raw.shape)
        deviation = np.sqrt(truth.var(axis=-1, ddof=1, keepdims=True) + 1e-6)
        expected.append(raw * deviation + truth.mean(axis=-1, keepdims=True))
    for view, patches in zip(views[2:-1], expected, strict=True):
        # Rounded to bytes: half a step, and a little for float32.
        assert np.abs(view.images - in_bytes(patches)).max() <= 0.51


def test_coefficients_are_turned_back_into_pixels():
    """Worked out in NumPy from the model's output."""
    config = dataclasses.replace(PLAIN, in_channels=1, pca_components=3)
    augment, noise = augment_for(1), sample_noise(0, 3, config)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 8, 12, 1), np.uint8)
    shapes = jax.eval_shape(MaskedAutoencoder(config).init, jax.random.key(0), jnp.zeros(images.shape), noise)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.2, p.shape), p.dtype), shapes["params"])
    mean, basis = rng.normal(0, 0.3, 16), np.linalg.qr(rng.normal(size=(16, 3)))[0]
    params |= {"target": {"mean": jnp.asarray(mean, jnp.float32), "basis": jnp.asarray(basis, jnp.float32)}}
    views = reconstruct(params, images, noise, config, augment)
    assert [view.caption for view in views] == ["original", "masked", "reconstruction", "with visible"]

    pixels = jnp.asarray((images / 255 - 0.4) / 0.25, jnp.float32)
    out = jax.jit(MaskedAutoencoder(config).apply)({"params": params}, pixels, noise)
    patches = np.asarray(out.pred, np.float64) @ basis.T + mean
    cells = patches.reshape(3, *config.grid, 4, 4, 1).transpose(0, 1, 3, 2, 4, 5).reshape(images.shape)
    assert np.abs(views[2].images - np.clip(cells * 0.25 + 0.4, 0, 1) * 255).max() <= 0.51


def test_the_masks_of_the_pictures_stay_the_same():
    first = sample_noise(0, 3, PLAIN)
    np.testing.assert_array_equal(sample_noise(0, 5, PLAIN)[:3], first)
    assert (np.asarray(sample_noise(1, 3, PLAIN)) != first).all()
    assert first.shape == (3, PLAIN.num_patches)


def test_the_sheet_has_room_for_everything(picture):
    config, *_, views = picture
    sheet = draw(views, "a title")
    scale = 128 // 12
    notes = 1 + config.norm_pix_loss + (config.in_channels == 4)
    wide = len(views) * (12 * scale + 6) + 6
    assert sheet.mode == "RGB"
    assert sheet.height == 20 * (notes + 1) + 6 + 3 * (8 * scale + 6)
    assert sheet.width >= wide
    # The last image, enlarged in whole steps, lies in its corner.
    left, top = 6 + (len(views) - 1) * (12 * scale + 6), sheet.height - (8 * scale + 6)
    shown = np.asarray(sheet)[top : top + 8 * scale : scale, left : left + 12 * scale : scale]
    last = views[-1].images[-1]
    np.testing.assert_array_equal(shown, last[..., :3] if config.in_channels >= 3 else last.repeat(3, axis=-1))


def test_what_borrows_from_the_truth_says_so(picture, monkeypatch):
    config, _, _, _, _, views = picture
    written = []
    monkeypatch.setattr("PIL.ImageDraw.ImageDraw.text", lambda self, where, text, **_: written.append(text))
    draw(views, "a title")
    assert (STAR in written) == config.norm_pix_loss
    assert ("the first 3 of 4 channels" in written) == (config.in_channels == 4)
    assert [view.caption for view in views] == [text for text in written if text in {v.caption for v in views}]
    assert written[0] == "a title"


def test_large_images_are_not_enlarged():
    sheet = draw([View("one", np.zeros((2, 200, 160, 3), np.uint8))], "t")
    assert sheet.size == (160 + 12, 20 * 2 + 6 + 2 * 206)
