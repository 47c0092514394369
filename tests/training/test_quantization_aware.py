"""Scales in distillation: no step hopes for more than its share of KL, and what only makes it worse is not taken."""

import copy

import pytest
import torch

from slingshot.model.config import ModelConfig
from slingshot.quantization.formats import Scheme
from slingshot.training.calibration import stream
from slingshot.training.optimizer import Optimizer, OptimizerConfig
from slingshot.training.quantization_aware import SHARE, HeldOut, capped_step, hold_rescaled, matching_step, trained


@pytest.fixture
def full(make_model):
    return make_model(
        ModelConfig(
            family="dense", vocab_size=264, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        )
    )  # fmt: skip


@pytest.fixture
def student(full):
    made = copy.deepcopy(full)
    hold_rescaled(made, full, {}, Scheme("int4", 32), seed=0)
    return made


@pytest.fixture
def batches():
    return stream(torch.randint(5, 250, (8, 40), generator=torch.Generator().manual_seed(0)).tolist(), 48, 4)


def test_a_step_hopes_for_no_more_than_its_share_of_kl(full, student, batches):
    """Whatever the learning rate: so one that suits a small model does not tear a large one apart."""
    optimizer = Optimizer(student, OptimizerConfig(name="adamw", lr=1.0, weight_decay=0.0))
    kl = matching_step(student, full, batches)
    was = {name: tensor.clone() for name, tensor in trained(student).items()}
    gradients = {name: parameter.grad.clone() for name, parameter in student.named_parameters() if name in was}
    capped_step(optimizer, 1.0, kl)
    hoped = sum((gradients[name] * (was[name] - moved)).sum().item() for name, moved in trained(student).items())
    assert hoped == pytest.approx(SHARE * kl, rel=1e-3) and matching_step(student, full, batches) < kl


def test_a_step_that_hopes_for_less_is_the_optimizers(full, student, batches):
    other = copy.deepcopy(student)
    for model, step in ((student, capped_step), (other, lambda optimizer, fraction, kl: optimizer.step(fraction))):
        optimizer = Optimizer(model, OptimizerConfig(name="adamw", lr=1e-6, weight_decay=0.0))
        step(optimizer, 1.0, matching_step(model, full, batches))
    assert all(torch.equal(tensor, trained(other)[name]) for name, tensor in trained(student).items())


def test_what_only_makes_it_worse_is_not_taken(full, student, batches):
    held_out, was = HeldOut(full, student, batches), {name: each.clone() for name, each in trained(student).items()}
    for tensor in trained(student).values():
        tensor.mul_(1.5)
    assert held_out.measure(student, 1) > held_out.kl == held_out.best and held_out.step == 0
    assert held_out.state.keys() == was.keys() and all(torch.equal(held_out.state[name], was[name]) for name in was)
