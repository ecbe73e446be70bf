"""Whole runs: a model, its data, how it is trained, for how long, and where."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from mae_jax.config.checks import require_choices, require_positive, require_whole
from mae_jax.config.model import ClassifierConfig, ModelConfig, Pooling
from mae_jax.config.training import AugmentConfig, MixConfig, OptimConfig


@dataclass(frozen=True, kw_only=True)
class HostConfig:
    """The fields that the hosts of one run may each have for themselves."""

    coordinator: str | None = None  # HOST:PORT of host 0, where several hosts run together
    process_id: int | None = None  # which of them this one is, 0 .. num_processes - 1
    workers: int | None = None  # processes that read and crop; by default as many as the data wants and the cores allow


@dataclass(frozen=True, kw_only=True)
class OperationConfig(HostConfig):
    """The fields of where and how fast a run goes, not of what it computes: they may differ when it continues."""

    workdir: str = "runs/run"
    engine: Literal["pmap", "jit", "fsdp"] = "pmap"  # pmap: one host; fsdp: the state is cut over devices
    devices: int | None = None  # the first so many devices of each host; all by default
    fsdp: int | None = None  # devices that engine fsdp cuts one copy of the state over; by default all
    num_processes: int | None = None  # how many hosts run together; 1: alone, whatever a launcher says
    log_every: int = 50  # steps
    save_every: int = 1000  # steps
    keep: int = 3  # newest checkpoints
    keep_every: int | None = None  # steps: checkpoints at multiples of this are kept for good


@dataclass(frozen=True, kw_only=True)
class PretrainOperation(OperationConfig):
    """The fields of operation of a pretraining run."""

    workdir: str = "runs/pretrain"
    reconstruct_every: int | None = 1000  # steps: a picture of reconstructions into the event file


@dataclass(frozen=True, kw_only=True)
class RunConfig(OperationConfig):
    """The fields of every training run: what is trained, on what, for how long.

    All but those of its `operation` decide what is computed, and must stay the same when a run continues.
    """

    operation: ClassVar[type[OperationConfig]] = OperationConfig

    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    data: str = "digits"  # digits | folder:PATH | tfds:NAME[@SPLIT] | records:PATH
    repeats: int = 1  # crops of each decoded image in a batch (Hoffer et al. 2019); an epoch counts crops
    crops: Literal["host", "device"] = "host"  # where they are cut: device ships whole images, squeezed into a square
    canvas_size: int | None = None  # side of that square; by default 8/7 of the image's longer side
    batch_size: int = 256  # global
    accumulate: int = 1  # gradients of this many equal parts of the batch are averaged before the update
    epochs: float = 800.0
    steps: int | None = None  # in place of epochs
    seed: int = 0
    init: str | None = None  # start from these weights: a run, or a PyTorch checkpoint that `mae-jax port` reads

    def __post_init__(self) -> None:
        require_choices(self)
        require_positive(self, "epochs")
        require_whole(self, "batch_size", "accumulate", "log_every", "save_every", "keep", "repeats")
        for name in ("canvas_size", "steps", "devices", "fsdp", "num_processes", "keep_every"):
            if getattr(self, name) is not None:
                require_whole(self, name)
        if self.keep_every is not None and self.keep_every % self.save_every:
            raise ValueError(f"keep_every {self.keep_every} is not a multiple of save_every {self.save_every}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}")
        if self.batch_size % self.repeats:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by repeats {self.repeats}")
        if self.canvas_size is not None and self.crops == "host":
            raise ValueError(f'canvas_size {self.canvas_size} is for crops "device", crops is "host"')
        if self.crops == "device" and self.augment.distorts:
            raise ValueError(
                f'crops "device" cuts on the device, augment.color_jitter {self.augment.color_jitter} and '
                f"augment.rand_augment {self.augment.rand_augment} work on the host's crops: take one or the other"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed} is outside 0 .. 2^32 - 1")
        if self.fsdp is not None and self.engine != "fsdp":
            raise ValueError(f"fsdp {self.fsdp} needs engine fsdp, not {self.engine}")
        self._check_hosts()
        if not self.workdir:
            raise ValueError('workdir "" is empty: name the folder of the run')
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers {self.workers} must not be negative")
        if len(self.augment.mean) != self.model.in_channels:
            raise ValueError(
                f"augment.mean {self.augment.mean} has {len(self.augment.mean)} values, "
                f"model.in_channels is {self.model.in_channels}"
            )

    @property
    def canvas(self) -> int:
        """Return the side of the square that an image is squeezed into where the device cuts the crops."""
        return self.canvas_size or round(max(self.model.image_hw) * 8 / 7)

    def _check_hosts(self) -> None:
        """Refuse one of coordinator, process_id and num_processes without the others, or values that do not fit."""
        given = {name: getattr(self, name) for name in ("coordinator", "process_id", "num_processes")}
        missing = [name for name, value in given.items() if value is None]
        if 0 < len(missing) < len(given) and self.num_processes != 1:
            there = ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)
            raise ValueError(f"{there} needs {' and '.join(missing)} too")
        if missing or self.num_processes == 1:
            return
        if not 0 <= given["process_id"] < given["num_processes"]:
            raise ValueError(f"process_id {self.process_id} is outside 0 .. num_processes {self.num_processes} - 1")
        host, _, port = given["coordinator"].rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"coordinator {self.coordinator} is not HOST:PORT")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig, PretrainOperation):
    """One pretraining run."""

    kind: ClassVar[Literal["pretraining"]] = "pretraining"
    operation: ClassVar[type[OperationConfig]] = PretrainOperation

    workdir: str = PretrainOperation.workdir  # once more: RunConfig's default comes first in the order of bases

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reconstruct_every is not None:
            require_whole(self, "reconstruct_every")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """One run of a classifier on an encoder: fine-tuned, in part or whole, or linear probing."""

    kind: ClassVar[Literal["classification"]] = "classification"

    workdir: str = "runs/finetune"
    pooling: Pooling = "mean"
    classes: int | None = None  # by default those of the data
    drop_path: float = 0.0  # of the last block; the rate rises from 0 (Huang et al. 2016)
    layer_decay: float = 1.0  # each block learns so many times slower than the next (Clark et al. 2020)
    last_blocks: int | None = None  # train these and the head alone; 0: linear probing
    batch_norm: bool = False  # normalise features in front of the head, without scale and bias (appendix A.1)
    sweep: tuple[float, ...] = ()  # base rates of as many heads, in place of optim.base_lr; all learn at once
    head_std: float = 2e-5  # of the head's first weights
    mix: MixConfig = MixConfig()
    holdout: int = 5  # where data has no split val, one image of so many is kept from training to evaluate on
    evaluate_every: float = 1.0  # epochs

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "head_std", "evaluate_every")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay {self.layer_decay} is outside (0, 1]")
        depth = self.model.encoder.depth
        if self.last_blocks is not None and not 0 <= self.last_blocks <= depth:
            raise ValueError(f"last_blocks {self.last_blocks} is not in 0 .. {depth}, the encoder's depth")
        if self.holdout < 2:
            raise ValueError(f"holdout {self.holdout} must be 2 or more: one image of so many is kept from training")
        for name in ("batch_norm", "sweep"):
            if getattr(self, name) and self.last_blocks != 0:
                raise ValueError(f"{name} {getattr(self, name)} is for linear probing: it needs last_blocks 0")
        if self.batch_norm and self.accumulate > 1:
            raise ValueError(
                f"batch_norm takes its statistics of the whole batch: accumulate {self.accumulate} is not 1"
            )
        if not all(0 < rate < math.inf for rate in self.sweep) or len(set(self.sweep)) < len(self.sweep):
            raise ValueError(f"sweep {self.sweep} must be different rates, positive and finite")
        if self.sweep and self.optim.min_lr > 0:
            raise ValueError(f"sweep {self.sweep} scales whole curves: optim.min_lr {self.optim.min_lr} must be 0")
        if self.mix.mixes and self.repeats > 1:
            raise ValueError(f"mixup and cutmix would mix an image with itself: repeats {self.repeats} is not 1")
        if self.classes is not None:
            _ = self.classifier

    @property
    def classifier(self) -> ClassifierConfig:
        """Return the configuration of the model.

        Raises:
          ValueError: `classes` is not known yet, or the model has no such classifier.
        """
        if self.classes is None:
            raise ValueError("classes is not known yet")
        return ClassifierConfig(self.model, self.classes, self.pooling, self.drop_path)


Run = PretrainConfig | FinetuneConfig  # which of the two: its `kind`
