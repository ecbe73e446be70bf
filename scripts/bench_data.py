"""Time the input pipeline beside torchvision's on the same files, in turn: images for each second of a core.

    python scripts/bench_data.py --images shared/data/imagenet_sample.tar
    python scripts/bench_data.py --memory          # 20 epochs of a small folder: does memory grow?
    python scripts/bench_data.py --images photographs/ --json

Every side gives 224 x 224 crops as bytes. torchvision is `PIL` decoding, RandomResizedCrop with bicubic, flip and
PILToTensor, and is handed the boxes and flips that this pipeline draws, so that the work is the same, and the pixels
are compared too. CPU seconds of the whole process are counted, in one thread or many: other users of the machine do not
add to them. A round is one pass over the files by each side; reported are medians over rounds, and of rounds' ratios.
Crops on the device cost the host nothing but the whole image; what they cost the device is in `--device`.
"""

import json
import math
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

from mae_jax.config import AugmentConfig, ModelConfig, PretrainConfig
from mae_jax.data.images.box import choose_box, flips
from mae_jax.data.images.decode import Decoded, Picture, prepare_decoder
from mae_jax.data.prepare import Plan, prepare
from mae_jax.data.sources.source import Source, open_source
from mae_jax.data.stream import training_batches
from mae_jax.errors import StatedError
from mae_jax.rng import host_generator

CONFIG = PretrainConfig(model=ModelConfig(image_size=224), batch_size=40, seed=0, workers=0)
FAST = AugmentConfig(resize="fast")
TORCHVISION = "torchvision, files"


@dataclass(frozen=True)
class Arguments:
    """The input pipeline against torchvision's: images for each second of a core, and how far pixels are off."""

    images: str = "shared/data/imagenet_sample.tar"
    """A tar file or folder of images; where it is absent, 200 synthetic photographs of 500 x 375."""
    rounds: int = 5
    memory: bool = False
    """Only look whether memory grows over 20 epochs."""
    device: bool = False
    """Also time the crops on JAX's first device."""
    json: bool = False
    """Print the result as one line of JSON, in place of the table."""


def unpacked(images: str, folder: Path) -> Path:
    """Return a folder of image files from what was asked for."""
    if Path(images).is_dir():
        return Path(images)
    target = folder / "files"
    target.mkdir()
    if Path(images).exists():
        with tarfile.open(images) as archive:
            archive.extractall(target, filter="data")
    else:
        print(f"{images} is absent: synthetic photographs", file=sys.stderr)
        for number in range(200):
            Image.fromarray(synthetic(375, 500, number)).save(target / f"{number}.jpg", quality=90)
    return target


