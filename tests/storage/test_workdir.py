"""A run's folder: the configuration comes back as it was, and another one is refused."""

import contextlib
import dataclasses
import errno
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_jax.config import FinetuneConfig, ModelConfig, OptimConfig, PretrainConfig, TransformerConfig
from mae_jax.hosts import Hosts
from mae_jax.presets.pretraining import PRESETS
from mae_jax.storage.checkpoints import Checkpoints
from mae_jax.storage.workdir import (
    CONFIG_FILE,
    METRICS_FILE,
    claim,
    claimed,
    config_from_dict,
    config_to_dict,
    differences,
    find_checkpoint,
    read_config,
    read_record,
)
from tests.refusals import refused
from tests.storage.answering import Answering


def round_trip(config):
    return config_from_dict(json.loads(json.dumps(config_to_dict(config))), "here")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_comes_back_from_its_file(name, tmp_path):
    config = dataclasses.replace(PRESETS[name](), workdir=str(tmp_path / "run"))
    workdir = claim(config)
    assert workdir == tmp_path / "run"
    assert read_config(workdir / CONFIG_FILE) == config


stacks = st.builds(
    lambda heads, size, depth, ratio: TransformerConfig(heads * size * 4, depth, heads, ratio),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([1.0, 2.5, 4.0]),
)
models = st.builds(
    ModelConfig,
    image_size=st.sampled_from([32, (32, 48)]),
    patch_size=st.sampled_from([8, (4, 8)]),
    encoder=stacks,
    decoder=stacks,
    positions=st.sampled_from(["sincos2d", "sincos1d", "learned"]),
    class_token=st.booleans(),
    masking=st.sampled_from(["random", "block"]),
    mask_ratio=st.floats(0.3, 0.75),
    norm_pix_loss=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float64"]),
)
optims = st.builds(
    OptimConfig,
    base_lr=st.floats(1e-12, 1e3),
    warmup_epochs=st.floats(0, 1e3),
    schedule=st.sampled_from(["cosine", "constant"]),
    clip_norm=st.none() | st.floats(0.1, 10),
    ema_decay=st.none() | st.floats(0, 0.9999),
)
configs = st.builds(
    PretrainConfig,
    model=models,
    optim=optims,
    batch_size=st.sampled_from([8, 64]),
    accumulate=st.sampled_from([1, 4]),
    steps=st.none() | st.integers(1, 10**6),
    seed=st.integers(0, 2**32 - 1),
    devices=st.none() | st.integers(1, 8),
)


@given(config=configs)
def test_any_configuration_comes_back(config):
    assert round_trip(config) == config
    assert differences(config, round_trip(config)) == []


@given(old=configs, new=configs)
def test_a_difference_is_named_once_with_both_values(old, new):
    found = differences(old, new)
    assert (found == []) == (
        dataclasses.replace(old, devices=None, workdir="x") == dataclasses.replace(new, devices=None, workdir="x")
    )
    assert len({name for name, _, _ in found}) == len(found)
    assert all(before != after for _, before, after in found)


def changed(config, **changes):
    return dataclasses.replace(config, **changes)


def row(workdir):
    """The sign of a run that has made steps."""
    (workdir / METRICS_FILE).write_text('{"step": 1, "loss": 2.0}\n')


def test_a_run_started_otherwise_is_refused_with_both_values(tmp_path):
    config = PretrainConfig(workdir=str(tmp_path), batch_size=64)
    claim(config)
    row(tmp_path)
    other = changed(
        config,
        batch_size=128,
        model=changed(config.model, encoder=changed(config.model.encoder, depth=6)),
    )
    with refused(
        "model.encoder.depth",
        "started with model.encoder.depth 12, not 6, batch_size 64, not 128. Continue with those, or choose another "
        "--workdir or remove this one, which has no checkpoint yet.",
    ):
        claim(other)
    assert read_config(tmp_path / CONFIG_FILE) == config


@pytest.mark.parametrize("other", [{"batch_size": 128}, {"kind": "classification"}])
def test_a_run_that_made_no_step_binds_nobody(tmp_path, other):
    """Its weights to start from were refused, or the memory did not suffice for the first step."""
    config = PretrainConfig(workdir=str(tmp_path), batch_size=64)
    claim(config)
    (tmp_path / METRICS_FILE).touch()
    (tmp_path / "checkpoints").mkdir()
    other = FinetuneConfig(workdir=str(tmp_path)) if "kind" in other else changed(config, **other)
    reported = []
    claim(other, report=reported.append)
    assert reported == [f"{tmp_path} was claimed by a run that made no step; it is this run's now"]
    claim(other, report=reported.append)
    assert len(reported) == 1
    assert read_config(tmp_path / CONFIG_FILE) == other
    row(tmp_path)
    with refused("kind" if other.kind != config.kind else "batch_size"):
        claim(config)


