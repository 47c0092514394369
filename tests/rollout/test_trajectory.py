"""Trajectories packed into training rows, and what sampling them cost."""

import pytest
import torch

from slingshot.cost.flops import generation_flops
from slingshot.rollout.trajectory import Sampled, Trajectory, pack, row_shape, sampling_cost
from slingshot.tasks.loader import load_task
from slingshot.tasks.mixture import Item
from slingshot.tasks.task import Problem
from slingshot.training.parallel import Parallel

ITEM = Item(load_task("arithmetic"), Problem("p", "k"), "k")


@pytest.fixture
def trajectory(tokenizer):
    def make(*turns, advantage=0.0):
        """Prompt 7, 8; then turns of a model, between which the environment says 9."""
        made = Trajectory(ITEM, [7, 8], [])
        for index, ids in enumerate(turns):
            if index:
                made.read([9], [])
            made.respond(Sampled(ids, [-float(place + 1) for place in range(len(ids))], "stop"), tokenizer)
        made.advantage = advantage
        return made

    return make


def test_rows_hold_advantage_and_logprob_in_the_place_of_each_sampled_token(trajectory):
    batch = pack([trajectory([11, 12, 13], advantage=2.0), trajectory([21], [22, 23], advantage=-1.0)], 11)
    assert batch.tokens_BT.tolist() == [[7, 8, 11, 12, 13, 7, 8, 21, 9, 22, 23]]
    assert batch.segments_BT.tolist() == [[1] * 5 + [2] * 6]
    assert batch.mask_BT.tolist() == [[0, 0, 1, 1, 1, 0, 0, 1, 0, 1, 1]]
    assert batch.advantages_BT.tolist() == [[0, 0, 2, 2, 2, 0, 0, -1, 0, -1, -1]]
    assert batch.sampler_BT.tolist() == [[0, 0, -1, -2, -3, 0, 0, -1, 0, -1, -2]]
    assert torch.equal(batch.shares_BT, batch.mask_BT) and torch.equal(batch.weights_BT, batch.mask_BT)
    assert pack([trajectory([11, 12, 13])], 3).tokens_BT.shape == (1, 5), "rows grow for what is longer"
    assert pack([], 9).tokens_BT.shape == (0, 9)


def test_an_end_token_is_trained_on_and_padding_of_the_same_id_is_not(trajectory):
    """Id 0 ends the response and fills the row: who wrote a token is known by its place, not by its id."""
    batch = pack([trajectory([11, 0], advantage=1.0)], 8)
    assert batch.tokens_BT.tolist() == [[7, 8, 11, 0, 0, 0, 0, 0]]
    assert batch.mask_BT.tolist() == [[0, 0, 1, 1, 0, 0, 0, 0]] == batch.advantages_BT.tolist()


def test_rows_hold_the_samplers_experts_where_they_were_told(trajectory):
    """Two layers, one expert each; numbered from 1, nothing for the last token and for what was not told."""
    told, silent = trajectory([11, 12]), trajectory([21])
    assert pack([told, silent], 7).replayed_BTLk is None
    told.routed_experts = torch.tensor([[[0], [3]], [[1], [4]], [[2], [5]]])
    rows = pack([told, silent], 8).replayed_BTLk
    assert rows[0, :, 0, 0].tolist() == [1, 2, 3, 0, 0, 0, 0, 0] and rows[0, :, 1, 0].tolist()[:4] == [4, 5, 6, 0]
    assert torch.equal(pack([silent, told], 8, own=1).replayed_BTLk[0, :, 0, 0], torch.tensor([1, 0, 0, 2, 3, 0, 0, 0]))


def test_a_prompt_that_responses_share_stands_once_but_its_last_token(trajectory):
    """And its last two with MTP, whose loss of the first sampled token is of the place two before it."""
    responses = [trajectory([11, 12, 13], advantage=2.0), trajectory([21], [22, 23], advantage=-1.0)]
    for each in responses:
        each.ids[:0], each.mask[:0], each.logprobs[:0] = [5, 6], [0, 0], [0.0, 0.0]
    batch = pack(responses, 13, own=1)
    assert batch.tokens_BT.tolist() == [[5, 6, 7, 8, 11, 12, 13, 8, 21, 9, 22, 23, 0]]
    assert batch.segments_BT.tolist() == [[1] * 3 + [2] * 4 + [3] * 5 + [0]]
    assert batch.prefixes_BT.tolist() == [[0] * 3 + [1] * 9 + [0]]
    assert batch.mask_BT.tolist() == [[0, 0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0]]
    assert batch.advantages_BT.tolist() == [[0, 0, 0, 0, 2, 2, 2, 0, -1, 0, -1, -1, 0]]
    assert batch.sampler_BT.tolist() == [[0, 0, 0, 0, -1, -2, -3, 0, -1, 0, -1, -2, 0]]
    assert batch.sizes() == ([7, 5], [0, 3])
    assert pack(responses, 14, own=2).tokens_BT.tolist() == [[5, 6, 7, 8, 11, 12, 13, 7, 8, 21, 9, 22, 23, 0]]
    apart = pack(responses, 11, own=1)  # no room for both: each is whole
    assert apart.prefixes_BT is None and apart.sizes() == ([7, 8], [0, 0])


def test_rows_are_as_long_as_a_group_where_a_micro_batch_stays_as_large(trajectory):
    responses = [trajectory([11] * 20) for _ in range(8)]  # 21 each behind one token: 169
    alone = Parallel()
    assert row_shape(responses, 30, 8, alone, 1) == (169, 1)
    assert row_shape(responses, 30, 3, alone, 1) == (90, 1)
    assert row_shape(responses, 30, 20, alone, 1, minibatches=2) == (84, 7)
    assert row_shape(responses, 300, 8, alone, 1) == (300, 8) and row_shape([], 30, 8, alone, 1) == (30, 8)


def test_a_groups_first_turns_share_a_prefill(trajectory, dense):
    group = [trajectory([11, 12, 13]), trajectory([21], [22, 23])]
    expected = generation_flops(dense(), 2, [3, 1]) + generation_flops(dense(), 4, [2])
    assert sampling_cost(dense(), [group, group]) == (12, 2 * expected)
