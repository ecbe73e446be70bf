"""A library that receives our weights, as `verify` sees it: its module, and how it is fed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Names of what is compared: of a masked autoencoder latent, pred and loss; of an encoder latent, where every patch is
# visible; of a classifier logits.
Outputs = dict[str, "torch.Tensor"]
Forward = Callable[["torch.Tensor", "torch.Tensor"], Outputs]  # images (B, C, H, W), noise (B, L)


@dataclass(frozen=True)
class Receiver:
    """A library's module, and how to run it."""

    library: str
    module: "torch.nn.Module"
    forward: Forward


class NotInstalledError(Exception):
    """The library is not there, or cannot be imported; the message says which."""


def as_torch(tensors: Mapping[str, Any]) -> dict[str, "torch.Tensor"]:
    """Turn NumPy arrays into float32 tensors, or float64 where they are."""
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    wide = {key: values if values.dtype == np.float64 else values.astype(np.float32) for key, values in tensors.items()}
    return {key: torch.from_numpy(np.array(values)) for key, values in wide.items()}
