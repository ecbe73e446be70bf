"""Sources by name, and folders in every shape."""

import os
import pickle
from pathlib import Path

import pytest
from PIL import Image

from mae_jax.data.images.decode import BrokenImage
from mae_jax.data.sources.folder import FolderSource
from mae_jax.data.sources.source import open_source
from tests.refusals import refused


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4)).save(path)
    return path


def names(source: FolderSource, root: Path) -> list[str]:
    return [os.path.relpath(source.name(i), root) for i in range(len(source))]


def test_classes_below_the_split(tmp_path: Path) -> None:
    for name in ("train/dog/2.jpg", "train/cat/deep/er/1.PNG", "train/cat/0.JPeG", "val/cat/9.jpg", "train/loose.webp"):
        image(tmp_path / name)
    (tmp_path / "train/cat/readme.txt").write_text("no image")
    source = open_source(f"folder:{tmp_path}", 3)
    assert source.class_names == ("cat", "dog")
    found = {source.name(i): source.label(i) for i in range(len(source))}
    assert found == {
        str(tmp_path / "train/cat/0.JPeG"): 0,
        str(tmp_path / "train/cat/deep/er/1.PNG"): 0,
        str(tmp_path / "train/dog/2.jpg"): 1,
        str(tmp_path / "train/loose.webp"): -1,
    }
    assert source.load(0).size == (6, 4)
    assert open_source(f"folder:{tmp_path}", 3, "val").class_names == ("cat",)


def test_without_a_train_folder_the_root_is_used(tmp_path: Path) -> None:
    image(tmp_path / "b/1.jpg")
    image(tmp_path / "a/1.jpg")
    source = FolderSource(str(tmp_path))
    assert names(source, tmp_path) == ["a/1.jpg", "b/1.jpg"]
    assert source.class_names == ("a", "b")


def test_flat_folder_has_no_classes(tmp_path: Path) -> None:
    for i in (2, 0, 1):
        image(tmp_path / f"{i}.jpg")
    source = FolderSource(str(tmp_path))
    assert names(source, tmp_path) == ["0.jpg", "1.jpg", "2.jpg"]
    assert source.class_names == ()
    assert source.label(1) == -1


def test_a_path_relative_to_home_or_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(tmp_path / "pictures/1.jpg")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for spec in ("folder:~/pictures", "folder:pictures"):
        assert open_source(spec, 3).name(0) == str(tmp_path / "pictures/1.jpg")


def test_names_in_any_alphabet_and_not_in_unicode(tmp_path: Path) -> None:
    for name in ("猫/写真 1.jpg", "кошка/ё.jpg", "a/😀\n.jpg"):
        image(tmp_path / name)
    strange = os.path.join(os.fsencode(tmp_path), b"a", b"\xff.jpg")
    os.link(image(tmp_path / "a/plain.jpg"), strange)
    source = pickle.loads(pickle.dumps(FolderSource(str(tmp_path))))
    assert len(source) == 5
    assert source.class_names == ("a", "кошка", "猫")
    for i in range(5):
        source.load(i)


def test_links_are_followed_and_their_cycles_are_not(tmp_path: Path) -> None:
    root = tmp_path / "root"
    image(root / "a/1.jpg")
    image(tmp_path / "elsewhere/2.jpg")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a/3.jpg").symlink_to(tmp_path / "elsewhere/2.jpg")
    (root / "a/up").symlink_to(root)
    (root / "a/here").symlink_to(root / "a")
    (tmp_path / "elsewhere/back").symlink_to(root)
    assert names(FolderSource(str(root)), root) == ["a/1.jpg", "a/3.jpg", "b/2.jpg"]


def test_what_only_looks_like_an_image(tmp_path: Path) -> None:
    image(tmp_path / "folder.jpg/inside.png")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    image(tmp_path / ".hidden.jpg")
    image(tmp_path / ".thumbnails/1.jpg")
    source = FolderSource(str(tmp_path))
    assert names(source, tmp_path) == ["folder.jpg/inside.png", "gone.jpg"]
    with pytest.raises(BrokenImage, match="No such file"):
        source.load(1)


def test_errors_say_what_was_looked_for(tmp_path: Path) -> None:
    with refused("data", "no such folder"):
        open_source(f"folder:{tmp_path}/missing", 3)
    with refused("data", "has no image files", ".jpg"):
        open_source(f"folder:{tmp_path}", 3)
    image(tmp_path / "1.jpg")
    with refused("split", "no split 'val'", f"{tmp_path}/val"):
        open_source(f"folder:{tmp_path}", 3, "val")
    with refused("model.in_channels"):
        open_source(f"folder:{tmp_path}", 4)


@pytest.mark.parametrize("spec", ["", "folder", "folder:", "digit", "digits:x", "tfds:"])
def test_an_unknown_source_lists_what_there_is(spec: str) -> None:
    with refused("data", "digits, or folder:PATH"):
        open_source(spec, 1)


def test_a_large_folder_is_small_to_send(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"class{i}").mkdir()
        for j in range(100):
            (tmp_path / f"class{i}" / f"image_{j:06}.jpg").touch()
    source = FolderSource(str(tmp_path))
    assert len(source) == 2000
    assert len(pickle.dumps(source)) < 2000 * 50
