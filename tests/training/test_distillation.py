"""Divergences of student and teacher: values by hand, gradients, and blocks."""

import math
from functools import partial

import pytest
import torch

from slingshot.model.linear import Embedding, Linear
from slingshot.training.distillation import BLOCK, Divergence, distillation_loss, divergences

EVERY: list[Divergence] = ["reverse", "forward", "jsd"]


def test_values_by_hand() -> None:
    student = torch.tensor([[0.75, 0.25]]).log()
    teacher = torch.tensor([[0.5, 0.5]]).log()
    reverse = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    forward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(2)
    mixture = 0.2 * 0.5 + 0.8 * 0.75, 0.2 * 0.5 + 0.8 * 0.25
    jsd = 0.2 * sum(0.5 * math.log(0.5 / m) for m in mixture)
    jsd += 0.8 * sum(p * math.log(p / m) for p, m in zip((0.75, 0.25), mixture, strict=True))
    assert float(divergences(student, teacher, "reverse")) == pytest.approx(reverse, rel=1e-5)
    assert float(divergences(student, teacher, "forward")) == pytest.approx(forward, rel=1e-5)
    assert float(divergences(student, teacher, "jsd", beta=0.2)) == pytest.approx(jsd, rel=1e-5)


@pytest.mark.parametrize(("divergence", "kept"), [("reverse", "student"), ("forward", "teacher"), ("jsd", "teacher")])
def test_top_k_keeps_what_the_expectation_is_over(divergence: Divergence, kept: str) -> None:
    student, teacher = torch.randn(5, 11), torch.randn(5, 11)
    places = (student if kept == "student" else teacher).topk(3).indices
    alone = divergences(student.gather(1, places), teacher.gather(1, places), divergence)
    torch.testing.assert_close(divergences(student, teacher, divergence, top_k=3), alone)
    whole = divergences(student, teacher, divergence)
    torch.testing.assert_close(divergences(student, teacher, divergence, top_k=11), whole)


def test_the_reverse_gradient_is_the_closed_form() -> None:
    """d KL / d logit = p (log p - log q - KL)."""
    student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    divergences(student, teacher).sum().backward()
    gap = student.detach().log_softmax(-1) - teacher.log_softmax(-1)
    p = student.detach().softmax(-1)
    torch.testing.assert_close(student.grad, p * (gap - (p * gap).sum(-1, keepdim=True)))


@pytest.mark.parametrize("divergence", EVERY)
def test_nothing_is_learned_from_a_teacher_who_says_the_same(divergence: Divergence) -> None:
    student = torch.randn(4, 9, requires_grad=True)
    loss = divergences(student, student.detach() + 3.0, divergence).sum()
    loss.backward()
    assert student.grad is not None
    assert abs(float(loss.detach())) < 1e-5
    assert float(student.grad.abs().max()) < 1e-6


@pytest.mark.parametrize("divergence", EVERY)
def test_blocks_change_neither_loss_nor_gradients(divergence: Divergence) -> None:
    """Of a head that is the embedding, and of one that is its own."""
    torch.manual_seed(0)
    student, teacher = Embedding(17, 6), Linear(8, 17)
    for head in (student, teacher):
        torch.nn.init.normal_(head.weight)
    hidden, others = torch.randn(BLOCK + 3, 6, requires_grad=True), torch.randn(BLOCK + 3, 8)
    inputs = [hidden, *student.parameters()]
    loss = distillation_loss(hidden, student, others, teacher, partial(divergences, divergence=divergence))
    whole = divergences(student.product(hidden), teacher.product(others), divergence).sum()
    torch.testing.assert_close(loss, whole)
    found, expected = torch.autograd.grad(loss, inputs), torch.autograd.grad(whole, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert all(parameter.grad is None for parameter in teacher.parameters())
