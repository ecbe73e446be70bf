"""Pretrain on CIFAR-10 in JAX and in PyTorch, side by side, and measure what each encoder is worth.

    python scripts/compare_cifar10.py --data folder:PATH        # PATH/train/<class>/*.jpg and PATH/val/<class>/*.jpg

Both sides get the same initial weights, batches and mask noise: the PyTorch one is the reference in parity/, fed by
this project's pipeline. Then both encoders, and one that was never trained, are probed, fine-tuned and asked for
nearest neighbours by the same commands. The model is `cifar10_tiny` cut down to what a CPU trains in minutes.

Writes losses.png, table.md and every run into --out. Run again, it goes on where it stopped.
"""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import tyro

from mae_jax.config import AugmentConfig, FinetuneConfig, ModelConfig, OptimConfig, PretrainConfig, TransformerConfig


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to run, and for how long."""

    data: str
    out: Path = Path("runs/compare_cifar10")
    seeds: tuple[int, ...] = (0,)
    pretrain_epochs: float = 8
    probe_epochs: float = 2
    finetune_epochs: float = 2


def recipe(arguments: Arguments, seed: int) -> PretrainConfig:
    """Return cifar10_tiny with patches of 4, a third of its depth and two thirds of its width."""
    return PretrainConfig(
        model=ModelConfig(
            image_size=32,
            patch_size=4,
            encoder=TransformerConfig(width=128, depth=4, heads=4),
            decoder=TransformerConfig(width=64, depth=2, heads=4),
        ),
        augment=AugmentConfig(crop="center", flip=False, mean=(0.5,) * 3, std=(0.5,) * 3),
        optim=OptimConfig(base_lr=1e-3, warmup_epochs=0.5),
        data=arguments.data,
        batch_size=256,
        epochs=arguments.pretrain_epochs,
        seed=seed,
        workdir=str(arguments.out / f"jax_{seed}"),
        log_every=1,
        save_every=200,
        reconstruct_every=None,
        workers=0,
    )


def pretrain_torch(config: PretrainConfig, folder: Path) -> None:
    """Train the reference on the same batches and noise, from the same weights; writes losses.json and torch.pth."""
    import jax
    import numpy as np
    import torch

    from mae_jax import rng
    from mae_jax.data.sources.source import open_source
    from mae_jax.data.stream import training_batches
    from mae_jax.port.keys import to_fair
    from mae_jax.train.build import run_length
    from mae_jax.train.step import init_state
    from parity import torch_mae, torch_train

    if (folder / "losses.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    source = open_source(config.data, config.model.in_channels)
    length = run_length(config, len(source))
    model = torch_mae.MaskedAutoencoder(config.model)
    weights = to_fair(jax.device_get(init_state(config).params), config.model)
    model.load_state_dict({name: torch.from_numpy(np.array(values)) for name, values in weights.items()})
    optimizer, losses = torch_train.adamw(model, config.optim), []
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (config.augment.mean, config.augment.std))
    key, count = rng.device_key(config.seed, "mask"), config.model.num_patches
    draw = jax.jit(lambda positions: rng.example_uniforms(key, positions, count))
    with training_batches(source, config, stop_step=length.steps) as batches:
        for step, batch in enumerate(batches):
            rate = torch_train.learning_rate(
                step,
                config.optim,
                batch_size=config.batch_size,
                steps_per_epoch=length.steps_per_epoch,
                epochs=length.epochs,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            images = torch.from_numpy(batch["image"]).movedim(-1, 1).float().div(255).sub(mean).div(std)
            optimizer.zero_grad()
            loss = model(images, torch.from_numpy(np.array(draw(batch["position"])))).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if step % 50 == 49:
                print(f"torch: step {step + 1}/{length.steps}  loss {losses[-1]:.4f}", flush=True)
    arguments = {
        "encoder_heads": config.model.encoder.heads,
        "decoder_heads": config.model.decoder.heads,
        "image_mean": list(config.augment.mean),
        "image_std": list(config.augment.std),
    }
    torch.save({"model": model.state_dict(), "args": arguments}, folder / "torch.pth")
    (folder / "losses.json").write_text(json.dumps(losses))


def score(config: FinetuneConfig) -> float:
    """Train a classifier, and return its top-1 at the end."""
    from mae_jax.runs.finetune import finetune
    from mae_jax.runs.metrics import read_metrics

    finished = finetune(config)
    if finished.signal is not None:
        sys.exit(128 + finished.signal)
    return [row["top1"] for row in read_metrics(finished.workdir) if "top1" in row][-1]


def transfer(arguments: Arguments, run: PretrainConfig, name: str, init: str | None) -> dict[str, float]:
    """Probe and fine-tune an encoder."""
    shared = {
        "model": run.model,
        "augment": run.augment,
        "data": run.data,
        "seed": run.seed,
        "init": init,
        "workers": 0,
        "log_every": 20,
    }
    probe = FinetuneConfig(
        **shared,
        optim=OptimConfig(optimizer="lars", base_lr=4.0, warmup_epochs=0.2, weight_decay=0.0),
        batch_size=256,
        epochs=arguments.probe_epochs,
        workdir=str(arguments.out / f"probe_{name}_{run.seed}"),
        pooling="mean",
        last_blocks=0,
        batch_norm=True,
        head_std=0.01,
        evaluate_every=arguments.probe_epochs,
    )
    whole = FinetuneConfig(
        **shared,
        optim=OptimConfig(base_lr=1e-3, warmup_epochs=0.2, beta2=0.999),
        batch_size=128,
        epochs=arguments.finetune_epochs,
        workdir=str(arguments.out / f"finetune_{name}_{run.seed}"),
        pooling="class",
        evaluate_every=arguments.finetune_epochs,
    )
    return {"probe": score(probe), "finetune": score(whole)}


def neighbours(source: str, data: str) -> list[float]:
    """Return the 20-NN accuracies that `mae-jax knn` prints: of the encoder, and before training."""
    command = [sys.executable, "-m", "mae_jax.cli", "knn", source, "--data", data]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [float(value) / 100 for value in re.findall(r"([\d.]+)%", printed)]


def plot(losses: dict[str, list[float]], out: Path) -> None:
    """Draw both curves, the second dotted above the first, and below how far they are apart."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(7, 5), layout="constrained", height_ratios=(3, 1), sharex=True
    )
    for (name, values), style in zip(losses.items(), ("-", ":"), strict=True):
        above.plot(range(1, len(values) + 1), values, style, label=name, linewidth=1.5)
    ours, theirs = (np.array(values) for values in losses.values())
    below.semilogy(range(1, len(ours) + 1), np.maximum(np.abs(ours - theirs) / theirs, 1e-9), linewidth=0.8)
    above.set(ylabel="loss of a batch")
    below.set(xlabel="step", ylabel="apart, relative")
    above.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=110)


