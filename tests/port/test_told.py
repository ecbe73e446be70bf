"""What stands beside a checkpoint's tensors, in the words of those who wrote it."""

import json
from pathlib import Path

import pytest

from mae_jax.errors import StatedError
from mae_jax.port.inference import Hints
from mae_jax.port.told import hints_in, normalisation_in, said_in


def test_authors_and_hugging_face_name_the_same_in_two_ways():
    authors = {"input_size": 224, "mask_ratio": 0.75, "norm_pix_loss": True}
    theirs = {"image_size": [32, 64], "num_attention_heads": 4, "decoder_num_attention_heads": 2, "norm_pix_loss": 0}
    assert hints_in(authors, Path("a")) == Hints(image_size=224, mask_ratio=0.75, norm_pix_loss=True)
    assert hints_in(theirs, Path("b")) == Hints(4, 2, (32, 64), norm_pix_loss=False)
    assert hints_in({}, Path("c")) == Hints()


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"num_attention_heads": "12"}, "says encoder_heads '12', which is no int"),
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
    assert normalisation_in(own, said, 1) == ((0.1,), (0.2,))
    assert normalisation_in({}, said, 1) == ((0.3,), (0.4,))
    assert normalisation_in({}, said | {"preprocessor": {}}, 1) == ((0.5,), (0.6,))
    assert normalisation_in(own, said, 3) is None  # of other channels


def test_a_folder_may_say_nothing(tmp_path):
    assert said_in(tmp_path) == {"preprocessor": {}}
    (tmp_path / "config.json").write_text(json.dumps({"mask_ratio": 0.5}))
    assert said_in(tmp_path) == {"mask_ratio": 0.5, "preprocessor": {}}
    (tmp_path / "preprocessor_config.json").write_text("[1]")
    with pytest.raises(StatedError, match=r"preprocessor_config.json holds list, not a configuration"):
        said_in(tmp_path)
