"""cost/workload.py: the same work on another device, and the work of a stage that has run."""

from __future__ import annotations

import pytest

from slingshot.cost.devices import device
from slingshot.cost.flops import parameters, training_parts
from slingshot.cost.receipt import Receipt
from slingshot.cost.workload import KERNEL_SECONDS, TRAINING_KERNELS, Phase, Workload, elsewhere, forward_kernels
from slingshot.machine.machine import Machine
from slingshot.model.config import ModelConfig

SMALL = ModelConfig.parse(
    {"family": "dense", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
)
LARGE = ModelConfig.preset("qwen2.5-32b")
H100 = device("h100")


def training(model: ModelConfig, steps: int, tokens: int) -> Workload:
    flops = {part: steps * count for part, count in training_parts(model, [1024] * (tokens // 1024)).items() if count}
    phase = Phase(name="training", sort="training", steps=steps, at_once=1024, tokens=steps * tokens, flops=flops)
    return Workload(kind="pretrain", model=model, phases=(phase,))


def test_a_large_network_is_bound_by_its_flops_and_a_small_one_by_its_kernels() -> None:
    large = elsewhere(training(LARGE, 10, 65536), H100)
    assert large.seconds == pytest.approx(training(LARGE, 10, 65536).flops / (0.4 * 989.4e12))
    assert large.launching == 0 and large.money == pytest.approx(large.seconds / 3600 * 2.69) and large.joules == pytest.approx(700 * large.seconds)
    small = elsewhere(training(SMALL, 10, 1024), H100)
    assert small.seconds == pytest.approx(10 * TRAINING_KERNELS * forward_kernels(SMALL) * KERNEL_SECONDS)
    assert small.launching > 0.9 * small.seconds and small.seconds < large.seconds


def test_experts_cost_kernels() -> None:
    moe = ModelConfig.preset("deepseek-v3")
    assert forward_kernels(moe) > forward_kernels(moe.model_copy(update={"n_routed_experts": 0})) == 61 * 80


def test_rollouts_take_rounds_of_a_full_batch() -> None:
    def rounds(responses: int, steps: int = 1, response: float = 100.0) -> float:
        phase = Phase(name="r", sort="rollouts", steps=steps, flops={"sampling": 1.0}, responses=responses, prompt=50, response=response, longest=200)
        return elsewhere(Workload(kind="rl", model=LARGE, phases=(phase,)), H100).seconds

    assert rounds(256, steps=3) == pytest.approx(3 * rounds(256))
    assert rounds(512) == pytest.approx(2 * rounds(256))
    # 64 blocks issue their kernels in longer than one of them takes to read its weights.
    assert rounds(256) == rounds(1) == pytest.approx(200 * forward_kernels(LARGE) * KERNEL_SECONDS)


def test_a_large_network_decodes_at_its_roofline() -> None:
    wide = LARGE.model_copy(update={"num_hidden_layers": 8, "hidden_size": 16384, "intermediate_size": 65536})

    def seconds(responses: int, response: float) -> float:
        phase = Phase(name="r", sort="rollouts", steps=1, responses=responses, prompt=50, response=response, longest=200)
        return elsewhere(Workload(kind="rl", model=wide, phases=(phase,)), H100).seconds

    read = 2 * (parameters(wide).total - parameters(wide).embedding) / H100.bandwidth / 0.46
    assert seconds(1, 100) == pytest.approx(200 * read, rel=0.01)
    assert seconds(256, 200) > seconds(256, 100) > seconds(1, 100)


def test_memory_says_what_fits() -> None:
    weights = parameters(LARGE).total
    trained, sampled = elsewhere(training(LARGE, 1, 1024), H100), Phase(name="r", sort="rollouts", steps=1, responses=1, response=10, longest=10)
    assert trained.memory_bytes > 16 * weights and not trained.fits
    served = elsewhere(Workload(kind="sample", model=LARGE, phases=(sampled,)), H100)
    assert served.memory_bytes == pytest.approx(2 * weights, rel=0.01) and served.fits
    update = Phase(name="update", sort="training", steps=1, at_once=10, flops={"training": 1.0})
    both = Workload(kind="rl", model=LARGE, phases=(sampled, update))
    alone = elsewhere(both, H100).memory_bytes
    reference = both.model_copy(update={"phases": (sampled, update.model_copy(update={"flops": {"training": 1.0, "reference": 1.0}}))})
    assert elsewhere(reference, H100).memory_bytes == pytest.approx(alone + 2 * weights)


def test_the_price_is_the_tables_example() -> None:
    assert "$2.69 an hour, the table's example" in elsewhere(training(LARGE, 10, 65536), H100).assumptions


def receipt(stage: str, config: dict[str, object], tokens: int, **parts: float) -> Receipt:
    return Receipt(
        stage=stage, name="x", config=config, parents=[], digest="0", tokens=tokens, flops=sum(parts.values()), flops_by_part=parts, seconds=1,
        peak_memory_bytes=1, mfu=None, money=None, machine=Machine(cpu="", cores=1, memory_bytes=1), version="1",
    )  # fmt: skip


def test_a_receipt_tells_what_was_done() -> None:
    config: dict[str, object] = {"prompts_per_step": 16, "group_size": 16, "max_tokens": 128}
    work = Workload.of(receipt("rl", config, 50 * 256 * 40, sampling=1e9, training=3e9, mtp=0.0, reference=1e9), SMALL, steps=50)
    rollouts, update = work.phases
    assert (rollouts.steps, rollouts.responses, rollouts.response, rollouts.longest, rollouts.flops) == (50, 256, 40, 80, {"sampling": 1e9})
    assert (update.steps, update.flops, work.flops) == (50, {"training": 3e9, "reference": 1e9}, 5e9)
    asked = {"tasks": [{}, {}], "forms": [{}], "problems": 500, "chunk": 128, "samples": 2, "max_tokens": 30}
    (evaluated,) = Workload.of(receipt("evaluate", asked, 2 * 4 * 256 * 20, sampling=1e9), SMALL, steps=0).phases
    assert (evaluated.steps, evaluated.responses, evaluated.response, evaluated.longest) == (8, 256, 20, 30)
    assert Workload.of(receipt("convert", {}, 0), SMALL, steps=0).phases == ()
