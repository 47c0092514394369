"""cost/serving.py: rooflines by hand, DeepSeek's published speed limit, batches within room and latency, and rounds of rollouts."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.cost.devices import device
from slingshot.cost.flops import decode_parts, parameters
from slingshot.model.config import ModelConfig
from slingshot.planning.memory import PRECISIONS
from slingshot.planning.throughput import Fleet, Lengths, Times, experts_touched, round_seconds

V3 = ModelConfig.preset("deepseek-v3")
SMALL = ModelConfig.preset("llama-3.1-8b")
H800 = device("h800")
ROOM = 72 * 2.0**30


def fleet(
    config: ModelConfig = SMALL, devices: int = 1, dtype: str = "bfloat16", on: str = "h800", efficiency: float = 1.0
) -> Fleet:
    return Fleet(config, device(on), PRECISIONS[dtype], devices, efficiency=efficiency)


def test_experts_touched_is_the_expected_union() -> None:
    """Against a simulation of tokens that choose 8 of 256 experts evenly."""
    generator = random.Random(0)
    for tokens in (1, 10, 60):
        draws = [len({expert for _ in range(tokens) for expert in generator.sample(range(256), 8)}) for _ in range(300)]
        assert experts_touched(V3, tokens) == pytest.approx(sum(draws) / 300, rel=0.02)
    assert experts_touched(V3, 1) == pytest.approx(8) and experts_touched(V3, 0) == 0 and experts_touched(SMALL, 5) == 0
    every = V3.model_copy(update={"num_experts_per_tok": 256, "n_group": 1, "topk_group": 1})
    assert experts_touched(every, 0) == 0 and experts_touched(every, 1) == 256


def test_dense_decoding_reads_its_weights_and_the_cache() -> None:
    """All of the model but the embedding, of which a token needs one row; the cache 2 x 8 heads x 128 x 32 layers of 2 bytes a token."""
    counts = parameters(SMALL)
    weights = (counts.total - counts.embedding) * 2
    assert fleet().bytes_read(4, 1000) == weights + 4 * 1000 * 2 * 8 * 128 * 32 * 2
    times = fleet().decode_step(4, 1000)
    assert times.memory == pytest.approx(fleet().bytes_read(4, 1000) / 3.35e12)
    assert times.compute == pytest.approx(sum(decode_parts(SMALL, 1000, 4).values()) / 989.4e12)
    assert times.network == 0 and times.ranked[0][0] == "memory traffic"
    # A tied head is read whole.
    tied = SMALL.model_copy(update={"tie_word_embeddings": True})
    assert fleet(tied).bytes_read(1, 0) == (counts.total - counts.head) * 2


def test_tensor_parallel_decoding_shares_weights_and_exchanges_activations() -> None:
    """Two all-reduces a block of each token's 4096 numbers in 2 bytes: 2 x 3/4 of them sent, for the tokens of all four."""
    four = fleet(devices=4)
    assert four.bytes_read(4, 0) == pytest.approx(fleet().bytes_read(4, 0) / 4)
    assert four.bytes_sent(3) == 3 * 4 * 32 * 2 * 2 * 3 / 4 * 4096 * 2


def test_more_devices_than_key_value_heads_hold_each_head_of_the_cache_more_than_once() -> None:
    """8 heads of 2 x 128 numbers in 32 layers, 131,072 bytes a token: a sequence a device is 16 of them on sixteen, where a device has one head."""
    eight, sixteen = fleet(devices=8), fleet(devices=16)
    assert eight.memory(3, 1000).cache == 3 * 1000 * 131_072
    assert sixteen.memory(3, 1000).cache == 16 * 3 * 1000 * 131_072 / 8
    assert sixteen.bytes_read(3, 1000) - sixteen.bytes_read(3, 0) == sixteen.memory(3, 1000).cache
    left = ROOM - sixteen.memory(0, 0).total
    assert sixteen.largest_batch(1000, ROOM) == pytest.approx(left / (2 * 1000 * 131_072))
    # MLA's latent is one head, which experts' devices have for their own sequences only.
    latent = V3.model_copy(update={"first_k_dense_replace": 61, "num_nextn_predict_layers": 0})
    assert fleet(latent, 4).memory(1, 1000).cache == 4 * fleet(V3, 4).memory(1, 1000).cache == 4 * 1000 * 70_272


def test_an_all_reduce_over_nodes_takes_the_network_links_of_all_its_members() -> None:
    """16 H100 on two nodes: 8 links of 50 GB/s rather than one; H800's own links of 200 GB/s are slower than that. 12 devices are 6 a node."""
    for devices, on, rate in (
        (8, "h100", 450e9),
        (16, "h100", 400e9),
        (12, "h100", 300e9),
        (16, "h800", 200e9),
        (2, "m4-max", 10e9),
    ):
        it = fleet(devices=devices, on=on)
        assert it.decode_step(10, 0).network == pytest.approx(it.bytes_sent(10) / (0.8 * rate))


