"""What hosts compare before the first step."""

import dataclasses
import json

import pytest

from mae_jax.errors import StatedError
from mae_jax.hosts import Hosts
from mae_jax.storage.agreement import check_agreement, claim_together, code_version, facts


@dataclasses.dataclass(frozen=True)
class Told(Hosts):
    """Hosts whose answers are known: `answers` by topic, else what this one says itself."""

    answers: dict | None = None

    def gather(self, topic, text):
        return (self.answers or {}).get(topic, [text] * self.count)


def test_one_host_agrees_with_itself(tiny, tmp_path):
    check_agreement(Hosts(), tiny(), 100)
    config = tiny(workdir=str(tmp_path / "run"))
    assert claim_together(Hosts(), config) == tmp_path / "run"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_where_hosts_may_differ(tiny):
    one, other = tiny(), tiny(workers=3, coordinator="a:1", process_id=1, num_processes=2)
    one = dataclasses.replace(one, coordinator="b:1", process_id=0, num_processes=2)
    assert facts(one, 100) == facts(other, 100)


@pytest.mark.parametrize(
    ("changes", "examples", "said"),
    [
        ({"seed": 7}, 100, "seed: 0 on host 0, 7 on host 1"),
        ({"weight_decay": 0.1}, 100, "optim.weight_decay: 0.05 on host 0, 0.1 on host 1"),
        ({"workdir": "x"}, 100, "workdir: runs/pretrain on host 0, x on host 1"),
        (
            {"coordinator": "a:1", "process_id": 1, "num_processes": 3},
            100,
            "num_processes: None on host 0, 3 on host 1",
        ),
        ({}, 99, "images: 100 on host 0, 99 on host 1"),
    ],
)
def test_where_they_may_not(tiny, changes, examples, said):
    answers = [json.dumps(facts(tiny(), 100)), json.dumps(facts(tiny(**changes), examples))]
    with pytest.raises(StatedError, match=rf"do not run the same: {said}\. Start all"):
        check_agreement(Told(0, 2, answers={"facts": answers}), tiny(), 100)


def test_another_version_is_another_code():
    version = code_version()
    assert len(version["mae_jax code"]) == 12
    assert version == code_version()
    assert version["jax"].count(".") >= 2


def test_a_folder_that_is_not_shared_is_refused(tiny, tmp_path):
    hosts = Told(0, 3, answers={"seen": ["True", "False", "False"]})
    with pytest.raises(StatedError, match=r"of host 0 is not what host 1, 2 sees under this name: .* share"):
        claim_together(hosts, tiny(workdir=str(tmp_path / "run")))
    with pytest.raises(StatedError, match="is not what host"):
        claim_together(Told(1, 2, answers={"seen": ["True", "False"]}), tiny(workdir=str(tmp_path / "elsewhere")))
