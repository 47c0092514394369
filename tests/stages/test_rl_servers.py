"""RL whose responses vLLM servers make, doubles of them here: it learns as in process, and outlasts them."""

import os
import signal
import threading
from contextlib import contextmanager

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.stages import rl
from tests.rollout.vllm_double import VllmDouble

pytestmark = pytest.mark.slow


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def test_a_run_on_two_servers_samples_every_step_from_its_weights(training, base, metrics, tmp_path):
    with VllmDouble(base) as one, VllmDouble(base) as other:
        config = training(rollouts=[one.url, other.url], steps=3, loss={"replay_routing": True})
        rl.run(config, tmp_path / "out")
    rows = metrics(tmp_path / "out")
    assert [row["servers"] for row in rows] == [2, 2, 2]
    assert all(row["logprob_gap"] < 1e-4 and row["server_gap"] < 1e-4 for row in rows)
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out" / "weights").exists()


@contextmanager
def once_it_waits(capsys, act):
    """Do `act` in a thread once the run says that it waits for a server."""

    def watch():
        said = ""
        while "waiting for one" not in said and not over.wait(0.1):
            said += capsys.readouterr().err
        act()

    over, thread = threading.Event(), threading.Thread(target=watch)
    thread.start()
    yield
    over.set()
    thread.join()


@pytest.fixture
def mortal(base):
    """A server that dies within the samples of the second step; 8 answers of each step are to probes."""
    double = VllmDouble(base, answers=8 + 3 + 8 + 1)
    double.__enter__()
    return double


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    """undisturbed(config): the weights of a run whose server lives, made once."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"

    def run(config):
        if not out.exists():
            with VllmDouble(base) as steady:
                rl.run(config(rollouts=[steady.url], steps=3), out)
        return weights(out)

    return run


def test_a_run_that_lost_all_servers_midway_ends_as_one_that_did_not(
    training, base, mortal, undisturbed, capsys, tmp_path
):
    """The step is begun anew with the same problems, once a server is there again."""
    revived = VllmDouble(base, port=mortal.port)
    with once_it_waits(capsys, revived.__enter__):
        rl.run(training(rollouts=[mortal.url], steps=3), tmp_path / "out")
    revived.__exit__()
    assert weights(tmp_path / "out") == undisturbed(training)


def test_a_run_that_waits_is_stopped_and_goes_on_at_other_servers(
    training, base, mortal, undisturbed, capsys, tmp_path
):
    """An address is no part of what a run is."""
    with once_it_waits(capsys, lambda: os.kill(os.getpid(), signal.SIGINT)), pytest.raises(KeyboardInterrupt):
        rl.run(training(rollouts=[mortal.url], steps=3), tmp_path / "out")
    assert (tmp_path / "out.partial" / "state-1").exists()
    with VllmDouble(base) as other:
        rl.run(training(rollouts=[other.url], steps=3), tmp_path / "out")
    assert weights(tmp_path / "out") == undisturbed(training)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts": ["gpu1:8000"]}, "'gpu1:8000' is no server's address: write http://HOST:PORT"),
        ({"rollouts": ["http://a", "http://a"]}, "rollouts: a server is named twice"),
    ],
)
def test_addresses_that_are_none_are_refused(training, changes, message):
    with pytest.raises(SlingshotError, match=message):
        training(**changes)