def test_expert_parallel_decoding_sends_tokens_to_their_experts_elsewhere() -> None:
    """58 layers, 8 experts of which three in four are on other devices, 7,168 numbers in 1 byte there and in 2 back; nothing on one device."""
    assert fleet(V3, 4, "fp8").bytes_sent(10) == 10 * 58 * 8 * 3 / 4 * 7168 * (1 + 2)
    assert fleet(V3, 1, "fp8").bytes_sent(10) == 0
    # Eight devices have the node's own link, sixteen the network's.
    node, network = (fleet(V3, devices, "fp8").decode_step(10, 0).network for devices in (8, 16))
    assert network / node == pytest.approx((15 / 16) / (7 / 8) * 200 / 50)


def test_deepseek_s_published_speed_limit() -> None:
    """arXiv 2505.09343, 2.3.2: 32 tokens a device, 9 copies of 7K in 1 byte and back in 2 at 50 GB/s take 120.96 us a layer and micro-batch.

    They count the shared expert as sent, all 61 layers as MoE, a width of 7,000 and two micro-batches a step. The same formula here sends to the
    8 routed experts and counts 58 layers of 7,168; corrected for that it is theirs: 14.76 ms, 67 tokens a second.
    """
    theirs = 61 * 2 * (1 + 2) * 32 * 9 * 7000 / 50e9
    assert theirs == pytest.approx(14.76e-3, rel=0.001) and 1 / theirs == pytest.approx(67, rel=0.02)
    many = 2**20  # so many devices that no expert is at home
    ours = 2 * fleet(V3, many, "fp8").bytes_sent(32) / 50e9
    assert ours * (61 / 58) * (9 / 8) * (7000 / 7168) == pytest.approx(theirs, rel=1e-5)


def test_mixture_of_experts_reads_the_experts_its_tokens_chose() -> None:
    """On one device a single token reads 8 of 256 experts in 58 layers; with many tokens all of them."""
    one = fleet(V3, 1, "fp8")
    expert = 3 * 7168 * 2048 * PRECISIONS["fp8"].weight
    assert one.bytes_read(1000, 0) - one.bytes_read(1, 0) == pytest.approx(58 * (256 - 8) * expert, rel=1e-6)
    # On 64 devices 64 tokens of one each touch nearly all experts, of which a device holds a 64th.
    spread = fleet(V3, 64, "fp8")
    touched = experts_touched(V3, 64)
    assert one.bytes_read(1, 0) - spread.bytes_read(1, 0) == pytest.approx(58 * expert * (8 - touched / 64))


def test_memory_of_deepseek_s_decoding_unit() -> None:
    """144 devices, 88 sequences of 4,989 tokens of 70,272 bytes beside the weights, within 80 GB."""
    memory = fleet(V3, 144, "fp8").memory(88, 4989)
    assert memory.cache == 88 * 4989 * 70_272
    assert memory.total == memory.weights + memory.cache < ROOM and 20e9 < memory.weights < 30e9


def test_the_best_batch_has_room_and_is_in_time_and_the_next_is_not() -> None:
    it = fleet(efficiency=0.5)
    by_room = it.best_batch(4000, ROOM)
    assert it.memory(by_room, 4000).total <= ROOM < it.memory(by_room + 1, 4000).total
    latency = it.step_seconds(20, 4000) * 1.001
    assert it.best_batch(4000, ROOM, latency) == 20
    assert it.best_batch(4000, ROOM, 1e-6) == 0
    assert fleet(V3, 1).best_batch(4000, ROOM) == 0


def test_prompts_are_read_at_the_share_of_the_peak_and_cached_tokens_are_not() -> None:
    it = fleet()
    whole = it.prefill_seconds(4000, 0.0, 0.4)
    assert whole == pytest.approx(
        4000 * 2 * (parameters(SMALL).total - parameters(SMALL).embedding) / 989.4e12 / 0.4, rel=0.1
    )
    assert (
        it.prefill_seconds(4000, 0.5, 0.4) == pytest.approx(whole / 2, rel=0.05)
        and 0 < it.prefill_seconds(4000, 1.0, 0.4) < whole / 1000
    )


@given(st.floats(1, 1e5), st.floats(1.01, 1000))
@settings(derandomize=True, deadline=None)
def test_lengths_have_the_mean_they_were_asked_for(mean: float, factor: float) -> None:
    lengths = Lengths(mean, mean * factor)
    points = 20_000
    width = lengths.longest / points
    by_integral = sum(lengths.share_longer((point + 0.5) * width) for point in range(points)) * width
    assert by_integral == pytest.approx(mean, rel=0.02)
    assert lengths.share_longer(0) == 1 and lengths.share_longer(lengths.longest) == 0


@given(st.floats(1, 1e5), st.floats(1.0, 1000))
@settings(derandomize=True, deadline=None)
def test_the_mean_square_of_lengths_is_its_integral(mean: float, factor: float) -> None:
    lengths, points = Lengths(mean, mean * factor), 20_000
    width = lengths.longest / points
    middles = ((point + 0.5) * width for point in range(points))
    assert lengths.square == pytest.approx(
        sum(2 * middle * lengths.share_longer(middle) for middle in middles) * width, rel=0.02
    )


