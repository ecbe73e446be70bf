"""A trace finds at which layer two models part: ports that are not this project's model, with mistakes planted."""

import copy
import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

import parity
from mae_jax.errors import StatedError
from parity import __main__ as command
from parity.tracing.captures import Value, merges
from parity.tracing.pairing import Layouts, pair_values
from tests.peers import peer

F = torch.nn.functional


def tree(state: Mapping[str, Any]) -> dict[str, Any]:
    """PyTorch's parameters as linen's, the modules by their own names: what a port's own conversion does."""
    found: dict[str, Any] = {}
    for name, tensor in state.items():
        *path, kind = name.split(".")
        inner = found
        for part in path:
            inner = inner.setdefault(part, {})
        values = tensor.detach().numpy().copy()
        if kind == "weight":
            kind, values = ("kernel", np.moveaxis(values, (0, 1), (-1, -2))) if values.ndim > 1 else ("scale", values)
        inner[kind] = values
    return found


def randomised(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module with all parameters drawn, so that no bias is zero and no scale one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
            if parameter.ndim == 1:
                parameter += 0.5
    return module


# A vision transformer of timm.


@dataclass(frozen=True)
class Mistakes:
    tanh: bool = False
    epsilon: float = 1e-6
    swapped: bool = False
    scaled: bool = True


class Attention(nn.Module):
    mistakes: Mistakes

    @nn.compact
    def __call__(self, x):
        q, k, v = jnp.moveaxis(nn.Dense(96, name="qkv")(x).reshape(*x.shape[:2], 3, 2, 16), (2, 3), (0, 2))
        if self.mistakes.swapped:
            q, k = k, q
        weights = nn.softmax(q @ k.swapaxes(-1, -2) * (16**-0.5 if self.mistakes.scaled else 1.0))
        return nn.Dense(32, name="proj")((weights @ v).swapaxes(1, 2).reshape(x.shape))


class Mlp(nn.Module):
    mistakes: Mistakes

    @nn.compact
    def __call__(self, x):
        return nn.Dense(32, name="fc2")(nn.gelu(nn.Dense(128, name="fc1")(x), approximate=self.mistakes.tanh))


class Block(nn.Module):
    mistakes: Mistakes

    @nn.compact
    def __call__(self, x):
        x = x + Attention(self.mistakes, name="attn")(nn.LayerNorm(self.mistakes.epsilon, name="norm1")(x))
        return x + Mlp(self.mistakes, name="mlp")(nn.LayerNorm(self.mistakes.epsilon, name="norm2")(x))


class ViT(nn.Module):
    mistakes: tuple[Mistakes, Mistakes] = (Mistakes(), Mistakes())

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(32, (8, 8), (8, 8), name="patch_embed")(images).reshape(len(images), -1, 32)
        token = self.param("cls_token", nn.initializers.zeros, (1, 1, 32))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, 32)), x], 1)
        x = x + self.param("pos_embed", nn.initializers.zeros, (1, 17, 32))
        for i, mistakes in enumerate(self.mistakes):
            x = Block(mistakes, name=f"blocks_{i}")(x)
        return nn.Dense(5, name="head")(nn.LayerNorm(1e-6, name="norm")(x)[:, 0])


@pytest.fixture(scope="module")
def vit() -> tuple[Any, ...]:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("the model is timm's, which is not installed")
    transformer = peer("timm.models.vision_transformer")
    torch.manual_seed(0)
    theirs = transformer.VisionTransformer(32, 8, embed_dim=32, depth=2, num_heads=2, num_classes=5).eval()
    randomised(theirs)
    params = tree(theirs.state_dict())
    params |= {f"blocks_{name}": block for name, block in params.pop("blocks").items()}
    params["patch_embed"] = params["patch_embed"]["proj"]
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    return {"params": params}, theirs, (images,), (images.transpose(0, 3, 1, 2),)


def port(vit: tuple[Any, ...], *mistakes: Mistakes) -> Any:
    variables, theirs, inputs, torch_inputs = vit
    model = ViT(mistakes) if mistakes else ViT()
    return parity.trace(model, variables, theirs, inputs, torch_inputs, layouts="NCHW->NHWC")