def main(arguments: Arguments) -> None:
    """Compare with all seeds; the table is written anew after each."""
    from mae_jax.runs.metrics import read_metrics
    from mae_jax.runs.pretrain import pretrain

    rows = []
    for seed in arguments.seeds:
        config = recipe(arguments, seed)
        finished = pretrain(config)
        if finished.signal is not None:
            sys.exit(128 + finished.signal)
        theirs = arguments.out / f"torch_{seed}"
        pretrain_torch(config, theirs)
        losses = {
            "mae_jax": [row["loss"] for row in read_metrics(finished.workdir) if "loss" in row],
            "PyTorch": json.loads((theirs / "losses.json").read_text()),
        }
        plot(losses, arguments.out / f"losses_{seed}.png")
        inits = {"none": None, "mae_jax": str(finished.workdir), "PyTorch": str(theirs / "torch.pth")}
        found = {name: transfer(arguments, config, name, init) for name, init in inits.items()}
        asked = {name: neighbours(init, arguments.data) for name, init in inits.items() if init}
        found["mae_jax"]["knn"], found["none"]["knn"] = asked["mae_jax"][:2]
        found["PyTorch"]["knn"] = asked["PyTorch"][0]
        for name, scores in found.items():
            last = f"{losses[name][-1]:.4f}" if name in losses else ""
            rows.append(
                f"| {seed} | {name} | {last} | "
                + " | ".join(f"{scores[k]:.2%}" for k in ("knn", "probe", "finetune"))
                + " |"
            )
        head = "| seed | pretrained in | last loss | 20-NN | linear probe | fine-tuned |\n|---|---|---|---|---|---|\n"
        (arguments.out / "table.md").write_text(head + "\n".join(rows) + "\n")
        print(head + "\n".join(rows), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
