"""What stands beside a checkpoint's tensors, in the words of those who wrote it."""

import json
import math
from pathlib import Path

import pytest

from mae_jax.errors import StatedError
from mae_jax.port.infer_config import Hints
from mae_jax.port.metadata import hints_in, normalisation_in, said_in


def test_authors_and_hugging_face_name_the_same_in_two_ways():
    authors = {"input_size": 224, "mask_ratio": 0.75, "norm_pix_loss": True}
    theirs = {"image_size": [32, 64], "num_attention_heads": 4, "decoder_num_attention_heads": 2, "norm_pix_loss": 0}
    assert hints_in(authors, Path("a")) == Hints(image_size=224, mask_ratio=0.75, norm_pix_loss=True)
    assert hints_in(theirs, Path("b")) == Hints(4, 2, (32, 64), norm_pix_loss=False)
    assert hints_in({}, Path("c")) == Hints()


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"num_attention_heads": "12"}, "says num_attention_heads '12', which is no int"),
        ({"decoder_num_attention_heads": 0}, "says decoder_num_attention_heads 0, which is no number of heads, 1 or"),
        ({"encoder_heads": True}, "says encoder_heads True, which is no number of heads"),
        ({"input_size": "32"}, "says input_size '32', which is not a side"),
        ({"mask_ratio": "most"}, "says mask_ratio 'most', which is no"),
        ({"image_size": [32, 32, 3]}, r"says image_size \[32, 32, 3\], which is not a side"),
        ({"image_size": "32"}, "says image_size '32', which is not a side"),
    ],
)
def test_a_value_of_another_kind_is_named(said, sentence):
    with pytest.raises(StatedError, match=f"config.json {sentence}"):
        hints_in(said, Path("config.json"))


def test_the_normalisation_nearest_to_the_weights_counts():
    own = {"mean": [0.1], "std": [0.2]}
    said = {"preprocessor": {"image_mean": [0.3], "image_std": [0.4]}, "pretrained_cfg": {"mean": [0.5], "std": [0.6]}}
    file, folder = Path("a.pth"), Path("a")
    assert normalisation_in(own, file, said, folder, 1) == ((0.1,), (0.2,))
    assert normalisation_in({}, file, said, folder, 1) == ((0.3,), (0.4,))
    assert normalisation_in({}, file, said | {"preprocessor": {}}, folder, 1) == ((0.5,), (0.6,))
    assert normalisation_in(own, file, said, folder, 3) is None  # of other channels


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
    said = {"image_mean": [0.5, 0.5], "image_std": [0.5, 0.5]} | {name: [0.5, value]}
    of = rf"says {name} \[0.5, .*\], of which {ODD_NUMBERS[value]}.* is no .*finite number: correct it there"
    with pytest.raises(StatedError, match=f"^a/preprocessor_config.json {of}"):
        normalisation_in({}, Path("a/f.bin"), {"preprocessor": said}, Path("a"), 2)
    with pytest.raises(StatedError, match=f"^a/f.bin {of}"):
        normalisation_in(said, Path("a/f.bin"), {}, Path("a"), 2)


@pytest.mark.parametrize("value", [0, 0.0, -0.5])
def test_a_deviation_is_positive(value):
    said = {"pretrained_cfg": {"mean": [-0.5], "std": [value]}}
    with pytest.raises(StatedError, match=rf"^a/config.json says std \[{value}\], .* is no positive finite number"):
        normalisation_in({}, Path("a/f.bin"), said, Path("a"), 1)


def test_what_timm_says_is_an_object():
    with pytest.raises(StatedError, match=r"^a/config.json says pretrained_cfg 'x', which is no object"):
        normalisation_in({}, Path("a/f.bin"), {"pretrained_cfg": "x"}, Path("a"), 1)


def test_a_folder_may_say_nothing(tmp_path):
    assert said_in(tmp_path) == {"preprocessor": {}}
    (tmp_path / "config.json").write_text(json.dumps({"mask_ratio": 0.5}))
    assert said_in(tmp_path) == {"mask_ratio": 0.5, "preprocessor": {}}
    (tmp_path / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(StatedError, match=r"preprocessor_config.json holds list, not a configuration"):
        said_in(tmp_path)
