"""What runs in bfloat16, read off the traced loss and gradient of a bfloat16 model: only what may."""

import jax
import jax.numpy as jnp
import pytest

from mae_jax.config import ModelConfig, TransformerConfig
from mae_jax.models.mae import MaskedAutoencoder
from mae_jax.train.step import loss_and_gradients

# Widths of an MLP that are nothing else's, so that what belongs to a GELU is known by its shape.
CONFIG = ModelConfig(
    image_size=8,
    patch_size=2,
    encoder=TransformerConfig(width=16, depth=2, heads=2, mlp_ratio=1.5),
    decoder=TransformerConfig(width=20, depth=1, heads=2, mlp_ratio=1.75),
    norm_pix_loss=True,
    dtype="bfloat16",
)
MLP_WIDTHS = {24, 35}


def equations(jaxpr):
    """All of them, those inside of calls too."""
    for equation in jaxpr.eqns:
        inner = [
            getattr(value, "jaxpr", value)
            for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
            if hasattr(value, "eqns") or hasattr(value, "jaxpr")
        ]
        for jaxpr_inside in inner:
            yield from equations(jaxpr_inside)
        if not inner:
            yield equation


def traced(remat):
    config = ModelConfig(**{**CONFIG.__dict__, "remat": remat})
    model = MaskedAutoencoder(config)
    images, noise = jnp.zeros((2, 8, 8, 3)), jnp.zeros((2, 16))
    params = jax.eval_shape(model.init, jax.random.key(0), images, noise)["params"]
    jaxpr = jax.make_jaxpr(lambda params: loss_and_gradients(model, params, images, noise))(params)
    return params, list(equations(jaxpr.jaxpr))


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "recomputed"])
def program(request):
    with jax.numpy_dtype_promotion("strict"):
        return traced(request.param)


def in_bfloat16(program, *primitives):
    """Shapes of the first operand, of equations of these kinds that work in bfloat16."""
    return [
        equation.invars[0].aval.shape
        for equation in program[1]
        if equation.primitive.name in primitives and equation.invars[0].aval.dtype == jnp.bfloat16
    ]


def test_statistics_softmax_and_loss_stay_in_float32(program):
    assert in_bfloat16(program, "rsqrt", "sqrt", "div", "log", "reduce_max", "sub", "log1p", "integer_pow", "pow") == []
    # erf and its derivative, in a GELU, are the only ones; the softmax's exp is not among them.
    shapes = in_bfloat16(program, "exp", "erf", "square", "logistic", "tanh")
    assert {shape[-1] for shape in shapes} == MLP_WIDTHS
    exps = [equation for equation in program[1] if equation.primitive.name == "exp"]
    assert len([e for e in exps if e.invars[0].aval.dtype == jnp.float32]) >= CONFIG.encoder.depth + 1


def test_no_sum_runs_in_bfloat16(program):
    assert in_bfloat16(program, "reduce_sum") == []


def test_every_matrix_product_runs_in_bfloat16(program):
    products = [equation for equation in program[1] if equation.primitive.name == "dot_general"]
    assert len(products) > 6 * (CONFIG.encoder.depth + CONFIG.decoder.depth)
    factors = {str(factor.aval.dtype) for product in products for factor in product.invars}
    assert factors == {"bfloat16"}


def test_gradients_and_loss_are_float32():
    model = MaskedAutoencoder(CONFIG)
    images, noise = jnp.zeros((2, 8, 8, 3)), jnp.zeros((2, 16))
    params = jax.eval_shape(model.init, jax.random.key(0), images, noise)["params"]
    results = jax.eval_shape(lambda params: loss_and_gradients(model, params, images, noise), params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((params, results))} == {"float32"}
