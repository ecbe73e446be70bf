"""Small real image files, and the larger samples where they are present."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.data.photographs import photograph


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of JPEG files in classes `a` and `b`, of which those in `broken` are not images."""

    def make(name: str, count: int, broken: tuple[int, ...] = ()) -> Path:
        root = tmp_path / name
        for i in range(count):
            path = root / "ab"[i * 2 // count] / f"{i:03}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            if i in broken:
                path.write_text("not an image")
            else:
                Image.fromarray(photograph(40 + i % 7, 60 - i % 5, seed=i)).save(path, quality=90)
        return root

    return make


def _unpacked(name: str, factory: pytest.TempPathFactory) -> Path:
    for folder in Path(__file__).resolve().parents:
        if (path := folder / "shared" / "data" / name).exists():
            target = factory.mktemp(path.name.split(".")[0])
            with tarfile.open(path) as archive:
                archive.extractall(target, filter="data")
            return target
    pytest.skip(f"there is no shared/data/{name} beside the repository or above it")


@pytest.fixture(scope="session")
def imagenet_sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 ImageNet photographs as they come."""
    return _unpacked("imagenet_sample.tar", tmp_path_factory)


@pytest.fixture(scope="session")
def cifar10_val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4,999 CIFAR-10 images, `val/<class>/*.jpg`."""
    return _unpacked("cifar10_val.tar.xz", tmp_path_factory)
