"""What RL draws: others for problems without a signal, none that are solved, and the same after an interruption."""

import threading

import pytest

from slingshot.engine.engine import Engine
from slingshot.rollout.curriculum import Curriculum
from slingshot.rollout.sampler import EngineSampler
from slingshot.stages import rl
from slingshot.tasks.loader import TaskConfig
from slingshot.tasks.mixture import TaskMix
from slingshot.tasks.task import Solution, key_number, split_of

LETTERS = [each for each in "abcdefghijklmnop" if split_of(each) == "train"][:8]
FIRST, REST = "".join(LETTERS[:4]), LETTERS[4:]


@pytest.fixture
def letters(tmp_path):
    """A task of eight given problems: say the letter."""
    rows = ", ".join(f"{{'prompt': 'say {each}', 'key': '{each}', 'answer': '{each}'}}" for each in LETTERS)
    (tmp_path / "letters.py").write_text(
        f"def problems(split, seed):\n    return [{rows}]\ndef verify(problem, text):\n"
        "    return text.strip() == problem['answer']\n"
    )
    return str(tmp_path / "letters.py")


@pytest.fixture
def training(base, letters):
    common = {"model": str(base), "tasks": [letters], "dtype": "float32", "threads": 1, "sequence_length": 64}
    sizes = {"steps": 4, "prompts_per_step": 2, "group_size": 2, "sampling": {"max_tokens": 24}}
    return lambda **changes: rl.RLConfig.parse({**common, **sizes, **changes}, "rl")


class Asked:
    """What a scripted sampler was asked for, step by step; it solves some letters always, others half of the time."""

    def __init__(self, saying, solved="", half=LETTERS):
        self.keys, self.steps = [], []
        self.sampler = saying(lambda key, index: self.say(key.rpartition("/")[2], index, solved, half))

    def say(self, letter, index, solved, half):
        if index == 0:
            self.keys.append((self.sampler.version, letter))
        right = letter in solved or (letter in half and index % 2 == 0)
        return Solution("so", letter if right else "no")

    def letters(self, step):
        return [letter for version, letter in self.keys if version == step]


def test_groups_without_a_signal_are_replaced_by_others(training, saying, metrics, tmp_path):
    """Only two problems give one. Without `refill` a step has two groups; with it, rounds until two have a signal."""
    asked = Asked(saying, half=FIRST[:2])
    rl.run(training(), tmp_path / "plain", asked.sampler)
    assert [len(asked.letters(step)) for step in range(4)] == [2] * 4
    asked = Asked(saying, half=FIRST[:2])
    rl.run(training(refill=50), tmp_path / "out", asked.sampler)
    for step, row in enumerate(metrics(tmp_path / "out")):
        found = asked.letters(step)
        assert sum(letter in FIRST[:2] for letter in found) == 2
        assert row["no_signal"] == pytest.approx(1 - 2 / len(found)) and row["loss"] is not None
    drawn = [letter for _, letter in asked.keys]
    assert sorted(drawn[:8]) == LETTERS, "each problem once before any twice"


def test_samples_are_so_many_updates_behind_whatever_the_clock_does(training, saying, metrics, tmp_path):
    asked, plain, staleness = Asked(saying), Asked(saying), 3
    rl.run(training(steps=6, staleness=staleness), tmp_path / "out", asked.sampler)
    rl.run(training(steps=6), tmp_path / "plain", plain.sampler)
    assert [letter for _, letter in asked.keys] == [letter for _, letter in plain.keys]
    assert [version for version, _ in asked.keys[::2]] == [max(0, step - staleness) for step in range(6)]
    assert [row["staleness"] for row in metrics(tmp_path / "out")] == [min(step, staleness) for step in range(6)]


class Lasting:
    """A sampler whose last response to any but the `first` problems is under way until other weights have come."""

    def __init__(self, sampler, first):
        self.inner, self.first, self.changed, self.began, self.spans = sampler, first, threading.Condition(), 0, []
        self.tokenizer, self.model_config, self.max_length = sampler.tokenizer, sampler.model_config, sampler.max_length

    def sample(self, prompts, params, keys):
        with self.changed:
            self.began, version = self.began + 1, self.inner.version
            self.changed.notify_all()
        *found, last = self.inner.sample(prompts, params, keys)
        yield from found
        with self.changed:
            self.changed.wait_for(lambda: keys == self.first or self.inner.version > version)
            self.spans.append((version, self.inner.version))
        yield last

    def update_weights(self, version, state):
        with self.changed:
            self.changed.wait_for(lambda: not version or self.began > version)
            self.changed.notify_all()
            return self.inner.update_weights(version, state)


def test_partial_responses_go_on_with_newer_weights(training, saying, metrics, tmp_path):
    config = training(staleness=1, partial=True)
    first = [item.key for item in TaskMix(config.tasks, "train", "rl/0").draw(0, config.prompts_per_step)]
    sampler = Lasting(Asked(saying).sampler, first)
    rl.run(config, tmp_path / "out", sampler)
    assert sampler.spans == [(0, 0), (0, 1), (1, 2), (2, 3)]  # of weights that each batch began and ended with
    assert [row["staleness"] for row in metrics(tmp_path / "out")] == [0, 1, 1, 1]


@pytest.mark.slow
def test_what_was_begun_and_not_trained_on_is_drawn_again(training, saying, metrics, tmp_path):
    config = training(staleness=1, save_seconds=0.0)
    whole, broken = Asked(saying), Asked(saying)
    rl.run(config, tmp_path / "whole", whole.sampler)
    with pytest.raises(ConnectionError):
        rl.run(config, tmp_path / "out", Breaking(broken.sampler, at=3))
    rl.run(config, tmp_path / "out", broken.sampler)
    letters = [letter for _, letter in whole.keys]
    assert [letter for _, letter in broken.keys] == letters[:8] + letters[6:]  # two each step
    assert [row["staleness"] for row in metrics(tmp_path / "out")] == [0, 1, 1, 0]


