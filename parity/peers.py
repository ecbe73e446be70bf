"""The models of other libraries as references: forward pass, loss and gradients, with the same weights and inputs."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from mae_jax.config import ModelConfig
from mae_jax.models.mae import MaskedAutoencoder
from mae_jax.port.compare import Comparison
from mae_jax.port.keys import Part, Tensors, entries, from_fair, frozen_tables, to_fair
from mae_jax.port.layouts import detect, from_layout, in_decoder, to_layout
from mae_jax.port.receivers.hugging_face import hugging_face
from mae_jax.port.receivers.lightly import lightly
from mae_jax.port.receivers.receiver import Receiver
from mae_jax.port.receivers.timm import timm_model
from mae_jax.port.verify import comparable
from mae_jax.train.step import loss_and_gradients
from parity.bounds import Pair, compare
from parity.sides import Reference
from parity.training import module_of

_declared: list[torch.library.Library] = []  # held, or torch forgets them


def declare_torchvision_operators() -> None:
    """Let torchvision be imported beside a torch that its compiled operators were not built for.

    Its wheel wants a CUDA torch; on another its operators do not load, and Python code that names them raises when it
    is imported. None of them is called here. timm and lightly import torchvision; `mae-jax port` does without this.
    """
    if _declared:
        return
    try:
        import torchvision  # noqa: F401, PLC0415
    except ModuleNotFoundError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)


# Each peer's model with random weights, and how much of ours it has.
PEERS: dict[str, tuple[Part, Callable[[ModelConfig], Receiver]]] = {
    "huggingface": ("all", lambda config: hugging_face(config, "all", None)),
    "timm": ("encoder", lambda config: timm_model(config, None)),
    "lightly": ("all", lambda config: lightly(config, "all", False, None)),
    "lightly-deprecated": ("all", lambda config: lightly(config, "all", True, None)),
}


class Peer:
    """One peer with the reference's weights, and our model with the same."""

    def __init__(self, name: str, reference: Reference) -> None:
        part, make = PEERS[name]
        to = name if name in ("timm", "lightly", "lightly-deprecated") else "huggingface"
        config = comparable(reference.config, to, part)  # type: ignore[arg-type]
        assert config.kind == "mae"
        self.part: Part = part
        self.config = replace(config, dtype=reference.config.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they warn of each other
            self.receiver = make(self.config)
        self.module = self.receiver.module.to(getattr(torch, reference.precision))
        found = detect(self.module.state_dict())
        assert found is not None
        self.layout, self.prefix = found
        weights = {key: values for key, values in reference.weights.items() if part == "all" or not in_decoder(key)}
        self.weights: Tensors = weights | frozen_tables(self.config, part)
        self._load()
        self.params = jax.tree.map(jnp.asarray, from_fair(weights, self.config, part))
        self.torch_images, self.torch_noise = reference.images[0], torch.from_numpy(reference.noise[0])
        self.images = jnp.asarray(reference.images[0].movedim(1, -1).numpy())
        self.noise = jnp.asarray(reference.noise[0])
        shape = (len(self.images), self.config.num_patches + self.config.class_token, self.config.encoder.width)
        self.direction = np.random.default_rng(1).standard_normal(shape)  # in which an encoder's gradient is taken

    def _load(self) -> None:
        state = {self.prefix + key: values for key, values in to_layout(self.weights, self.layout).items()}
        tensors = {key: torch.from_numpy(np.array(values)) for key, values in state.items()}
        for key, values in self.module.state_dict().items():
            if key.endswith("mask_token") and key not in tensors:
                tensors[key] = values  # of Lightly's encoder, which does not use it here
        self.module.load_state_dict(tensors, strict=True)

    def theirs(self) -> tuple[dict[str, Any], Tensors]:
        """Compute the peer's outputs and its loss's gradient by the authors' names; of an encoder, of one direction."""
        outputs = self.receiver.forward(self.torch_images, self.torch_noise)
        loss = outputs["loss"] if self.part == "all" else (outputs["latent"] * torch.from_numpy(self.direction)).mean()
        trained = {key: p for key, p in self.module.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        gradients = {
            key.removeprefix(self.prefix): values.numpy()
            for key, values in zip(trained, found, strict=True)
            if values is not None
        }
        return outputs, from_layout(gradients, self.layout, self.config, self.part)

    def ours(self) -> tuple[dict[str, Any], Tensors]:
        """Compute our outputs and gradients."""
        model, direction = MaskedAutoencoder(self.config), jnp.asarray(self.direction, self.images.dtype)

        @jax.jit
        def encoder(params: Any) -> tuple[Any, Any]:
            def along(params: Any) -> tuple[jax.Array, jax.Array]:
                latent = model.apply({"params": params}, self.images, method="encode")
                assert isinstance(latent, jax.Array)
                return (latent * direction).mean(), latent

            (_, latent), gradients = jax.value_and_grad(along, has_aux=True)(params)
            return {"latent": latent}, gradients

        @jax.jit
        def whole(params: Any) -> tuple[Any, Any]:
            output: Any = model.apply({"params": params}, self.images, self.noise)
            gradients = loss_and_gradients(model, params, self.images, self.noise)[1]
            return {"latent": output.latent, "pred": output.pred, "loss": output.loss}, gradients

        outputs, gradients = (encoder if self.part == "encoder" else whole)(self.params)
        return outputs, to_fair(gradients, self.config, self.part)


def run(name: str, reference: Reference) -> Iterator[list[Comparison]]:
    """Compare each output with a peer's, then the gradient of each tensor."""
    with jax.enable_x64(reference.precision == "float64"), jax.default_matmul_precision("highest"):
        peer = Peer(name, reference)
        theirs, their_gradients = peer.theirs()
        ours, our_gradients = peer.ours()
        library = peer.receiver.library
        yield [
            compare(Pair(key, f"{library}, {key}", ours[key], values, "forward"), reference.precision)
            for key, values in theirs.items()
        ]
        for key in (entry.key for entry in entries(peer.config, peer.part)):
            pair = Pair(f"gradient {module_of(key)}", key, our_gradients[key], their_gradients[key], "gradient")
            yield [compare(pair, reference.precision)]
