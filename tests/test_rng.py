"""Streams are apart, rows depend on their own position alone, and the numbers never change."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_jax import rng

seeds = st.integers(0, 2**32 - 1)
# Of a fixed count, so that the device function is compiled once.
position_sets = st.lists(st.integers(0, rng.MAX_POSITION), min_size=6, max_size=6)


def uniforms(seed, stream, positions, count=5):
    return np.asarray(rng.example_uniforms(rng.device_key(seed, stream), np.array(positions, np.uint32), count))


@given(seed=seeds, positions=position_sets, order=st.permutations(range(6)))
def test_a_row_does_not_depend_on_its_place_in_the_batch(seed, positions, order):
    rows = uniforms(seed, "mask", positions)
    shuffled = uniforms(seed, "mask", [positions[i] for i in order])
    np.testing.assert_array_equal(shuffled, rows[list(order)])


def test_a_row_does_not_depend_on_the_size_of_the_batch():
    positions = [0, 3, 2**31, 2**32 - 2, 17, 1]
    whole = uniforms(7, "mask", positions)
    parts = [uniforms(7, "mask", positions[:2]), uniforms(7, "mask", positions[2:])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert whole.dtype == np.float32
    assert ((whole >= 0) & (whole < 1)).all()
    assert len(np.unique(whole)) == whole.size


def test_rows_are_the_same_when_compiled():
    key, positions = rng.device_key(3, "mask"), np.arange(4, dtype=np.uint32)
    compiled = jax.jit(rng.example_uniforms, static_argnums=2)(key, positions, 5)
    np.testing.assert_array_equal(compiled, rng.example_uniforms(key, positions, 5))


def test_streams_seeds_and_positions_differ():
    rows = [uniforms(seed, stream, [0, 1]) for stream in rng.STREAMS for seed in (0, 1)]
    values = np.concatenate(rows)
    assert len(np.unique(values)) == values.size
    assert len(set(rng.STREAMS.values())) == len(rng.STREAMS)


@given(seed=seeds, position=st.integers(0, rng.MAX_POSITION), stream=st.sampled_from(list(rng.STREAMS)))
def test_a_host_generator_is_the_same_whenever_it_is_made(seed, position, stream):
    first = rng.host_generator(seed, stream, position).random(4)
    rng.host_generator(seed, stream, position + 1).random(4)
    np.testing.assert_array_equal(rng.host_generator(seed, stream, position).random(4), first)


def test_host_generators_do_not_share_numbers():
    draws = [
        rng.host_generator(seed, stream, position).integers(0, 2**63, 1000)
        for seed in (0, 1)
        for stream in rng.STREAMS
        for position in (0, 1, 2**31)
    ]
    assert len(np.unique(draws)) == len(draws) * 1000


def test_an_unknown_stream_is_an_error():
    with pytest.raises(KeyError):
        rng.host_generator(0, "noise", 0)


# The first number of each stream at seed 0, position 0: on the host 64 bits, on the device the first uniform.
FIRST = {
    "init": (213000021201967259, 0.2827199697494507),
    "order": (15003734204198539638, 0.5788323879241943),
    "crop": (15023647771317767168, 0.06885099411010742),
    "flip": (8765139425351048083, 0.9536982774734497),
    "mask": (7916537264935705218, 0.8066345453262329),
    "samples": (10838992762465911255, 0.5116376876831055),
    "jitter": (9534690535958307366, 0.15063297748565674),
    "rand_augment": (10782051724014339662, 0.27780985832214355),
    "mix": (15644229821003411714, 0.9560161828994751),
    "erase": (14777704617784931010, 0.16895592212677002),
    "drop_path": (17693041628268777892, 0.7120053768157959),
    "head": (3682763398030452460, 0.7125561237335205),
    "target": (11011578809793276180, 0.18494904041290283),
}


def test_the_numbers_of_every_stream_stay_what_they_are():
    found = {
        stream: (
            int(rng.host_generator(0, stream, 0).integers(2**64, dtype=np.uint64)),
            float(uniforms(0, stream, [0], 1)[0, 0]),
        )
        for stream in rng.STREAMS
    }
    assert found == FIRST
