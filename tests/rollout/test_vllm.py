"""Samples from vLLM servers, doubles of them here: weights that arrive, are compared, and servers that fail."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.load_save import load_model, load_tokenizer, save_checkpoint
from slingshot.engine.sampling import SamplingParams
from slingshot.rollout.vllm import NoServerLeft, VllmSampler
from slingshot.tasks.loader import TaskConfig
from slingshot.tasks.mixture import Item
from slingshot.text.tokenizer import Tokenizer
from slingshot.training.parallel import Parallel
from tests.rollout.vllm_double import VllmDouble

PARAMS = SamplingParams(n=3, max_tokens=8, temperature=0.8, ignore_eos=True)
PROMPTS, KEYS = [[3, 45, 91], [3, 75], [3, 45], [7, 8, 9]], ["a", "b", "c", "d"]
ASKED = PROMPTS, [PARAMS] * 4, KEYS


@pytest.fixture(scope="module", params=["dense", "moe"])
def folder(request, make_model, dense, deepseek, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / request.param
    path.mkdir()
    config = (dense if request.param == "dense" else deepseek)(vocab_size=300, max_position_embeddings=64)
    save_checkpoint(path, make_model(config), tokenizer)
    return path


@pytest.fixture
def sampler(folder, make_model, tmp_path):
    """sampler(doubles, **more): beside a model of the served shape that has other weights."""
    task = TaskConfig(name="arithmetic").load()
    item = Item(task, next(iter(task.problems("train", 0))), "probe")

    def make(doubles, params=PARAMS, **more):
        model = make_model(load_model(folder).config, seed=1)
        urls, where = [double.url for double in doubles], tmp_path / "weights"
        probes = [(item, prompt) for prompt in PROMPTS]
        made = VllmSampler(urls, model, load_tokenizer(folder), where, probes, params, Parallel(), **more)
        return made, model.state_dict()

    return make


def gathered(sampled):
    """Samples by their prompt's index."""
    found = {}
    for index, number, each in sampled.sample(*ASKED):
        assert number == len(found.setdefault(index, []))
        found[index].append(each)
    return found


def test_weights_are_pushed_whole_and_samples_are_theirs(folder, sampler, tmp_path):
    with VllmDouble(folder) as one, VllmDouble(folder) as other:
        sampled, state = sampler([one, other])
        told = sampled.update_weights(0, state)
        assert told["server_gap"] < 1e-4 and told["servers"] == 2
        first = gathered(sampled)
        assert [len(first[index]) for index in range(4)] == [3] * 4
        assert all(len(each.ids) == len(each.logprobs) == 8 for samples in first.values() for each in samples)
        assert len({tuple(each.ids) for each in first[0]}) > 1  # each sample has noise of its own
        again = gathered(sampled)
        assert {i: [s.ids for s in each] for i, each in again.items()} == {
            i: [s.ids for s in each] for i, each in first.items()
        }  # and the same from whichever server
        assert {double.asked.count("/inference/v1/generate") for double in (one, other)} == {8}

        state = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        sampled._model.load_state_dict(state)  # as training does
        assert sampled.update_weights(1, state)["server_gap"] < 1e-4
        [zeros] = {round(p, 4) for *_, each in sampled.sample(*ASKED) for p in each.logprobs}
        assert zeros == pytest.approx(-5.7038, abs=1e-3)  # log 1/300: nothing of the weights before is left
    others = "/tokenize", "/v1/models", "/inference/v1/generate", "/metrics"
    pushed = [path for path in one.asked if path not in others]
    push = ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume"]
    assert pushed == ["/collective_rpc", *push, *push]
    assert len(list((tmp_path / "weights").iterdir())) == 1


