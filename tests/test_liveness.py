"""A process whose other host is gone ends with a sentence: tried in processes of their own, on a store of its own."""

import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, time
from mae_jax.train import liveness
liveness.HEARTBEAT, liveness.GONE_AFTER = 0.05, 0.5

class Store:
    def __init__(self):
        self.values, self.beats = {}, 0
    def key_value_set(self, key, value, allow_overwrite=False):
        self.values[key] = value
        self.beats += 1
        PLANTED
    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]

store = Store()
watch = liveness.Watch(1, 3, store)
watch.how = lambda: "Run it again."
time.sleep(5)
os._exit(7)
"""

ALIVE = 'self.values["alive/0"] = self.values["alive/2"] = str(self.beats)'


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        ('self.values["alive/0"] = str(self.beats)', "host 2 of 3 has not been heard of for 0.5 s. Run it again."),
        ("pass", "host 0 and host 2 of 3 have not been heard of for 0.5 s. Run it again."),
        (f'{ALIVE}; self.values["failed/2"] = "no disk"', "host 2 of 3 has failed: no disk\nRun it again."),
        ("raise RuntimeError('socket closed')", "the connection to host 0 of 3 is lost: it has ended or cannot be"),
        ("os.kill(os.getpid(), signal.SIGABRT)", "the connection to host 0 of 3 is lost: it has ended or cannot be"),
    ],
)
def test_which_is_gone_is_said(planted, said):
    done = subprocess.run([sys.executable, "-c", SCRIPT.replace("PLANTED", planted)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"mae-jax: {said}")


def test_while_all_live_nothing_happens():
    script = SCRIPT.replace("PLANTED", ALIVE).replace("sleep(5)", "sleep(1.5)")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        ('self.values["alive/0"] = str(self.beats)', "host 2 of 3 has not been heard of for 0.5 s. Run it again."),
        (f"{ALIVE}; self.values['alive/2'] = 'the last'", "host 2 of 3 has not been heard of for 0.5 s. Run it again."),
        (ALIVE, "the disk is full"),
    ],
)
def test_what_fails_because_another_is_gone_is_not_blamed(planted, said):
    script = SCRIPT.replace("PLANTED", planted).replace("time.sleep(5)", 'watch.give_up("the disk is full")')
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"mae-jax: {said}\n")