def test_a_faithful_vit_agrees_everywhere(vit):
    report = port(vit)
    assert report.passed, str(report)
    stages = [result.stage for result in report.results["float32"]]
    assert stages[:5] == ["patch_embed", "blocks_0/norm1", "blocks_0/attn/qkv", "blocks_0/attn/proj", "blocks_0/attn"]
    # Backwards, the model's own parameters once all in it is passed; the inputs last.
    backwards = list(dict.fromkeys(stage for stage in stages if stage.startswith("gradient")))
    assert backwards[:3] == ["gradient (output)", "gradient head", "gradient norm"]
    assert backwards[-4:] == ["gradient patch_embed", "gradient cls_token", "gradient pos_embed", "gradient input[0]"]
    # Every parameter has its partner; values have none where the port computes inline.
    assert report.alone[0] == ()
    assert "blocks.0.mlp.act" in report.alone[1]
    assert not [name for name in report.alone[1] if name.endswith(("weight", "bias"))]


@pytest.mark.parametrize(
    ("mistakes", "stage", "sentence"),
    [
        (
            (Mistakes(), Mistakes(tanh=True)),
            "blocks_1/mlp/fc2",
            "departs already: it arises after 'blocks_1/mlp/fc1', which agrees. PyTorch has 'blocks.1.mlp.act'",
        ),
        ((Mistakes(), Mistakes(epsilon=1e-5)), "blocks_1/norm1", "Its input agrees"),
        ((Mistakes(swapped=True), Mistakes()), "blocks_0/attn/proj", "after 'blocks_0/attn/qkv'"),
        ((Mistakes(), Mistakes(scaled=False)), "blocks_1/attn/proj", "after 'blocks_1/attn/qkv'"),
    ],
    ids=["tanh GELU", "epsilon", "q and k swapped", "no scale"],
)
def test_a_mistake_in_a_vit_is_found_where_it_is(vit, mistakes, stage, sentence):
    report = port(vit, *mistakes)
    assert not report.passed
    assert report.first_departure.stage == stage
    assert report.first_departure.tensor == stage.replace("blocks_", "blocks.").replace("/", ".")
    assert sentence in report.verdict
    assert report.verdict in str(report)


# A residual network whose BatchNorms are in training mode.


class TorchResNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(8)
        self.relu = torch.nn.ReLU(inplace=True)
        self.conv2 = torch.nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.bn2 = torch.nn.BatchNorm2d(16)
        self.down = torch.nn.Conv2d(8, 16, 1, stride=2)
        self.fc = torch.nn.Linear(16, 4)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.down(x) + self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


class BatchNorm(nn.Module):
    """As PyTorch's: the running variance is the unbiased one, which linen's is not."""

    momentum: float = 0.1
    epsilon: float = 1e-5
    unbiased: bool = True

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, width)
        var = self.variable("batch_stats", "var", jnp.ones, width)
        scale = self.param("scale", nn.initializers.ones, width)
        bias = self.param("bias", nn.initializers.zeros, width)
        axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
        mean.value += self.momentum * (x.mean(axes) - mean.value)
        factor = count / (count - 1) if self.unbiased else 1.0
        var.value += self.momentum * (x.var(axes) * factor - var.value)
        return (x - x.mean(axes)) * jax.lax.rsqrt(x.var(axes) + self.epsilon) * scale + bias


class ResNet(nn.Module):
    norm: Any = BatchNorm
    padding: Any = 1

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), padding=1, use_bias=False, name="conv1")(x)
        x = nn.relu(self.norm(name="bn1")(x))
        y = self.norm(name="bn2")(nn.Conv(16, (3, 3), 2, self.padding, name="conv2")(x))
        x = nn.relu(nn.Conv(16, (1, 1), 2, name="down")(x) + y)
        return nn.Dense(4, name="fc")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def resnet() -> tuple[Any, ...]:
    theirs = randomised(TorchResNet()).train()
    statistics = {
        f"bn{i}": {"mean": np.zeros(w, np.float32), "var": np.ones(w, np.float32)} for i, w in ((1, 8), (2, 16))
    }
    variables = {"params": tree(dict(theirs.named_parameters())), "batch_stats": statistics}
    images = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    return variables, theirs, (images,), (images.transpose(0, 3, 1, 2),)


def test_a_faithful_residual_network_agrees_in_training_mode(resnet):
    report = parity.trace(ResNet(), *resnet, layouts="NCHW->NHWC")
    assert report.passed, str(report)
    tensors = [(result.stage, result.tensor) for result in report.results["float64"]]
    assert tensors[1:4] == [("bn1", "bn1"), ("bn1", "bn1.running_mean"), ("bn1", "bn1.running_var")]
    assert report.alone == ((), ("relu", "relu#2"))


