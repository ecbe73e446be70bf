"""What stands beside a checkpoint's tensors, in the words of those who wrote it."""

import json
import math
from pathlib import Path

import pytest

from mae_jax.port.infer_config import Hints
from mae_jax.port.metadata import hints_in, metadata_beside, normalisation_in
from tests.refusals import refused


def test_authors_and_hugging_face_name_the_same_in_two_ways():
    authors = {"input_size": 224, "mask_ratio": 0.75, "norm_pix_loss": True}
    theirs = {"image_size": [32, 64], "num_attention_heads": 4, "decoder_num_attention_heads": 2, "norm_pix_loss": 0}
    assert hints_in(authors, Path("a")) == Hints(image_size=224, mask_ratio=0.75, norm_pix_loss=True)
    assert hints_in(theirs, Path("b")) == Hints(4, 2, (32, 64), norm_pix_loss=False)
    assert hints_in({}, Path("c")) == Hints()


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        (
            "num_attention_heads",
            "12",
            "config.json has num_attention_heads '12', which is no number of heads",
        ),
        ("decoder_num_attention_heads", 0, "which is no number of heads"),
        ("encoder_heads", True, "which is no number of heads"),
        ("encoder_heads", 2**40, "which is no number of heads"),
        ("input_size", "32", "has input_size '32', which is not a side"),
        ("input_size", -32, "which is not a side"),
        ("mask_ratio", "most", "has mask_ratio 'most', which is no number"),
        ("mask_ratio", math.nan, "which is no number"),
        ("norm_pix_loss", "yes", "has norm_pix_loss 'yes', which is neither true nor false"),
        ("image_size", [32, 32, 3], "has image_size [32, 32, 3], which is not a side"),
        ("image_size", "32", "which is not a side"),
    ],
)
def test_a_value_of_another_kind_is_named(name, value, sentence):
    with refused(name, sentence):
        hints_in({name: value}, Path("config.json"))


def test_the_normalisation_nearest_to_the_weights_counts():
    own = {"mean": [0.1], "std": [0.2]}
    metadata = {
        "preprocessor": {"image_mean": [0.3], "image_std": [0.4]},
        "pretrained_cfg": {"mean": [0.5], "std": [0.6]},
    }
    file, folder = Path("a.pth"), Path("a")
    assert normalisation_in(own, file, metadata, folder, 1) == ((0.1,), (0.2,))
    assert normalisation_in({}, file, metadata, folder, 1) == ((0.3,), (0.4,))
    assert normalisation_in({}, file, metadata | {"preprocessor": {}}, folder, 1) == ((0.5,), (0.6,))
    assert normalisation_in(own, file, metadata, folder, 3) is None  # of other channels


ODD_NUMBERS = {
    "x": "'x'",
    None: "None",
    True: "True",
    math.nan: "nan",
    math.inf: "inf",
    10**400: "10000",
}


@pytest.mark.parametrize("value", ODD_NUMBERS)
@pytest.mark.parametrize("name", ["image_mean", "image_std"])
def test_a_normalisation_by_no_number_is_refused(name, value):
    metadata = {"image_mean": [0.5, 0.5], "image_std": [0.5, 0.5]} | {name: [0.5, value]}
    words = f"has {name} [0.5, ", f"of which {ODD_NUMBERS[value]}", "finite number: correct it there"
    with refused(name, "a/preprocessor_config.json has", *words):
        normalisation_in({}, Path("a/f.bin"), {"preprocessor": metadata}, Path("a"), 2)
    with refused(name, "a/f.bin has", *words):
        normalisation_in(metadata, Path("a/f.bin"), {}, Path("a"), 2)


@pytest.mark.parametrize("value", [0, 0.0, -0.5])
def test_a_deviation_is_positive(value):
    metadata = {"pretrained_cfg": {"mean": [-0.5], "std": [value]}}
    with refused("std", f"a/config.json has std [{value}]", "is no positive finite number"):
        normalisation_in({}, Path("a/f.bin"), metadata, Path("a"), 1)


def test_the_configuration_of_timm_is_an_object():
    with refused("pretrained_cfg", "a/config.json has pretrained_cfg 'x', which is no object"):
        normalisation_in({}, Path("a/f.bin"), {"pretrained_cfg": "x"}, Path("a"), 1)


def test_a_folder_may_hold_no_metadata(tmp_path):
    assert metadata_beside(tmp_path) == {"preprocessor": {}}
    (tmp_path / "config.json").write_text(json.dumps({"mask_ratio": 0.5}))
    assert metadata_beside(tmp_path) == {"mask_ratio": 0.5, "preprocessor": {}}
    (tmp_path / "preprocessor_config.json").write_text("[1]")
    with refused("preprocessor_config.json", "preprocessor_config.json holds list, not a configuration"):
        metadata_beside(tmp_path)
