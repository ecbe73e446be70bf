"""Hosts that are about to run different things are refused, all of them, with what differs."""

import dataclasses
import json

import pytest

from mae_jax.hosts import Hosts
from mae_jax.storage.agreement import check_agreement, code_version, facts
from tests.refusals import refused
from tests.storage.answering import Answering


def test_one_host_agrees_with_itself(tiny):
    check_agreement(Hosts(), tiny(), 100)


def test_where_hosts_may_differ(tiny):
    one, other = tiny(), tiny(workers=3, coordinator="a:1", process_id=1, num_processes=2)
    one = dataclasses.replace(one, coordinator="b:1", process_id=0, num_processes=2)
    assert facts(one, 100) == facts(other, 100)


@pytest.mark.parametrize(
    ("changes", "examples", "field", "words"),
    [
        ({"seed": 7}, 100, "seed", "0 on host 0, 7 on host 1"),
        ({"weight_decay": 0.1}, 100, "optim.weight_decay", "0.05 on host 0, 0.1 on host 1"),
        ({"workdir": "x"}, 100, "workdir", "runs/pretrain on host 0, x on host 1"),
        (
            {"coordinator": "a:1", "process_id": 1, "num_processes": 3},
            100,
            "num_processes",
            "None on host 0, 3 on host 1",
        ),
        ({}, 99, "images", "100 on host 0, 99 on host 1"),
    ],
)
def test_where_they_may_not(tiny, changes, examples, field, words):
    answers = [json.dumps(facts(tiny(), 100)), json.dumps(facts(tiny(**changes), examples))]
    with refused(field, f"do not run the same: {field}: {words}. Start all of them alike."):
        check_agreement(Answering(0, 2, answers={"facts": answers}), tiny(), 100)


def test_another_version_is_another_code():
    version = code_version()
    assert len(version["mae_jax code"]) == 12
    assert version == code_version()
    assert version["jax"].count(".") >= 2