@pytest.mark.parametrize(
    ("model", "stage", "tensor"),
    [
        (ResNet(partial(BatchNorm, momentum=0.9)), "bn1", "bn1.running_mean"),
        (ResNet(partial(BatchNorm, unbiased=False)), "bn1", "bn1.running_var"),
        (ResNet(partial(nn.BatchNorm, False, momentum=0.9)), "bn1", "bn1.running_var"),
        (ResNet(partial(BatchNorm, epsilon=1e-3)), "bn1", "bn1"),
        (ResNet(padding="SAME"), "conv2", "conv2"),
    ],
    ids=["momentum", "biased variance", "linen's", "epsilon", "padding"],
)
def test_a_mistake_in_a_residual_network_is_found_where_it_is(resnet, model, stage, tensor):
    first = parity.trace(model, *resnet, layouts="NCHW->NHWC").first_departure
    assert (first.stage, first.tensor) == (stage, tensor)


def test_one_side_alone_in_training_mode_is_named(resnet):
    variables, theirs, *inputs = resnet
    report = parity.trace(ResNet(), variables, theirs.eval(), *inputs, layouts="NCHW->NHWC")
    theirs.train()
    assert report.first_departure.stage == "bn1"
    assert "Only Flax updates 'bn1/mean' ('bn1.running_mean'): the other side does not train." in report.notes


def test_a_layout_that_is_not_given_is_asked_for(resnet):
    """Eight channels of 8 x 8 look the same in either layout, four do not."""
    assert parity.trace(ResNet(), *resnet).first_departure.stage == "conv1"

    theirs = randomised(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)))
    variables = {"params": {"layers_0": tree(theirs.state_dict())["0"]}}
    report = parity.trace(nn.Sequential([nn.Conv(4, (1, 1))]), variables, theirs, *resnet[2:])
    assert (report.first_departure.stage, report.first_departure.tensor) == ("layers_0", "0")
    assert report.first_departure.fault == (
        "shape (2, 8, 8, 4) in Flax, (2, 4, 8, 8) in PyTorch, the same in another order: see layouts"
    )


# A decoder of torch.nn with a causal mask.


class TorchDecoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 16)
        layer = torch.nn.TransformerDecoderLayer(16, 2, 24, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = torch.nn.ModuleList([layer, copy.deepcopy(layer)])
        self.head = torch.nn.Linear(16, 11)

    def forward(self, tokens, memory):
        x = self.embed(tokens)
        mask = torch.nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for layer in self.layers:
            x = layer(x, memory, tgt_mask=mask)
        return self.head(x)


class Heads(nn.Module):
    """Attention with two heads, of 8 each; `ahead` is how many tokens after its own one sees."""

    ahead: int | None = None

    @nn.compact
    def __call__(self, x, memory):
        q = nn.Dense(16, name="q")(x).reshape(*x.shape[:2], 2, 8)
        k, v = (nn.Dense(16, name=name)(memory).reshape(*memory.shape[:2], 2, 8) for name in ("k", "v"))
        weights = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(8)
        if self.ahead is not None:
            weights = jnp.where(jnp.tri(*weights.shape[-2:], self.ahead, dtype=bool), weights, -jnp.inf)
        values = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(weights), v)
        return nn.Dense(16, name="out")(values.reshape(x.shape))


class DecoderLayer(nn.Module):
    ahead: int

    @nn.compact
    def __call__(self, x, memory):
        y = nn.LayerNorm(1e-5, name="norm1")(x)
        x = x + Heads(self.ahead, name="self_attn")(y, y)
        x = x + Heads(name="multihead_attn")(nn.LayerNorm(1e-5, name="norm2")(x), memory)
        y = nn.relu(nn.Dense(24, name="linear1")(nn.LayerNorm(1e-5, name="norm3")(x)))
        return x + nn.Dense(16, name="linear2")(y)


class Decoder(nn.Module):
    ahead: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, tokens, memory):
        x = nn.Embed(11, 16, name="embed")(tokens)
        for i, ahead in enumerate(self.ahead):
            x = DecoderLayer(ahead, name=f"layers_{i}")(x, memory)
        return nn.Dense(11, name="head")(x)


