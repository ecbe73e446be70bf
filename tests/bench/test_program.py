"""XLA's text of a program: a small one written out, and one that XLA has just compiled."""

import jax
import jax.numpy as jnp
import pytest

from mae_jax.bench.program import operations, size_of

PROGRAM = """HloModule jit_step, is_scheduled=true

%product_computation (a: bf16[4,8], b: bf16[8,2]) -> bf16[4,2] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = bf16[8,2]{1,0} parameter(1)
  ROOT %dot.1 = bf16[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main.9 (x: bf16[4,8], w: bf16[8,2]) -> (bf16[4,2], f32[4]) {
  %x = bf16[4,8]{1,0} parameter(0)
  %w = bf16[8,2]{1,0} parameter(1)
  %gemm_fusion.7 = bf16[4,2]{1,0} fusion(%x, %w), kind=kCustom, calls=%product_computation, metadata={op_name="jit(step)/decoder/jit(core_fn)/block_7/mlp/fc1/dot_general"}
  %call.2 = (bf16[4,2]{1,0}, f32[4]{0}, u8[0]{0}) custom-call(%gemm_fusion.7, %gemm_fusion.7), custom_call_target="(odd"
  %first = bf16[4,2]{1,0} get-tuple-element(%call.2), index=0
  %second = f32[4]{0} get-tuple-element(%call.2), index=1
  ROOT %tuple.1 = (bf16[4,2]{1,0}, f32[4]{0}) tuple(%first, %second)
}
"""  # noqa: E501


def test_each_operation_of_a_program():
    assert list(operations(PROGRAM)) == [
        ("gemm_fusion", "decoder/block_*/mlp/fc*/dot_general", 2 * (32 + 16 + 8), 2 * 4 * 2 * 8),
        ("call", "", 2 * 8 + 4 * 4 + 2 * 8, 0),
    ]


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("bf16[3,5]{1,0:T(8,128)}", 30),
        ("(f32[2], (pred[7], s64[1]))", 23),
        ("(f8e4m3fn[3], c64[2], token[])", 19),
    ],
)
def test_sizes_of_types(shape, size):
    assert size_of(shape) == size


def test_what_xla_writes_today():
    left, right = jax.device_put((jnp.ones((64, 32)), jnp.ones((32, 16))), jax.devices("cpu")[0])
    compiled = jax.jit(lambda left, right: jnp.tanh(left @ right) @ right.T).lower(left, right).compile()
    found = list(operations(compiled.as_text()))
    assert sum(operation.flops for operation in found) == 2 * 2 * 64 * 32 * 16
    assert sum(operation.moved for operation in found) >= 4 * (64 * 32 + 32 * 16 + 64 * 32)
