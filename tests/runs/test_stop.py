"""A run is asked to stop from anywhere, and stops between two steps."""

import dataclasses
import os
import signal
import threading

import pytest
from jax.experimental import multihost_utils

from mae_jax.runs import loop
from mae_jax.runs.loop import StepsInFlight
from mae_jax.runs.pretrain import pretrain
from mae_jax.runs.stop import StopRequest
from mae_jax.storage.workdir import RECORD


def test_the_first_request_counts():
    stop = StopRequest()
    assert stop.signal is None
    assert stop.request(signal.SIGHUP)
    assert not stop.request(signal.SIGINT)
    assert stop.signal == signal.SIGHUP


def test_alone_it_stops_after_the_step_under_way(tmp_path):
    stop = StopRequest()
    stop.start(tmp_path, 5, several=False)
    assert not stop.after(5)
    assert stop.step == 6
    assert not stop.imminent
    stop.request()
    assert "stopping after step 6, then saving" in stop.outlook()
    assert stop.imminent
    assert stop.after(6)
    assert stop.step == 6


def test_what_is_lost_counts_from_the_newest_whole_checkpoint(tmp_path):
    stop = StopRequest()
    assert (
        stop.outlook()
        == "stopping after the first step, then saving; again: end at once, and lose what is since step 0"
    )
    stop.start(tmp_path, 5, several=False)
    for name in (f"2/{RECORD}", f"3/{RECORD}", f"4.orbax-checkpoint-tmp-1/{RECORD}"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert stop.outlook().endswith("lose what is since step 3")


def test_among_hosts_all_stop_where_the_service_says(tmp_path, monkeypatch):
    """Whatever asks is passed on once as SIGTERM, which the service catches."""
    passed_on = []
    monkeypatch.setattr(os, "kill", lambda process, number: passed_on.append(number))
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step == 9)
    stop = StopRequest()
    stop.start(tmp_path, 7, several=True)
    assert not stop.after(7)
    assert passed_on == []
    stop.request(signal.SIGINT)
    assert not stop.imminent
    assert not stop.after(8)
    assert stop.after(9)
    assert passed_on == [signal.SIGTERM]
    assert stop.signal == signal.SIGINT

    asked_elsewhere = StopRequest()
    asked_elsewhere.start(tmp_path, 9, several=True)
    assert asked_elsewhere.after(9)
    assert asked_elsewhere.signal == signal.SIGTERM


def test_a_run_in_a_thread_can_be_stopped_and_leaves_signals_alone(tiny, tmp_path):
    config = dataclasses.replace(
        tiny(), steps=2000, save_every=2000, devices=1, reconstruct_every=None, workers=0, workdir=str(tmp_path / "run")
    )
    stop, finished = StopRequest(), []
    before = [signal.getsignal(number) for number in signal.valid_signals()]
    thread = threading.Thread(target=lambda: finished.append(pretrain(config, stop=stop)))
    thread.start()
    while stop.step is None or stop.step < 3:
        thread.join(0.01)
        assert thread.is_alive()
    assert [signal.getsignal(number) for number in signal.valid_signals()] == before
    stop.request(signal.SIGUSR1)
    thread.join()
    assert finished[0].signal == signal.SIGUSR1
    assert 3 <= finished[0].step < 2000
    assert (tmp_path / "run" / "checkpoints" / str(finished[0].step)).is_dir()


class Device:
    """A device on which each step takes so long, and the clock of its host; a step is what waits for it."""

    def __init__(self, seconds):
        self.seconds, self.now, self.busy_until = seconds, 0.0, 0.0

    def give_out(self):
        self.busy_until = done = max(self.now, self.busy_until) + self.seconds

        def wait():
            self.now = max(self.now, done)

        return wait


@pytest.mark.parametrize(("seconds", "under_way"), [(6.0, 1), (1.2, 1), (0.45, 4), (0.01, 8)])
def test_the_steps_under_way_are_about_two_seconds(monkeypatch, seconds, under_way):
    device = Device(seconds)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: device.now)
    monkeypatch.setattr(loop.jax, "block_until_ready", lambda wait: wait())
    steps, idle = StepsInFlight(8), 0.0
    for number in range(40):
        device.now += 0.001  # the host's own work
        if number == 20:
            device.now += 60  # an evaluation
        steps.wait()
        idle += max(0.0, device.now - device.busy_until)
        steps.add(device.give_out())
        assert device.busy_until - device.now <= max(2.0, seconds) + 0.01
    assert round((device.busy_until - device.now) / seconds) == under_way
    assert idle < 60.1 + (0 if under_way > 1 else 40 * 0.001)
