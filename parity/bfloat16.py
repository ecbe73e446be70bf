"""What stays float32 in bfloat16 models, and where they round: each by itself, on inputs where a mistake is large.

Matrix products have bfloat16 factors. The residual stream, LayerNorm, softmax, the sums of gradients, the classifier's
head and the loss stay float32. The reference rounds where the documentation of `mae_jax.models` says it, and nowhere
else: a rounding too many, or one too few, then changes the last bit of many results.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mae_jax.config import ClassifierConfig, FinetuneConfig, ModelConfig, PretrainConfig, TransformerConfig
from mae_jax.models import Params, blocks, classifier, gradients, mae
from mae_jax.models.masking import make_mask
from mae_jax.port.keys import from_fair
from mae_jax.train import step as steps
from parity import torch_mae
from parity.bounds import Pair, Pairs, as_numpy
from parity.sides import Ours, Reference, draw_weights

STACK = TransformerConfig(width=16, depth=1, heads=1)
SMALL = ModelConfig(8, 2, 3, STACK, STACK, loss_on="all", dtype="bfloat16")


def mixed_precision(ours: Ours, reference: Reference) -> Pairs:
    """Compare the parts of a bfloat16 model, operation by operation: compiled, some would not be rounded."""
    generator = np.random.default_rng(reference.run_config.seed)
    with jax.disable_jit():
        yield from low_layer_norm(generator)
        yield from low_softmax(generator)
        yield from low_dense(generator)
    yield from low_residual(generator)
    yield low_loss(generator)
    yield from low_head(generator)


def alike(name: str, ours: Any, theirs: Tensor) -> Pair:
    """Compare how many values of two bfloat16 arrays are the same number: rounded at the same places, nearly all."""
    same = (as_numpy(ours).astype(np.float32) == theirs.float().numpy()).mean()
    share = np.asarray(same).astype(ours.dtype) if ours.dtype != "bfloat16" else same
    return Pair("mixed precision", f"{name}, rounded", share, 1.0, "alike")


def low_layer_norm(generator: np.random.Generator) -> Pairs:
    """Compare a LayerNorm about a mean of 64, where bfloat16 is spaced by 1/2, half a standard deviation."""
    x = 64 + generator.standard_normal((2, 8, 32)).astype(np.float32)
    ours = blocks.LayerNorm("bfloat16").apply(
        {"params": {"scale": np.ones(32, "float32"), "bias": np.zeros(32, "float32")}}, jnp.asarray(x)
    )
    theirs = torch.nn.functional.layer_norm(torch.from_numpy(x).double(), (32,), eps=torch_mae.EPS)
    yield Pair("mixed precision", "LayerNorm of 64 + normal", ours, theirs, "cancelled", "float32")


def low_softmax(generator: np.random.Generator) -> Pairs:
    """Compare attention of scores of some tens, where bfloat16 is spaced by 1/8, and its gradient.

    A head has 16 values, so that the scale, 1/4, rounds nothing.
    """
    for scale in (4.0, 1.0):
        scales = (scale, scale, 1.0, 1.0)
        drawn = [torch.from_numpy(generator.normal(0, s, (1, 2, 64, 16))).bfloat16() for s in scales]
        query, key, value, direction = (jnp.asarray(values.float().numpy(), "bfloat16") for values in drawn)
        mixed, backwards = jax.vjp(lambda *heads: gradients.attend(*heads, "bfloat16"), query, key, value)
        their_mixed, their_gradients = attention(*drawn)
        yield alike(f"attention of scores of {scale**2:.0f}", mixed, their_mixed)
        if scale > 1:
            continue  # one weight of a row is nearly 1: its gradient is a difference of nearly equal numbers
        for name, mine, theirs in zip(("query", "key", "value"), backwards(direction), their_gradients, strict=True):
            yield alike(f"attention, gradient of {name}", mine, theirs)


def attention(
    query: Float[Tensor, "B heads T d"],
    key: Float[Tensor, "B heads T d"],
    value: Float[Tensor, "B heads T d"],
    direction: Float[Tensor, "B heads T d"],
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Compute attention of bfloat16 heads and its gradient along `direction`: every factor rounded, every sum not."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return a.float() @ b.float()

    scale = query.shape[-1] ** -0.5
    scores = product(query * scale, key.mT)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))  # before they are divided by their sum
    total = weights.sum(-1, keepdim=True)
    weights = weights.bfloat16()
    mixed = (product(weights, value) / total).bfloat16()
    shared = direction.float() / total
    along = (shared * mixed.float()).sum(-1, keepdim=True)
    shared = shared.bfloat16()
    to_scores = (weights.float() * (product(shared, value.mT) - along)).bfloat16()
    to_query = product(to_scores, key).bfloat16() * scale
    to_key = product(to_scores.mT, query * scale).bfloat16()
    return mixed, (to_query, to_key, product(weights.mT, shared).bfloat16())


def low_dense(generator: np.random.Generator) -> Pairs:
    """Compare a dense layer: products of bfloat16 factors, and the sums over rows of its gradient in float32."""
    x, direction = (torch.from_numpy(generator.standard_normal((512, n))).bfloat16() for n in (32, 24))
    kernel, bias = generator.standard_normal((32, 24)).astype("f4"), generator.standard_normal(24).astype("f4")
    inputs = jnp.asarray(x.float().numpy(), "bfloat16"), jnp.asarray(kernel), jnp.asarray(bias)
    result, backwards = jax.vjp(lambda *given: gradients.affine(*given, "bfloat16"), *inputs)
    to_rows, to_kernel, to_bias = backwards(jnp.asarray(direction.float().numpy(), "bfloat16"))
    factor = torch.from_numpy(kernel).bfloat16().float()
    theirs = (x.float() @ factor).bfloat16() + torch.from_numpy(bias).bfloat16()
    yield alike("dense", result, theirs)
    yield alike("dense, gradient of the input", to_rows, (direction.float() @ factor.T).bfloat16())
    sums = {"kernel": (to_kernel, x.double().T @ direction.double()), "bias": (to_bias, direction.double().sum(0))}
    for name, (mine, other) in sums.items():
        yield Pair("mixed precision", f"dense, gradient of the {name}", mine, other, "float32", "float32")


def low_residual(generator: np.random.Generator) -> Pairs:
    """Compare what passes where every product is zero: the residual stream as it came in, and the position tables."""
    zeros = jax.tree.map(
        lambda values: jnp.zeros(values.shape, values.dtype),
        jax.eval_shape(lambda: steps.init_state(PretrainConfig(model=SMALL)).params),
    )
    x = generator.standard_normal((2, 9, 16)).astype(np.float32)
    for remat in (False, True):
        block = blocks.block_class(remat)(STACK, "bfloat16")
        through = block.apply({"params": zeros["encoder"]["block_0"]}, jnp.asarray(x), 0)
        yield Pair("mixed precision", f"residual stream, remat {remat}", through, x, "exact", "float32")
    noise = jnp.asarray(generator.random((2, 16)), jnp.float32)
    mask, model = make_mask(noise, SMALL), mae.MaskedAutoencoder(SMALL)
    patches = jnp.ones((2, SMALL.keep, SMALL.patch_dim))
    table = torch_mae.positions(SMALL, 16)[0].numpy()
    shuffled = table[1:][np.asarray(mask.ids_shuffle)]
    for stack, count in (("encoder", SMALL.keep), ("decoder", SMALL.num_patches)):
        given = patches if stack == "encoder" else jnp.ones((2, 1 + SMALL.keep, 16))
        tokens = model.apply(
            {"params": zeros}, given, mask, method=lambda m, *a, stack=stack: getattr(m, stack).embed(*a)
        )
        theirs = np.concatenate([np.broadcast_to(table[:1], (2, 1, 16)), shuffled[:, :count]], axis=1)
        yield Pair("mixed precision", f"positions in the {stack}", tokens, theirs, "exact", "float32")


def _embed(stack: str, model: mae.MaskedAutoencoder, *inputs: Any) -> jax.Array:
    return getattr(model, stack).embed(*inputs)


def low_loss(generator: np.random.Generator) -> Pair:
    """Compare the loss with the mean squared error of the model's own prediction."""
    params = _low_params(generator, torch_mae.MaskedAutoencoder(SMALL), SMALL)
    images, noise = generator.standard_normal((2, 8, 8, 3)), generator.random((2, 16))
    model = mae.MaskedAutoencoder(SMALL)
    apply = jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs))
    out = apply(params, np.float32(images), np.float32(noise))
    theirs = np.square(np.asarray(out.pred, np.float64) - np.asarray(out.target, np.float64)).mean()
    return Pair("mixed precision", "loss of its own prediction", out.loss, theirs, "float32", "float32")