def test_the_mean_square_of_lengths_without_a_cap_and_all_at_the_cap() -> None:
    assert Lengths(300, 1e9).square == pytest.approx(2 * 300**2)
    assert Lengths(300, 300).square == pytest.approx(300**2) and Lengths(300, 300.01).square == pytest.approx(
        300**2, rel=1e-3
    )


def simulated(it: Fleet, responses: int, copies: int, lengths: Lengths, seed: int, stride: int = 10) -> float:
    """A round: every response drawn and dealt to a copy, each copy's batch counted at every tenth position; it ends with the last copy."""
    generator = random.Random(seed)
    times = []
    for copy in range(copies):
        drawn = sorted(
            min(lengths.longest, generator.expovariate(lengths.rate)) for _ in range(copy, responses, copies)
        )
        total, ended = 0.0, 0
        for position in range(0, math.ceil(drawn[-1]), stride):
            while drawn[ended] <= position:
                ended += 1
            total += stride * it.step_seconds((len(drawn) - ended) / it.devices, 100 + position)
        times.append(total)
    return max(times)


@pytest.mark.parametrize(
    ("it", "responses", "copies"),
    [
        (fleet(efficiency=0.46), 64, 2),
        (fleet(devices=4), 64, 2),
        (fleet(), 8, 8),
        (fleet(V3, 16, "fp8"), 8, 8),
        (fleet(V3, 16, "fp8"), 256, 8),
    ],
)
def test_a_round_of_rollouts_takes_what_a_simulation_takes(it: Fleet, responses: int, copies: int) -> None:
    lengths = Lengths(300, 2000)
    expected = sum(simulated(it, responses, copies, lengths, seed) for seed in range(150)) / 150
    assert round_seconds(it, responses, copies, 100, lengths, ROOM) == pytest.approx(expected, rel=0.05)


def test_copies_that_have_ended_do_not_help_those_that_have_not() -> None:
    """One response takes as long with seven idle copies beside its own as with none; eight on eight copies take their longest one's time alone."""
    it, lengths = fleet(V3, 16, "fp8"), Lengths(300, 2000)
    assert round_seconds(it, 1, 8, 100, lengths, ROOM) == pytest.approx(round_seconds(it, 1, 1, 100, lengths, ROOM))
    alike = Lengths(300, 300.001)
    assert round_seconds(it, 8, 8, 100, alike, ROOM) == pytest.approx(300 * it.step_seconds(1 / 16, 250), rel=1e-3)


@pytest.mark.parametrize("longest", [32_768, 1e6, 1e9, 1e15])
def test_a_cap_that_no_response_reaches_changes_nothing(longest: float) -> None:
    it = fleet()
    assert round_seconds(it, 512, 8, 200, Lengths(50, longest), ROOM) == pytest.approx(
        round_seconds(it, 512, 8, 200, Lengths(50, 8192), ROOM), rel=1e-4
    )
    # One response alone: its steps, counted at every position it may reach.
    rate = Lengths(50, longest).rate
    by_steps = sum(
        math.exp(-rate * (position + 0.5)) * it.step_seconds(1, 200.5 + position) for position in range(3000)
    )
    assert round_seconds(it, 1, 1, 200, Lengths(50, longest), ROOM) == pytest.approx(by_steps, rel=1e-3)


def test_a_round_ends_with_its_longest_response() -> None:
    """1,000 times as many responses keep the devices no less busy, and far fewer than 1,000 times as long while there is room."""
    it, lengths = fleet(devices=1), Lengths(300, 4000)
    one, many = (round_seconds(it, responses, 1, 100, lengths, ROOM) for responses in (1, 200))
    assert one == pytest.approx(300 * it.step_seconds(1, 100 + 300), rel=0.05)
    assert 3 < many / one < 100


def test_what_has_no_room_comes_in_waves_or_never() -> None:
    it = fleet()
    lengths = Lengths(300, 400)
    room = it.memory(10.5, 400).total
    ten, twenty = (round_seconds(it, responses, 1, 100, lengths, room) for responses in (10, 20))
    assert twenty == pytest.approx(2 * ten, rel=0.01)
    assert round_seconds(fleet(V3), 1, 1, 100, lengths, ROOM) == math.inf


@given(
    st.integers(1, 400),
    st.floats(1, 20_000),
    st.sampled_from([1, 8, 64]),
    st.sampled_from(["h800", "mi300x", "rtx4090"]),
)
@settings(derandomize=True, deadline=None)
def test_no_step_is_faster_than_its_bound_and_batches_only_help_throughput(
    batch: int, context: float, devices: int, on: str
) -> None:
    it = fleet(V3, devices, "fp8", on, efficiency=0.46)
    times, step = it.decode_step(batch, context), it.step_seconds(batch, context)
    assert step == pytest.approx(times.bound / 0.46) and times.bound >= max(times.compute, times.memory, times.network)
    assert (batch + 1) / it.step_seconds(batch + 1, context) >= batch / step * (1 - 1e-9)
    assert it.step_seconds(batch, context + 1) >= step


def test_ranked_times() -> None:
    assert Times(1.0, 3.0, 2.0).ranked == [("memory traffic", 3.0), ("network", 2.0), ("compute", 1.0)]