def test_refill_ends_where_no_problem_has_a_signal(training, saying, metrics, tmp_path):
    asked = Asked(saying, half="")
    rl.run(training(refill=3, steps=2), tmp_path / "out", asked.sampler)
    assert [len(asked.letters(step)) for step in range(2)] == [8, 8]  # 2, and 3 times 2 in their place
    assert [row["no_signal"] for row in metrics(tmp_path / "out")] == [1.0, 1.0]


def test_solved_problems_retire(training, saying, tmp_path):
    """Four are always solved: once drawn, they come no more; the others come again and again."""
    asked = Asked(saying, solved=FIRST)
    rl.run(training(retire=0.9, steps=10), tmp_path / "out", asked.sampler)
    drawn = [letter for _, letter in asked.keys]
    assert len(drawn) == 20 and all(drawn.count(letter) == 1 for letter in FIRST)
    assert all(drawn.count(letter) >= 3 for letter in REST)


def test_a_task_that_is_solved_whole_is_drawn_all_the_same(letters):
    mix = TaskMix([TaskConfig(name=letters)], "train", "0")
    everything = Curriculum(mix, 0.9)
    keys = {item.problem.key for item in everything.draw(8)}
    assert keys == set(LETTERS)
    retired = {key_number(f"0/{letter}") for letter in LETTERS}
    solved = Curriculum(mix, 0.9, retired=retired)
    assert len(solved.draw(5)) == 5 and solved.state()["retired"] == sorted(retired)
    one_left = Curriculum(mix, 0.9, retired=retired - {key_number(f"0/{FIRST[2]}")})
    assert [item.problem.key for item in one_left.draw(3)] == [FIRST[2]] * 3


class Breaking:
    """A sampler that dies as it is about to get the weights of one step."""

    def __init__(self, sampler, at):
        self.inner, self.at = sampler, at
        self.tokenizer, self.model_config, self.max_length = sampler.tokenizer, sampler.model_config, sampler.max_length

    def sample(self, prompts, params, keys):
        return self.inner.sample(prompts, params, keys)

    def update_weights(self, version, state):
        if version == self.at:
            raise ConnectionError("gone")
        return self.inner.update_weights(version, state)


@pytest.mark.slow
def test_what_is_retired_and_drawn_outlasts_an_interruption(training, saying, tmp_path):
    config = training(retire=0.9, refill=1, steps=8, save_seconds=0.0)
    whole, broken = (Asked(saying, solved=FIRST, half=FIRST + REST[0]) for _ in range(2))
    rl.run(config, tmp_path / "whole", whole.sampler)
    for at in (3, 6):
        with pytest.raises(ConnectionError):
            rl.run(config, tmp_path / "out", Breaking(broken.sampler, at))
    rl.run(config, tmp_path / "out", broken.sampler)
    assert broken.keys == whole.keys


@pytest.mark.parametrize(
    ("loss", "rewards"),
    [
        ({"name": "dapo", "mask_truncated": True, "replay_routing": True}, {"random": True}),
        pytest.param({"name": "gspo", "importance": "masked"}, {"overlong_buffer": 8}, marks=pytest.mark.slow),
    ],
)
def test_an_interruption_leaves_no_trace(training, base, metrics, tmp_path, loss, rewards):
    """With minibatches, MTP, refilled and retired problems, and a reference that changes."""
    loss = loss | {"kl": 0.01, "reference_steps": 2}
    config = training(
        loss=loss, minibatches=2, refill=2, retire=0.4, group_size=4, save_seconds=0.0, steps=4, rewards=rewards
    )
    rl.run(config, tmp_path / "whole", EngineSampler(Engine.load(base)))
    for at in (1, 3):
        with pytest.raises(ConnectionError):
            rl.run(config, tmp_path / "out", Breaking(EngineSampler(Engine.load(base)), at))
    rl.run(config, tmp_path / "out", EngineSampler(Engine.load(base)))
    assert metrics(tmp_path / "out") == metrics(tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1] != (base / "model.safetensors").read_bytes()
    assert any("mtp_loss" in row for row in metrics(tmp_path / "out"))


def test_a_state_of_an_earlier_version_goes_on_with_the_next_problems(letters):
    mix = TaskMix([TaskConfig(name=letters)], "train", "0")
    keys = [item.problem.key for item in Curriculum(mix).draw(8)]
    assert [item.problem.key for item in Curriculum(mix, place=2).draw(6)] == keys[2:]


def test_a_weight_of_brevity_that_cancels_is_told_as_a_run_starts(training, tmp_path, capsys):
    said = "out: where a whole group is right, division by its std leaves nothing of rewards.length; set"
    for number, (length, std) in enumerate([(0.1, "group"), (0.1, "none"), (0.1, "batch"), (0.0, "group")]):
        out = tmp_path / str(number) / "out"
        rl.run(training(rewards={"length": length}, loss={"advantage_std": std}, steps=1), out)
        assert capsys.readouterr().err.count(f'{said} loss.advantage_std = "none"\n') == (number == 0)


def test_a_collapse_of_entropy_is_told_once(capsys):
    watch = rl.EntropyWatch(None)
    for entropy in (0.8, None, 0.3, 0.05, 0.03, 0.02):
        watch.watch(entropy, speaks=True)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "entropy fell from 0.8 to 0.03 nats a token: samples are alike; try a higher loss.clip_high, or a lower rate"
    ]
    rl.EntropyWatch(0.8).watch(0.01, speaks=False)
    assert not capsys.readouterr().err
