"""Every library's spelling of the authors' names, there and back."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_jax.port.keys import entries, to_fair
from mae_jax.port.layouts import LAYOUTS, detect, from_layout, in_decoder, to_layout, written

from .conftest import ODD, TINY, draw_params

NAMES = {i: f"{i} {layout.name}" for i, layout in enumerate(LAYOUTS)}


@pytest.mark.parametrize("index", NAMES, ids=NAMES.values())
@given(prefix=st.sampled_from(["", "module.", "model.", "net.mae.", "_orig_mod.module."]))
def test_detected_and_back_to_the_bit(index, prefix):
    tensors = to_fair(draw_params(ODD), ODD)
    there = {prefix + key: values for key, values in to_layout(tensors, LAYOUTS[index]).items()}
    found = detect(there)
    assert found is not None
    layout, before = found
    assert (layout, before) == (LAYOUTS[index], prefix)
    back = from_layout({key.removeprefix(before): values for key, values in there.items()}, layout, ODD)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[key], values) for key, values in tensors.items())


@pytest.mark.parametrize("index", NAMES, ids=NAMES.values())
def test_an_encoder_alone_keeps_its_spelling(index):
    keys = [name for entry in entries(TINY, "encoder") for name in LAYOUTS[index].rename(entry.key)]
    found = detect(keys)
    assert found is not None
    layout, prefix = found
    assert [prefix + name for entry in entries(TINY, "encoder") for name in layout.rename(entry.key)] == keys


@pytest.mark.parametrize("keys", [[], ["fc.weight"], ["patch_embed.proj.weight"], ["xpatch_embed.proj.weight"]])
def test_other_files_are_not_taken_for_one(keys):
    assert detect(keys) is None


def test_which_names_are_the_decoders():
    decoder = {entry.key for entry in entries(TINY)} - {entry.key for entry in entries(TINY, "encoder")}
    assert {entry.key for entry in entries(TINY) if in_decoder(entry.key)} == decoder


def test_queries_keys_and_values_lie_in_this_order():
    tensors = to_fair(draw_params(TINY), TINY)
    there = to_layout(tensors, written("huggingface"))
    root = "vit.encoder.layer.1.attention.attention"
    fused = tensors["blocks.1.attn.qkv.weight"]
    for i, name in enumerate(("query", "key", "value")):
        np.testing.assert_array_equal(there[f"{root}.{name}.weight"], fused[48 * i : 48 * (i + 1)])


def test_all_that_is_wrong_is_listed_under_the_librarys_names():
    there = to_layout(to_fair(draw_params(TINY), TINY), written("huggingface"))
    there["vit.encoder.layer.0.attention.attention.kee.weight"] = there.pop(
        "vit.encoder.layer.0.attention.attention.key.weight"
    )
    there["decoder.decoder_norm.bias"] = np.zeros(5, np.float32)
    there["head"] = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match="do not fit") as raised:
        from_layout(there, written("huggingface"), TINY)
    for fault in (
        "vit.encoder.layer.0.attention.attention.key.weight is missing",
        "vit.encoder.layer.0.attention.attention.kee.weight is unknown "
        "(nearest: vit.encoder.layer.0.attention.attention.key.weight)",
        "decoder.decoder_norm.bias has shape (5,), not (32,)",
        "head is unknown",
    ):
        assert fault in str(raised.value)


def test_learned_positions_have_to_be_there():
    learned = replace(TINY, positions="learned")
    there = to_layout(to_fair(draw_params(learned), learned), written("lightly"))
    del there["decoder.pos_embed"]
    with pytest.raises(ValueError, match=r"decoder\.pos_embed is missing"):
        from_layout(there, written("lightly"), learned)