def test_routed_experts_are_those_of_moe_layers(folder, sampler):
    params = SamplingParams(max_tokens=4, ignore_eos=True, routed_experts=True)
    with VllmDouble(folder) as double:
        sampled, state = sampler([double], params=params)
        if not sampled.model_config.n_moe_layers:
            pytest.skip("has none")
        sampled.update_weights(0, state)
        ((_, _, sample),) = sampled.sample(PROMPTS[:1], [params], KEYS[:1])
        assert sample.routed_experts.shape == (3 + 4 - 1, 2, 3) and sample.routed_experts.dtype == torch.int16
        double.about = {"routed_experts": False}
        with pytest.raises(SlingshotError, match=r"loss.replay_routing: http://\S+ tells of no experts"):
            sampler([double], params=params)[0].update_weights(0, state)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"about": {"config": {"hidden_size": 4096}}}, "serves another model: hidden_size 4096, not 32|64"),
        ({"about": {"logprobs_mode": "raw_logprobs"}}, "tells logprobs of temperature 1"),
        ({"faults": ["broken"]}, "is vLLM without slingshot's extension"),
        ({"faults": ["stale"]}, r"its logprobs are [\d.]+ nats a token from the trainer's, more than 0.001"),
        ({"tokenizer": Tokenizer.train(["The sum is"], vocab_size=280)}, "has another tokenizer"),
    ],
)
def test_a_server_that_is_not_the_runs_is_refused_by_name(folder, sampler, more, message):
    with VllmDouble(folder) as right, VllmDouble(folder, **more) as wrong:
        sampled, state = sampler([right, wrong])
        with pytest.raises(SlingshotError, match=f"{wrong.url} .*({message})|{wrong.url}: .*({message})"):
            sampled.update_weights(0, state)


def test_a_server_that_dies_is_replaced_by_the_others_and_may_come_back(folder, sampler, capsys):
    with VllmDouble(folder) as steady:
        mortal = VllmDouble(folder, answers=len(PROMPTS))  # until the first samples are asked for
        mortal.__enter__()
        sampled, state = sampler([steady, mortal])
        sampled.update_weights(0, state)
        found = gathered(sampled)
        assert all(each.finish_reason == "length" for samples in found.values() for each in samples)
        assert f"{mortal.url}: it does not answer" in capsys.readouterr().err
        assert sampled.update_weights(1, state)["servers"] == 1
        assert capsys.readouterr().err == ""  # that is said already
        with VllmDouble(folder, port=mortal.port):
            assert sampled.update_weights(2, state)["servers"] == 2
            assert f"{mortal.url} is back" in capsys.readouterr().err
            assert [len(server.names) for server in sampled._servers] == [2, 2]  # the last weights, and those before
            assert {i: [s.ids for s in each] for i, each in gathered(sampled).items()} == {
                i: [s.ids for s in each] for i, each in found.items()
            }


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("old", "it answers with the weights old"),
        ("aborts", "it broke an answer off (abort)"),
        pytest.param("hangs", "it made no token for 15 s", marks=pytest.mark.slow),
    ],
)
def test_a_server_that_hangs_or_answers_with_old_weights_is_asked_no_more(folder, sampler, capsys, fault, why):
    with VllmDouble(folder) as steady, VllmDouble(folder) as failing:
        sampled, state = sampler([steady, failing], silence=15.0)
        sampled.update_weights(0, state)
        failing.faults.add(fault)
        found = gathered(sampled)
        assert all(each.finish_reason == "length" for samples in found.values() for each in samples)
        assert f"{failing.url}: {why}" in capsys.readouterr().err
        failing.faults.clear()


def test_an_answer_goes_on_with_weights_that_come_meanwhile(folder, sampler):
    with VllmDouble(folder) as only, ThreadPoolExecutor(1) as thread:
        sampled, state = sampler([only])
        sampled.update_weights(0, state)
        only.faults.add("lasts")
        under_way = thread.submit(lambda: list(sampled.sample(PROMPTS[:1], [PARAMS], KEYS[:1])))
        while "lasts" in only.faults:
            time.sleep(0.01)
        assert sampled.update_weights(1, state)["servers"] == 1
        assert [each.finish_reason for *_, each in under_way.result()] == ["length"] * 3


def test_where_no_server_is_left_samples_are_broken_off_and_weights_wait(folder, sampler, capsys):
    with VllmDouble(folder, answers=len(PROMPTS) + 1) as only:
        sampled, state = sampler([only])
        sampled.update_weights(0, state)
        reasons = [each.finish_reason for *_, each in sampled.sample(*ASKED)]
        assert reasons.count("abort") >= 9
        with pytest.raises(NoServerLeft, match="no rollout server has the weights of step 1"):
            sampled.update_weights(1, state)
    with VllmDouble(folder, port=only.port) as only:
        assert sampled.update_weights(1, state)["servers"] == 1
        only.faults.add("wedged")
        with pytest.raises(NoServerLeft):
            sampled.update_weights(2, state)
        assert only.asked[-1] == "/resume"  # it goes on with what it runs, whatever became of the push
        assert "could not load new weights: RuntimeError: sizes differ" in capsys.readouterr().err