@pytest.fixture(scope="module")
def decoder() -> tuple[Any, ...]:
    theirs = randomised(TorchDecoder()).eval()
    params = tree(theirs.state_dict())
    params["embed"] = {"embedding": params["embed"]["kernel"].T}
    params |= {f"layers_{name}": layer for name, layer in params.pop("layers").items()}
    for layer in (params["layers_0"], params["layers_1"]):
        for name in ("self_attn", "multihead_attn"):
            heads = layer[name]
            weights, biases = (np.split(heads[key], 3) for key in ("in_proj_weight", "in_proj_bias"))
            layer[name] = {"out": heads["out_proj"]} | {
                key: {"kernel": weight.T, "bias": bias}
                for key, weight, bias in zip("qkv", weights, biases, strict=True)
            }
    random = np.random.default_rng(0)
    return {"params": params}, theirs, (random.integers(0, 11, (2, 6)), random.standard_normal((2, 5, 16)))


def test_a_faithful_decoder_agrees_everywhere(decoder):
    report = parity.trace(Decoder(), *decoder)
    assert report.passed, str(report)
    pairs = {result.stage: result.tensor for result in report.results["float64"]}
    assert pairs["layers_0/self_attn"] == "layers.0.self_attn[0]"
    assert "gradient embed" in pairs
    # PyTorch has one weight for three of the port's: they are named, not guessed.
    assert {"layers_1/self_attn/q/kernel", "layers_0/self_attn/out/kernel"} <= {*report.alone[0]}
    assert {"layers.1.self_attn.in_proj_weight", "layers.0.self_attn.out_proj.weight"} <= {*report.alone[1]}


def test_a_mask_that_is_off_by_one_is_found_in_its_layer(decoder):
    report = parity.trace(Decoder((0, 1)), *decoder)
    assert (report.first_departure.stage, report.first_departure.tensor) == (
        "layers_1/self_attn",
        "layers.1.self_attn[0]",
    )
    assert "Its input agrees: it arises inside" in report.verdict


def test_the_table_of_names_pairs_what_shape_and_order_do_not(decoder):
    names = {
        "layers_0/self_attn/out/kernel": "layers.0.self_attn.out_proj.weight",
        "layers_0": "layers.0",
        "layers_1/norm2": "layers.1.norm2",
    }
    report = parity.trace(Decoder(), *decoder, names=names)
    assert report.passed
    assert ("gradient layers_0/self_attn/out", "layers.0.self_attn.out_proj.weight") in {
        (result.stage, result.tensor) for result in report.results["float64"]
    }
    with pytest.raises(StatedError, match=r"names: PyTorch's model has no 'layers\.2'; it has embed, ") as raised:
        parity.trace(Decoder(), *decoder, names={"layers_0": "layers.2"})
    assert raised.value.field == "names"


# NNX, and what is not a mistake of a layer.


class Perceptron(nnx.Module):
    def __init__(self, theirs: torch.nn.Sequential, relu: bool = True) -> None:
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(5, 8, rngs=rngs), nnx.LayerNorm(8, epsilon=1e-5, rngs=rngs)])
        self.layers.append(nnx.Linear(8, 3, rngs=rngs))
        for ours, its in zip(self.layers, (theirs[0], theirs[1], theirs[3]), strict=True):
            weight = ours.kernel if isinstance(ours, nnx.Linear) else ours.scale
            weight[...] = jnp.asarray(its.weight.detach().numpy().T)
            ours.bias[...] = jnp.asarray(its.bias.detach().numpy())
        self.relu = relu
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, x):
        x = self.layers[1](self.layers[0](x))
        return self.layers[2](self.dropout(nnx.relu(x) if self.relu else x))