def test_another_program_s_configuration_is_not_replaced(tmp_path):
    (tmp_path / CONFIG_FILE).write_text('{"model_type": "vit_mae"}')
    with refused(CONFIG_FILE, "Mend it, or choose another --workdir."):
        claim(PretrainConfig(workdir=str(tmp_path)))
    assert (tmp_path / CONFIG_FILE).read_text() == '{"model_type": "vit_mae"}'


def test_checkpoints_tell_what_a_run_was_started_with(tmp_path, tiny, begin):
    """Also where config.json is gone; and on how many images."""
    config = dataclasses.replace(tiny(), workdir=str(tmp_path))
    claim(config, 36)
    with contextlib.closing(Checkpoints(tmp_path, config, 36)) as checkpoints:
        checkpoints.save(3, begin(config))
    (tmp_path / CONFIG_FILE).unlink()
    with refused("seed", "started with seed 0, not 9. ", "another --workdir."):
        claim(changed(config, seed=9), 36)
    with refused("data", "started on 36 images, and digits has 35 now"):
        claim(config, 35)
    claim(config, 36)


def test_a_damaged_file_may_go_where_checkpoints_hold_the_same(tmp_path, tiny, begin):
    config, file = dataclasses.replace(tiny(), workdir=str(tmp_path)), tmp_path / CONFIG_FILE
    claim(config)
    file.write_text("{")
    with refused(CONFIG_FILE, "config.json is not JSON: ", "Mend it, or choose another --workdir."):
        claim(config)
    with contextlib.closing(Checkpoints(tmp_path, config)) as checkpoints:
        checkpoints.save(3, begin(config))
    with refused(CONFIG_FILE, "Remove it, and run the same command again"):
        claim(config)
    file.unlink()
    claim(config)
    assert read_config(file) == config


@pytest.mark.parametrize("left", [b"", bytes(300)])
def test_what_a_power_cut_leaves_of_a_young_file_is_no_configuration(tmp_path, left):
    """Version 0.1.0 did not sync it."""
    config = PretrainConfig(workdir=str(tmp_path))
    (tmp_path / CONFIG_FILE).write_bytes(left)
    (tmp_path / "checkpoints" / "4" / "record").mkdir(parents=True)
    (tmp_path / "checkpoints" / "4" / "record" / "metadata").write_bytes(left)
    claim(config)
    assert read_config(tmp_path / CONFIG_FILE) == config


def test_how_a_run_goes_may_change(tmp_path):
    other = {
        "engine": "fsdp", "devices": 4, "fsdp": 2, "coordinator": "a:1", "process_id": 0, "num_processes": 2,
        "workers": 0, "log_every": 7, "save_every": 5, "keep": 9, "keep_every": 10, "reconstruct_every": None,
    }  # fmt: skip
    fields = {field.name for field in dataclasses.fields(PretrainConfig.operation)}
    assert other.keys() == fields - {"workdir"}  # which may be a folder that was moved
    config = PretrainConfig(workdir=str(tmp_path))
    claim(config)
    claim(changed(config, **other))
    assert read_config(tmp_path / CONFIG_FILE) == changed(config, **other)
    assert differences(config, changed(config, workdir="elsewhere", **other)) == []


def without(values, key):
    return {name: value for name, value in values.items() if name != key}