def synthetic(height: int, width: int, seed: int) -> np.ndarray:
    """Draw smooth colours and some noise, uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)


def prepared(source: Source, spec: str, folder: Path, **changes: Any) -> str:
    """Write a source as records, and return their name as a source."""
    plan = Plan(spec, "train", len(source), **changes)
    prepare(source, plan, str(folder), 0, lambda count: None)
    return f"records:{folder}"


def as_tfds(source: Source, folder: Path) -> str:
    """Write the files of a source as a dataset of TFDS, and return its name as a source."""
    import tensorflow_datasets as tfds

    class BenchImages(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(encoding_format="jpeg")})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager: Any) -> dict[str, Any]:
            del manager
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, bytes]]]:
            for index in range(len(source)):
                yield index, {"image": source.file(index)}

    os.environ["TFDS_DATA_DIR"] = str(folder)
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
        BenchImages(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return "tfds:bench_images"


class Tiled:
    """A sample as if it were a million images: drawing the order of a few hundred takes longer, for each of them."""

    in_memory = False
    class_names = ()

    def __init__(self, source: Source) -> None:
        self._source, self.images = source, len(source)

    def __len__(self) -> int:
        return 2**20 // self.images * self.images

    def name(self, index: int) -> str:
        return self._source.name(index % self.images)

    def label(self, index: int) -> int:
        return self._source.label(index % self.images)

    def file(self, index: int) -> bytes:
        return self._source.file(index % self.images)

    def picture(self, index: int) -> Picture:
        return self._source.picture(index % self.images)

    def load(self, index: int) -> Image.Image:
        return self._source.load(index % self.images)


class Labelled(Tiled):
    """A sample that gives the index of each image as its label, and nothing else."""

    def __init__(self, tiled: Tiled) -> None:
        super().__init__(tiled)
        self.images = tiled.images

    def __len__(self) -> int:
        return len(self._source)

    def label(self, index: int) -> int:
        return index

    def picture(self, index: int) -> Picture:
        return Decoded(Image.new("RGB", (1, 1)))


def ours(spec: str, config: PretrainConfig) -> Callable[[], int]:
    """Return a function that passes over a source once, and returns the number of crops."""
    source = Tiled(open_source(spec, 3))
    steps = math.ceil(source.images * config.repeats / config.batch_size)

    def run() -> int:
        with training_batches(source, config, stop_step=steps) as batches:
            return sum(len(batch["position"]) for batch in batches)

    return run


def torchvision_views(folder: Path) -> Callable[[], list[np.ndarray]]:
    """Return a function that puts the files through torchvision once, with the order and crops of this pipeline."""
    import torch

    # torchvision's wheel wants its own operators, which a CPU build of torch may not load; declared, they will do.
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    torch.set_num_threads(1)
    source = Tiled(open_source(f"folder:{folder}", 3))
    names = [source.name(index) for index in order(source)]

    def run() -> list[np.ndarray]:
        del_library = library  # keeps the declarations alive
        views = []
        for position, name in enumerate(names):
            crop, flip = (host_generator(0, stream, position) for stream in ("crop", "flip"))
            with open(name, "rb") as file:
                image = Image.open(file).convert("RGB")
            left, top, right, bottom = choose_box((image.height, image.width), CONFIG.augment, (224, 224), crop)
            view = F.resized_crop(image, top, left, bottom - top, right - left, [224, 224], InterpolationMode.BICUBIC)
            view = F.hflip(view) if flips(CONFIG.augment, flip) else view
            views.append(F.pil_to_tensor(view).numpy())
        assert del_library is library
        return views

    return run


def order(source: Tiled) -> list[int]:
    """Return the images of the first epoch's beginning, as many as there are files, in the order of the stream."""
    config = replace(CONFIG, crops="device", canvas_size=1)
    with training_batches(Labelled(source), config, stop_step=math.ceil(source.images / config.batch_size)) as batches:
        return [int(index) for batch in batches for index in batch["label"]][: source.images]


def rate(run: Callable[[], Any], images: int) -> float:
    """Return images for each second of a core."""
    began = time.process_time()
    run()
    return images / (time.process_time() - began)