def perceptron() -> torch.nn.Sequential:
    modules = torch.nn.Linear(5, 8), torch.nn.LayerNorm(8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
    return randomised(torch.nn.Sequential(*modules))


X = np.random.default_rng(1).standard_normal((4, 5)).astype(np.float32)


def test_a_module_of_nnx_is_traced_and_left_as_it_was():
    theirs = perceptron()
    ours = Perceptron(theirs)
    before, kinds = nnx.state(ours), [type(part) for _, part in nnx.iter_modules(ours)]
    report = parity.trace(ours, None, theirs, (X,))
    assert report.passed, str(report)
    assert [result.stage for result in report.results["float64"]][:5] == [
        "layers/0", "layers/1", "dropout", "layers/2", "(output)"
    ]  # fmt: skip
    assert "gradient layers/2" in {result.stage for result in report.results["float64"]}
    assert [type(part) for _, part in nnx.iter_modules(ours)] == kinds
    jax.tree.map(np.testing.assert_array_equal, *(nnx.filter_state(s, nnx.Param) for s in (before, nnx.state(ours))))

    first = parity.trace(Perceptron(theirs, relu=False), None, theirs, (X,)).first_departure
    assert (first.stage, first.tensor) == ("layers/2", "3")


class Jitted(nn.Module):
    """Two layers that are alike, each with a jit of its own, the second recomputed for its gradient."""

    @nn.compact
    def __call__(self, x):
        x = nn.jit(nn.Dense)(5, name="first")(x)
        x = jnp.sin(nn.jit(nn.remat(nn.Dense))(5, name="second")(x))
        return nn.jit(nn.Dense)(5, name="third")(x)


def test_layers_that_are_alike_and_have_a_jit_of_their_own_are_kept_apart():
    class Sine(torch.nn.Module):
        def forward(self, x):
            return torch.sin(x)

    linear = [torch.nn.Linear(5, 5) for _ in range(3)]
    theirs = randomised(torch.nn.Sequential(*linear[:2], Sine(), linear[2]))
    params = tree(theirs.state_dict())
    names = {"first": "0", "second": "1", "third": "3"}
    report = parity.trace(Jitted(), {"params": {ours: params[name] for ours, name in names.items()}}, theirs, (X,))
    assert report.passed, str(report)
    assert {(r.stage, r.tensor) for r in report.results["float64"]} > {
        (f"gradient {ours}", tensor) for ours, name in names.items() for tensor in (name, f"{name}.weight")
    }


def test_heads_may_be_axes_of_their_own_on_one_side():
    class Heads(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.out = (torch.nn.Linear(5, 6) for _ in range(4))
            self.out = torch.nn.Linear(6, 5)

        def forward(self, x):
            q, k, v = (layer(x).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (self.query, self.key, self.value))
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    theirs = randomised(Heads())
    params = tree(theirs.state_dict())
    for name in ("query", "key", "value"):
        params[name] = {"kernel": params[name]["kernel"].reshape(5, 2, 3), "bias": params[name]["bias"].reshape(2, 3)}
    params["out"]["kernel"] = params["out"]["kernel"].reshape(2, 3, 5)
    ours = nn.MultiHeadAttention(num_heads=2, qkv_features=6, out_features=5)
    report = parity.trace(ours, {"params": params}, theirs, (X[None],))
    assert report.passed, str(report)
    assert report.alone == ((), ())


class Plain(nn.Module):
    """The port of the perceptron: `change` is done to what its ReLU returns, the last layer is of type `dtype`."""

    change: Any = staticmethod(lambda x: x)
    dtype: Any = None
    drop: float = 0.0

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.LayerNorm(1e-5, name="norm")(nn.Dense(8, name="in")(x)))
        x = nn.Dropout(self.drop, deterministic=False, name="drop")(x) if self.drop else x
        return nn.Dense(3, dtype=self.dtype, name="out")(self.change(x))


def plain_pair(theirs: torch.nn.Sequential, last: str = "3") -> tuple[Any, ...]:
    params = tree(theirs.state_dict())
    return {"params": {"in": params["0"], "norm": params["1"], "out": params[last]}}, theirs, (X,)


def plain(**fields: Any) -> Any:
    return parity.trace(Plain(**fields), *plain_pair(perceptron()))


def test_a_gradient_that_is_stopped_departs_in_the_backward_pass_alone():
    report = plain(change=lambda x: jax.lax.stop_gradient(x))
    assert (report.first_departure.stage, report.first_departure.tensor) == ("gradient norm", "1")
    assert report.verdict.endswith("All values agree: it is the backward passes that part.")
    assert plain().passed


def test_a_departure_in_float32_alone_is_called_a_matter_of_precision():
    report = plain(change=lambda x: jax.lax.reduce_precision(x, 8, 14) if x.dtype == np.float32 else x)
    assert report.first_departure.stage == "out"
    assert report.first_departure in report.results["float32"]
    assert report.verdict.endswith("In float64 they agree: it is a matter of precision.")


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_a_layer_in_another_precision_is_named(name):
    report = plain(dtype=jnp.dtype(name))
    assert (report.first_departure.stage, report.first_departure.fault) == ("out", f"computed in {name} by Flax")
    assert report.first_departure in report.results["float64"]


def test_a_value_without_a_partner_in_another_precision_is_named():
    class Half(torch.nn.Module):
        def forward(self, x):
            return x.half()

    class Wide(torch.nn.Module):
        def forward(self, x):
            return x.to(torch.get_default_dtype())

    theirs = perceptron()
    theirs.insert(3, Half())
    theirs.insert(4, Wide())
    report = parity.trace(Plain(), *plain_pair(theirs, last="5"))
    assert "PyTorch computes '3' in float16, of what was to be float32." in report.notes
    assert (report.first_departure.stage, report.first_departure.tensor) == ("out", "5")
    assert "PyTorch has '2', '3', '4' there." in report.verdict


def test_a_model_that_computes_in_float32_alone_can_be_compared_in_it_alone():
    report = parity.trace(Plain(dtype=jnp.float32), *plain_pair(perceptron()), precisions=("float32",))
    assert report.verdict == f"All {len(report.results['float32'])} pairs agree, in float32."
    report = parity.trace(Plain(jnp.square), *plain_pair(perceptron()), precisions=("float32",))
    assert report.first_departure.stage == "out"
    assert "float64" not in report.verdict


def test_what_is_not_finite_is_named_with_its_side_and_place():
    report = plain(change=lambda x: x.at[2, 1].set(jnp.nan))
    assert (report.first_departure.stage, report.first_departure.fault) == ("out", "nan at (2, 0) in Flax")
    assert "Flax's first value not to be finite is 'out': nan at (2, 0)." in report.notes

    variables, theirs, inputs = plain_pair(perceptron())
    with torch.no_grad():
        theirs[3].bias[1] = torch.inf
    report = parity.trace(Plain(), variables, theirs, inputs)
    assert report.first_departure.fault == "inf at (0, 1) in PyTorch"


def test_an_infinity_on_both_sides_agrees():
    class Masked(torch.nn.Module):
        def forward(self, x):
            return torch.where(x > 0, x, -torch.inf)

    class Mask(nn.Module):
        def __call__(self, x):
            return jnp.where(x > 0, x, -jnp.inf)

    assert parity.trace(Mask(), {"params": {}}, Masked(), (X,)).passed


def test_every_output_of_a_model_is_compared():
    class Theirs(torch.nn.Module):
        def forward(self, x, *, power):
            return {"sum": x.sum(-1), "rest": (x**power, x.argmax(-1)), "waves": torch.fft.fft(x)}

    class Ours(nn.Module):
        def power(self, x, *, power):
            return {"sum": x.sum(-1), "rest": [x**power + 1e-9, x.argmax(-1)], "waves": jnp.fft.fft(x)}

    given = {"kwargs": {"power": 3}, "torch_kwargs": {"power": 3}}
    report = parity.trace(Ours(), {"params": {}}, Theirs(), (X,), method="power", **given)
    values = [(result.stage, result.passed) for result in report.results["float64"][:4]]
    names = "(output)[sum]", "(output)[rest][0]", "(output)[rest][1]", "(output)[waves]"
    assert values == list(zip(names, (True, False, True, True), strict=True))
    assert report.results["float64"][2].bound == 0.0
    assert "gradient input[0]" in {result.stage for result in report.results["float64"] if result.passed}


def test_dropout_that_is_on_is_named_on_either_side():
    report = plain(drop=0.5)
    assert "Flax is random, first at 'drop': two runs differ there, by dropout or the like." in report.notes
    assert (report.first_departure.stage, report.first_departure.fault) == ("out", "random in Flax")

    theirs = perceptron()
    theirs.insert(3, torch.nn.Dropout(0.1))
    report = parity.trace(Plain(), *plain_pair(theirs, last="4"))
    assert "PyTorch is random, first at '3': two runs differ there, by dropout or the like." in report.notes
    assert "PyTorch's modules that drop, in training mode: 3." in report.notes
    assert report.first_departure.fault == "random in PyTorch"


def test_shapes_that_differ_are_named_with_both():
    theirs = perceptron()
    variables, _, inputs = plain_pair(theirs)
    theirs[3] = torch.nn.Linear(8, 4)
    report = parity.trace(Plain(), variables, theirs, inputs)
    assert (report.first_departure.stage, report.first_departure.tensor) == ("(output)", "(output)")
    assert report.first_departure.fault == "shape (4, 3) in Flax, (4, 4) in PyTorch"
    assert "No outputs are of the same shape: gradients are not compared." in report.notes
    assert {"out", "out/kernel"} <= {*report.alone[0]}
    assert {"3", "3.weight"} <= {*report.alone[1]}


def test_a_table_is_believed_and_compared():
    report = parity.trace(Plain(), *plain_pair(perceptron()), names={"in": "1"})
    assert (report.first_departure.stage, report.first_departure.tensor) == ("in", "1")
    assert {"0", "0.weight"} <= {*report.alone[1]}


def test_weights_that_are_not_the_same_are_named():
    variables, theirs, inputs = plain_pair(perceptron())
    variables["params"]["norm"]["bias"] += 1.0
    report = parity.trace(Plain(), variables, theirs, inputs)
    assert "Not the same weights on both sides: 'norm/bias' ('1.bias')." in report.notes
    assert report.first_departure.stage == "norm"


def test_nothing_of_the_callers_is_changed(resnet):
    variables, theirs, inputs, torch_inputs = resnet
    theirs.fc.weight.grad = torch.ones_like(theirs.fc.weight)
    theirs.bn2.eval()
    calls: list[int] = []
    handle = theirs.fc.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy((variables, theirs.state_dict(), inputs, torch_inputs))
    generator = torch.get_rng_state()
    settings = dict(jax.config.values)
    parity.trace(ResNet(), *resnet, layouts="NCHW->NHWC")
    after = variables, theirs.state_dict(), inputs, torch_inputs
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert settings == jax.config.values
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.get_default_dtype() == torch.float32
    assert (theirs.training, theirs.bn2.training) == (True, False)
    assert torch.equal(theirs.fc.weight.grad, torch.ones_like(theirs.fc.weight))
    assert all(p.requires_grad and (p.grad is None or p is theirs.fc.weight) for p in theirs.parameters())
    assert [len(m._forward_hooks) for m in theirs.modules()].count(0) == len(list(theirs.modules())) - 1
    handle.remove()
    theirs.fc.weight.grad = None
    theirs.train()


def test_a_model_that_raises_is_named_with_its_module():
    variables, theirs, _ = plain_pair(perceptron())
    with pytest.raises(
        StatedError, match=r"^PyTorch's forward pass in float64 raised RuntimeError in '0': mat1 and mat2"
    ):
        parity.trace(Plain(), variables, theirs, (X,), (X[:, :4],))
    with pytest.raises(StatedError, match=r"^Flax's forward pass in float64 raised ScopeParamShapeError in 'in': "):
        parity.trace(Plain(), variables, theirs, (X[:, :4],), (X,))


@pytest.mark.parametrize(
    ("field", "arguments", "message"),
    [
        ("inputs", {"inputs": X}, "inputs is a value of type ndarray: give a tuple of the arguments"),
        ("variables", {"variables": {}}, "variables have no 'params'; give what module.init returns"),
        ("module", {"module": 3}, "module is 3, not one of flax.linen or flax.nnx"),
        ("torch_module", {"torch_module": "x"}, "torch_module is 'x', not a module of PyTorch"),
        ("precisions", {"precisions": ("float16",)}, "precisions are ('float16',): give 'float64', 'float32' or both"),
        ("layouts", {"layouts": "NCHW->NHWX"}, "layouts: 'NCHW->NHWX' is not like 'NCHW->NHWC'"),
    ],
)
def test_an_argument_that_cannot_be_used_is_stated(field, arguments, message):
    variables, theirs, inputs = plain_pair(perceptron())
    given = {"module": Plain(), "variables": variables, "torch_module": theirs, "inputs": inputs} | arguments
    with pytest.raises(StatedError) as raised:
        parity.trace(**given)
    assert raised.value.field == field
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("one", "other", "merged"),
    [
        ((2, 6, 2, 4), (2, 6, 8), True),
        ((2, 4, 4, 3), (2, 16, 3), True),
        ((2, 16, 3), (32, 3), True),
        ((5,), (5, 1), True),
        ((2, 2, 6, 4), (2, 6, 8), False),
        ((2, 3), (3, 2), False),
        ((2, 6), (2, 5), False),
    ],
)
def test_neighbouring_axes_are_merged_and_no_others(one, other, merged):
    assert merges(one, other) is merges(other, one) is merged


