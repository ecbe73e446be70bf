"""Real datasets, built here by TFDS with builders of our own, and read back by name. No TensorFlow anywhere."""

import io
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mae_jax.config import ModelConfig, PretrainConfig
from mae_jax.data.images.decode import JpegPicture, to_array
from mae_jax.data.loader import join
from mae_jax.data.sources.digits import DigitsSource
from mae_jax.data.sources.source import open_source
from mae_jax.data.stream import training_batches
from tests.data.photographs import photograph
from tests.refusals import refused


def encoded(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


class Builder(tfds.core.GeneratorBasedBuilder):
    """TFDS looks for files beside the builder's code with a package that it does not install; there are none."""

    code_path = None
    pkg_dir_path = Path(__file__).parent


class SmallDigits(Builder):
    """The bundled digits as PNG, with classes and a feature that nobody asks for."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
        features = {
            "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
            "label": tfds.features.ClassLabel(num_classes=10),
            "name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager: Any) -> dict[str, Any]:
        del manager
        return {"train": self._generate_examples(0, 200), "test": self._generate_examples(200, 230)}

    def _generate_examples(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        source = DigitsSource()
        for i in range(start, stop):
            yield i, {"image": source.file(i), "label": source.label(i), "name": source.name(i)}


class SmallPhotographs(Builder):
    """Colour photographs as JPEG, named otherwise, without classes; two configurations; a split with a broken file."""

    VERSION = tfds.core.Version("2.1.0")
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="plain"), tfds.core.BuilderConfig(name="other"))

    def _info(self) -> Any:
        objects = tfds.features.Sequence({"bbox": tfds.features.BBoxFeature()})
        features = tfds.features.FeaturesDict(
            {"photo": tfds.features.Image(encoding_format="jpeg"), "objects": objects}
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager: Any) -> dict[str, Any]:
        del manager
        return {"train": self._generate_examples(30), "validation": self._generate_examples(5)}

    def _generate_examples(self, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(count):
            data = encoded(Image.fromarray(photograph(40 + i, 60, i)), "JPEG")
            yield i, {"photo": data if i != 4 else b"not a picture", "objects": []}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    for builder in (SmallDigits, SmallPhotographs):
        builder(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture(autouse=True)
def here(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))


def test_digits_come_back() -> None:
    source, digits = open_source("tfds:small_digits", 1), DigitsSource()
    assert len(source) == 200
    assert source.class_names == tuple("0123456789")
    found = sorted((to_array(source.load(i)).tobytes(), source.label(i)) for i in range(200))
    assert found == sorted((to_array(digits.load(i)).tobytes(), digits.label(i)) for i in range(200))


@pytest.mark.parametrize(
    ("split", "count"), [("train[:10%]", 20), ("train[50:53]", 3), ("test", 30), ("train+test", 230)]
)
def test_split_syntax(split: str, count: int) -> None:
    assert len(open_source(f"tfds:small_digits@{split}", 1)) == count


def test_val_is_whatever_is_held_out() -> None:
    assert len(open_source("tfds:small_digits", 1, "val")) == 30
    assert len(open_source("tfds:small_digits@train[:5]", 1, "val")) == 30
    assert len(open_source("tfds:small_photographs/plain", 3, "val")) == 5


def test_photographs_are_handed_on_undecoded() -> None:
    source = open_source("tfds:small_photographs/plain:2.1.0", 3)
    assert source.class_names == ()
    assert source.label(0) == -1
    sizes = set()
    for i in range(len(source)):
        if source.file(i) == b"not a picture":
            continue
        assert source.file(i)[:2] == b"\xff\xd8"
        picture = source.picture(i)
        assert isinstance(picture, JpegPicture)
        sizes.add(picture.size_hw)
    assert sizes == {(40 + i, 60) for i in range(30) if i != 4}


def test_workers_read_the_same_and_broken_records_are_passed_over() -> None:
    source = open_source("tfds:small_photographs/plain", 3)
    config = PretrainConfig(model=ModelConfig(image_size=16, patch_size=8), batch_size=15, workers=0)
    batches = []
    for workers in (0, 2):
        with training_batches(source, replace(config, workers=workers), stop_step=2) as stream:
            batches.append(join(list(stream)))
    assert (batches[0]["image"] == batches[1]["image"]).all()
    (broken,) = batches[0]["broken"][batches[0]["broken"] >= 0]
    assert source.file(int(broken)) == b"not a picture"
    assert source.name(int(broken)) == f"tfds:small_photographs/plain@train, record {broken}"


def test_it_is_small_to_send() -> None:
    source = open_source("tfds:small_digits", 1)
    source.load(3)
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    assert source.file(7) == pickle.loads(sent).file(7)


def test_what_is_not_prepared_names_the_command(data_dir: Path) -> None:
    command = f"tfds build imagenet2012 --file_format=array_record --data_dir={data_dir}"
    with refused("data", f"is not in {data_dir}. Prepare it with `{command}`"):
        open_source("tfds:imagenet2012", 3)


@pytest.mark.parametrize("spec", ["voc/2012", "small_digits:9.9.9", "small_photographs/third"])
def test_other_names_that_are_not_there(spec: str) -> None:
    with refused("data"):
        open_source(f"tfds:{spec}", 3)


def test_what_is_no_name() -> None:
    with refused("data", "is no name of a dataset"):
        open_source("tfds:no such name!", 3)


def test_tfrecord_says_what_to_do(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = json.loads((data_dir / "small_digits/1.0.0/dataset_info.json").read_text()) | {"fileFormat": "tfrecord"}
    folder = tmp_path / "small_digits/1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps(about))
    (folder / "features.json").write_bytes((data_dir / "small_digits/1.0.0/features.json").read_bytes())
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with refused("data", "as tfrecord, which cannot be read in any order", "--file_format=array_record"):
        open_source("tfds:small_digits", 1)


@pytest.mark.parametrize("split", ["nothing", "train[:x%]", "train[:0]"])
def test_splits_that_are_not_there(split: str) -> None:
    with refused("data", "small_digits"):
        open_source(f"tfds:small_digits@{split}", 1)


def test_no_tensorflow() -> None:
    code = (
        "import sys\nfrom mae_jax.data.sources.source import open_source\n"
        "source = open_source('tfds:small_digits@train[:10]', 1); source.load(3)\n"
        "print(len(source), [name for name in ('tensorflow', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("10 []\n", "")


def test_grey_and_colour(data_dir: Path) -> None:
    source = open_source("tfds:small_digits", 3)
    assert np.asarray(source.load(0)).shape == (8, 8, 3)