def crops(source: Source, config: PretrainConfig, count: int) -> list[np.ndarray]:
    """Return the first crops of the stream."""
    with training_batches(Tiled(source), config, stop_step=count // config.batch_size) as batches:
        return [image for batch in batches for image in batch["image"]]


def errors(source: Source, config: PretrainConfig, expected: list[np.ndarray]) -> tuple[float, float]:
    """Return the mean absolute difference in grey levels from (channels, height, width): of all, and of the worst."""
    found = crops(source, config, len(expected))
    each = [
        np.abs(image.astype(int) - other.transpose(1, 2, 0).astype(int)).mean()
        for image, other in zip(found, expected, strict=False)
    ]
    return float(np.mean(each)), float(np.max(each))


def bench(arguments: Arguments) -> dict[str, Any]:
    """Time all sides in turn, and compare their pixels."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder = unpacked(arguments.images, work)
        files = f"folder:{folder}"
        source = open_source(files, 3)
        jpeg = prepared(source, files, work / "jpeg")
        keep = prepared(source, files, work / "keep", encoding="keep")
        raw = prepared(source, files, work / "raw", encoding="raw")
        raw_small = prepared(source, files, work / "raw 160", encoding="raw", size=160)
        small = prepared(source, files, work / "small", size=128, quality=90)
        tfds = as_tfds(source, work / "tfds")
        fast, device = replace(CONFIG, augment=FAST), replace(CONFIG, crops="device")
        sides = {
            "files": (files, CONFIG),
            "files, fast": (files, fast),
            "tfds, as stored": (tfds, CONFIG),
            "records, as they were": (keep, CONFIG),
            "records 256": (jpeg, CONFIG),
            "records 256, fast": (jpeg, fast),
            "records 256, repeats 4": (jpeg, replace(CONFIG, repeats=4)),
            "files, crops device": (files, replace(device, augment=FAST)),
            "records 256, crops device": (jpeg, replace(device, augment=FAST)),
            "records 128, crops device of 128": (small, replace(device, augment=FAST, canvas_size=128)),
            "records raw 256, crops device": (raw, device),
            "records raw 160, crops device of 160": (raw_small, replace(device, canvas_size=160)),
        }
        runs: dict[str, Callable[[], Any]] = {name: ours(*side) for name, side in sides.items()}
        reference = torchvision_views(folder)
        rates: dict[str, list[float]] = {name: [] for name in (TORCHVISION, *runs)}
        for _ in range(arguments.rounds):
            Image.core.set_blocks_max(0)  # as it is where nobody has set it
            Image.core.clear_cache()
            rates[TORCHVISION].append(rate(reference, len(source)))
            prepare_decoder()
            for name, run in runs.items():
                shown = math.ceil(len(source) * sides[name][1].repeats / CONFIG.batch_size) * CONFIG.batch_size
                rates[name].append(rate(run, shown))
        expected = reference()
        off = {
            name: errors(open_source(sides[name][0], 3), sides[name][1], expected) for name in ("files", "files, fast")
        }
        exact = crops(open_source(jpeg, 3), CONFIG, len(source))
        off["records 256, fast"] = errors(open_source(jpeg, 3), fast, [image.transpose(2, 0, 1) for image in exact])
    result = {
        name: {
            "images_per_core_second": round(statistics.median(found), 1),
            "ratio": round(statistics.median(x / y for x, y in zip(found, rates[TORCHVISION], strict=True)), 2),
            **({"error": round(off[name][0], 3), "worst_image": round(off[name][1], 3)} if name in off else {}),
        }
        for name, found in rates.items()
    }
    if arguments.device:
        result["device"] = device_crops()
    return result


def device_crops() -> dict[str, Any]:
    """Time how many images a second JAX's first device crops from 256 to 224."""
    import jax

    from mae_jax.train.crops import crop_images

    images = jax.device_put(np.zeros((256, 256, 256, 3), np.uint8))
    crops = jax.device_put(np.tile(np.float32([13, 20, 211, 203, 1]), (256, 1)))
    step = jax.jit(lambda images, crops: crop_images(images, crops, (224, 224)))
    jax.block_until_ready(step(images, crops))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready(step(images, crops))
        times.append(time.perf_counter() - began)
    return {"device": jax.devices()[0].device_kind, "images_per_second": round(256 / statistics.median(times))}


def memory(workers: int) -> list[float]:
    """Measure the resident MB of this process and its workers after each of 20 epochs of a small folder."""
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(400):
            Image.fromarray(synthetic(96, 128, number)).save(f"{temporary}/{number}.jpg")
        source = open_source(f"folder:{temporary}", 3)
        config = replace(CONFIG, workers=workers)
        found = []
        with training_batches(source, config, stop_step=200) as batches:
            for step, _ in enumerate(batches, 1):
                if step % 10 == 0:
                    found.append(sum(resident(pid) for pid in (os.getpid(), *children())))
        return found


def children() -> list[int]:
    """List the processes that this one's threads have started."""
    lists = Path("/proc/self/task").glob("*/children")
    return [int(pid) for found in lists for pid in found.read_text().split()]


def resident(pid: int) -> float:
    """Return the megabytes that a process has in memory, without what it shares with others."""
    pages, shared = (int(Path(f"/proc/{pid}/statm").read_text().split()[i]) for i in (1, 2))
    return (pages - shared) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> int:
    """Print the table, or the memory."""
    arguments = tyro.cli(Arguments)
    try:
        if arguments.memory:
            for workers in (0, 2):
                print(f"{workers} workers, MB after each epoch:", *(f"{size:.1f}" for size in memory(workers)))
            return 0
        result = bench(arguments)
    except StatedError as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(result))
        return 0
    print(f"{'':34}{'images/s a core':>16}{'ratio':>8}{'mean error':>12}{'worst image':>13}")
    for name, row in result.items():
        if name == "device":
            print(f"crops on {row['device']}: {row['images_per_second']} images/s")
            continue
        error = f"{row['error']:12.3f}{row['worst_image']:13.3f}" if "error" in row else ""
        print(f"{name:34}{row['images_per_core_second']:16.0f}{row['ratio']:8.2f}{error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