@given(st.permutations("NHTDC"))
def test_a_layout_goes_to_ours_and_back(letters):
    ours, theirs = "".join(letters), "NHTDC"
    sizes = dict(zip(theirs, (2, 3, 4, 5, 6), strict=True))
    layouts = Layouts({"*": "AB->BA", "blocks": f"{theirs}->{ours}"})
    array = np.arange(720).reshape([sizes[letter] for letter in theirs])
    moved = layouts.to_ours("blocks.0.attn", array)
    assert moved.shape == tuple(sizes[letter] for letter in ours)
    np.testing.assert_array_equal(layouts.to_theirs("blocks.0.attn", moved), array)
    np.testing.assert_array_equal(layouts.to_ours("other", array), array)
    np.testing.assert_array_equal(layouts.to_ours("other", array[:, :, 0, 0, 0]), array[:, :, 0, 0, 0].T)


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.lists(st.booleans(), min_size=12, max_size=12))
def test_values_are_paired_through_whatever_one_side_has_more(ours_has, theirs_has):
    values = [np.random.default_rng(i).standard_normal((2, 3)) for i in range(len(ours_has))]
    ours = [Value(f"m{i}", f"m{i}", values[i], None) for i, has in enumerate(ours_has) if has]
    theirs = [Value(f"n{i}", f"n{i}", values[i], None) for i in range(len(values)) if theirs_has[i]]
    pairs = [(a.name, b.name) for a, b in pair_values(ours, theirs, {}, {}, {})]
    assert pairs == [(f"m{i}", f"n{i}") for i in range(len(values)) if ours_has[i] and theirs_has[i]]