FAULTS = {
    "unknown field": (lambda values: values | {"batchsize": 3}, "batchsize"),
    "unknown field inside": (lambda values: values | {"optim": values["optim"] | {"rate": 3}}, "rate"),
    "another type": (lambda values: values | {"seed": "three"}, "seed"),
    "another choice": (lambda values: values | {"engine": "threads"}, "engine"),
    "impossible": (lambda values: values | {"batch_size": 7, "accumulate": 2}, "batch_size 7 is not divisible by"),
    "half a model": (
        lambda values: values | {"model": values["model"] | {"encoder": without(values["model"]["encoder"], "depth")}},
        "depth",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_that_is_no_configuration_is_refused(name, tmp_path):
    change, word = FAULTS[name]
    file = tmp_path / CONFIG_FILE
    file.write_text(json.dumps(change(config_to_dict(PretrainConfig()))))
    with refused(CONFIG_FILE, f"{CONFIG_FILE} is not a configuration of this version: ", word):
        read_config(file)


def test_a_kind_of_a_later_version_is_refused(tmp_path):
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config_to_dict(PretrainConfig()) | {"kind": "distillation"}))
    with refused("kind", "'distillation', which this version does not know"):
        read_config(tmp_path / CONFIG_FILE)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds list"),
        ("\x00", "is not JSON"),
        ("[" * 100_000, "nested too deep"),
        ('{"seed": ' + "9" * 5000 + "}", "is not JSON: Exceeds the limit"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, text, words):
    (tmp_path / CONFIG_FILE).write_text(text)
    with refused(CONFIG_FILE, words):
        read_config(tmp_path / CONFIG_FILE)
    with refused(CONFIG_FILE, "nowhere is not a run: it has no"):
        read_config(tmp_path / "nowhere" / CONFIG_FILE)
    (tmp_path / "run" / CONFIG_FILE).mkdir(parents=True)
    with refused(CONFIG_FILE, "config.json cannot be read: Is a directory"):
        read_config(tmp_path / "run" / CONFIG_FILE)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with refused("workdir", "file/run cannot be written to"):
        claim(PretrainConfig(workdir=str(tmp_path / "file" / "run")))


def test_an_address_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = PretrainConfig(workdir="s3://bucket/run")
    with refused("workdir", "s3://bucket/run is an address"), claimed(Hosts(), config):
        pass
    assert list(tmp_path.iterdir()) == []


def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_hinders_what_must_be_written_alone(tmp_path, monkeypatch):
    config = PretrainConfig(workdir=str(tmp_path))
    claim(config)
    monkeypatch.setattr("os.replace", full)
    claim(config)
    with refused("workdir", "cannot be written to (No space", "make room, and run the same command"):
        claim(changed(config, keep=9))
    assert read_config(tmp_path / CONFIG_FILE) == config


def test_a_run_on_a_read_only_disk_is_refused_where_nothing_would_be_written(tmp_path, monkeypatch):
    config = PretrainConfig(workdir=str(tmp_path))
    claim(config)

    def read_only(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("os.utime", read_only)
    with refused("workdir", "cannot be written to (Read-only file system): choose another"):
        claim(config)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with refused("checkpoint", "neither a run with a checkpoint nor a checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "10" / "record").mkdir(parents=True)
    (tmp_path / "checkpoints" / "9" / "record").mkdir(parents=True)
    (tmp_path / "checkpoints" / "11").mkdir()  # not finished: it has no record
    newest = tmp_path / "checkpoints" / "10"
    assert find_checkpoint(tmp_path) == find_checkpoint(newest) == newest
    with refused("record", "10 cannot be read: FileNotFoundError"):
        read_record(newest)
    for content in (b"[" * 100_000, b'{"config": ' + b"9" * 5000 + b"}", b"[]", b"{}", b'{"config": 5}'):
        (newest / "record" / "metadata").write_bytes(content)
        with refused("record", "10 cannot be read: "):
            read_record(newest)


def test_one_host_holds_the_folder_for_itself(tiny, tmp_path):
    config = tiny(workdir=str(tmp_path / "run"))
    with claimed(Hosts(), config) as (workdir, held):
        assert workdir == tmp_path / "run"
        held.check()
        with refused("workdir", f"{workdir} is in use by process {os.getpid()}"), claimed(Hosts(), config):
            pass
    assert sorted(path.name for path in workdir.iterdir()) == [".lock", "config.json"]


def test_the_lock_of_several_hosts_is_the_first_one_s(tiny, tmp_path):
    config = tiny(workdir=str(tmp_path / "run"))
    with (
        claimed(Answering(0, 2), config) as (_, first),
        claimed(Answering(1, 2, answers={"seen": ["True"] * 2}), config) as (_, second),
    ):
        assert first is not None
        assert second is None


def test_a_folder_that_is_not_shared_is_refused(tiny, tmp_path):
    hosts = Answering(0, 3, answers={"seen": ["True", "False", "False"]})
    words = "of host 0 is not what host 1, 2 sees under this name: "
    with refused("workdir", words, "share"), claimed(hosts, tiny(workdir=str(tmp_path / "run"))):
        pass
    hosts = Answering(1, 2, answers={"seen": ["True", "False"]})
    with refused("workdir"), claimed(hosts, tiny(workdir=str(tmp_path / "elsewhere"))):
        pass