def low_head(generator: np.random.Generator) -> Pairs:
    """Compare a classifier's logits with the product of its own features and its head."""
    for pooling in ("mean", "class"):
        config = ClassifierConfig(SMALL, classes=7, pooling=pooling)
        params = _low_params(generator, torch_mae.Classifier(config), config)
        model, images = classifier.Classifier(config), np.float32(generator.standard_normal((3, 8, 8, 3)))

        def both(params: Params, images: Any, model: classifier.Classifier = model) -> tuple[Any, Any]:
            return model.apply({"params": params}, images, method="pool"), model.apply({"params": params}, images)

        features, logits = jax.jit(both)(params, images)
        head = {name: np.asarray(values, np.float64) for name, values in params["head"].items()}
        theirs = np.asarray(features, np.float64) @ head["kernel"] + head["bias"]
        yield Pair("mixed precision", f"logits, {pooling}", logits, theirs, "float32", "float32")
        yield _dtype(f"features, {pooling}", features, "float32")


def _low_params(generator: np.random.Generator, module: torch.nn.Module, config: Any) -> Params:
    """Draw float32 weights of a bfloat16 model."""
    return jax.tree.map(np.float32, from_fair(draw_weights(module, generator), config))


# --- the whole model --------------------------------------------------------------------------------------------------