# The command.

PAIR = """
import flax.linen as nn
import numpy as np
import torch

class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="dense")(x)

def pair(scale=1.0):
    theirs = torch.nn.Sequential(torch.nn.Linear(5, 3))
    weight, bias = (p.detach().numpy() for p in theirs.parameters())
    params = {"dense": {"kernel": scale * weight.T, "bias": bias}}
    return Model(), {"params": params}, theirs, (np.ones((2, 5), np.float32),)

def wrong():
    return dict(zip(("module", "variables", "torch_module", "inputs"), pair(1.01)))

def raising():
    return *pair(), (np.ones((2, 4), np.float32),)

def nothing():
    return None

def broken():
    import neighbour
    return neighbour.pair()
"""


@pytest.mark.parametrize(
    ("function", "code", "message"),
    [
        ("pair", 0, "All 7 pairs agree, in float64 and in float32."),
        ("wrong", 1, "They part in float64 at 'dense', in PyTorch '0'"),
        ("raising", 1, "PyTorch's forward pass in float64 raised RuntimeError in '0'"),
        ("nothing", 2, "returned None, not a tuple (module, variables, torch_module, inputs[, torch_inputs])"),
        ("other", 2, "has no function 'other'"),
        ("broken", 2, "my_port.py:broken raised ZeroDivisionError"),
    ],
)
def test_the_command_traces_the_pair_that_a_file_returns(tmp_path, capsys, monkeypatch, function, code, message):
    file = tmp_path / "my_port.py"
    file.write_text(PAIR)
    (tmp_path / "neighbour.py").write_text("def pair():\n    return 1 / 0\n")
    path = list(sys.path)
    monkeypatch.setattr(sys, "argv", ["parity", "trace", f"{file}:{function}"])
    assert command.main() == code
    printed = capsys.readouterr()
    assert message in (printed.err if code == 2 or function == "raising" else printed.out)
    assert sys.path == path
    sys.modules.pop("neighbour", None)


def test_the_command_states_that_a_file_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["parity", "trace", f"{tmp_path}/none.py:pair"])
    assert command.main() == 2
    assert "none.py:pair' does not name a file that is there, as FILE.py:FUNCTION" in capsys.readouterr().err


def test_importing_the_package_pulls_no_framework():
    code = "import sys, parity; assert not {'torch', 'jax', 'numpy'} & {*sys.modules}; assert 'trace' in parity.__all__"
    subprocess.run([sys.executable, "-c", code], check=True)