def mixed_precision_pass(ours: Ours, reference: Reference) -> Pairs:
    """Compare the dtype of everything a bfloat16 model computes and keeps, and its loss and gradients' values."""
    config = replace(reference.config, dtype="bfloat16", remat=False)
    low = Ours(reference, config)
    output, returned = jax.eval_shape(low.recorded, low.params, low.images, low.noise)
    for name, values in returned.items():
        rounded = any(part in name for part in ("attn", "mlp", "patch_embed", "pred", "/embed"))
        yield _dtype(name, values, "bfloat16" if rounded else "float32")
    for name, values in output._asdict().items():
        if name != "ids_restore":
            yield _dtype(name, values, "float32")
    run = replace(reference.run_config, model=config)
    tuned = FinetuneConfig(model=config, classes=3, batch_size=4)
    for what, made in {"pretraining": run, "fine-tuning": tuned}.items():
        state = jax.eval_shape(lambda made=made: steps.init_state(made))
        for path, values in jax.tree_util.tree_leaves_with_path((state.params, state.optimizer)):
            if jnp.issubdtype(values.dtype, jnp.floating):
                yield _dtype(f"state of {what}, {jax.tree_util.keystr(path)}", values, "float32")
    loss, computed = low.loss_and_gradients()
    yield Pair("mixed precision pass", "loss", loss, reference.stages["loss"], "bfloat16", "float32")
    for name, theirs in reference.gradients.items():
        values = computed[name]
        # Its length and direction: of single values many are nearly cancelled sums of roundings.
        distance = np.linalg.norm(values.astype(np.float64) - theirs) / np.linalg.norm(theirs)
        yield _dtype(f"gradient {name}", values, "float32")
        yield Pair("mixed precision pass", f"gradient {name}", 1 + distance, 1.0, "bfloat16")


def _dtype(name: str, values: Any, dtype: str) -> Pair:
    """Compare the dtype alone."""
    nothing = np.zeros(1, values.dtype)
    return Pair("mixed precision pass", f"dtype of {name}", nothing, np.zeros(1), "exact", dtype)


BFLOAT16 = (mixed_precision, mixed_precision_pass)
