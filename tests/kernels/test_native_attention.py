"""Native attention over pages, and rotation on the way there, are torch's at every level this processor has."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slingshot.engine.kv_cache import CacheForm, KVCache
from slingshot.kernels.native import NativeKernels, pointer
from slingshot.kernels.norm import rms_norm
from slingshot.model.config import ModelConfig
from slingshot.model.rope import rotate

PAGE = 16
FORMS: tuple[CacheForm, ...] = ("auto", "int8", "fp8")  # native/attention.h's CacheForm


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cache_of(rounded: int, rest: int, dtype: torch.dtype, form: CacheForm) -> KVCache:
    """Of which an entry has so many numbers that are rounded, and MLA's rope part besides."""
    family = "deepseek_v3" if rest else "dense"
    config = ModelConfig(
        family=family, vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        first_k_dense_replace=1, head_dim=rounded, kv_lora_rank=rounded, qk_rope_head_dim=rest or 2,
        qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    return KVCache(config, 1, dtype, form=form)


@dataclass
class Step:
    """Some tokens of some sequences over a cache; values None: they are the first numbers of the keys.

    form        what the cache holds; of 8 bits keys and values are bytes
    """

    new: list[int]
    lengths: list[int]
    tables: Tensor
    q_NHW: Tensor
    keys: Tensor
    values: Tensor | None
    value_width: int
    scale: float
    form: CacheForm = "auto"

    @classmethod
    def random(
        cls, sequences: list[tuple[int, int]], heads: int, groups: int, width: int, value_width: int, dtype: torch.dtype
    ) -> Step:
        """Sequences of (new, earlier) tokens. Pages lie anywhere; what belongs to no token is no number."""
        generator = torch.Generator().manual_seed(0)
        new, lengths = [n for n, _ in sequences], [n + earlier for n, earlier in sequences]
        needed = [(length + PAGE - 1) // PAGE for length in lengths]
        order = torch.randperm(sum(needed), generator=generator).int().split(needed)
        tables = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True)
        wide = [width] if groups == 0 else [width, value_width]
        pages = [torch.full((sum(needed), PAGE, max(groups, 1), w), torch.nan) for w in wide]
        for table, length in zip(order, lengths, strict=True):
            for page in pages:
                tokens = torch.randn(length, *page.shape[2:], generator=generator)
                for i, chunk in zip(table.tolist(), tokens.split(PAGE), strict=True):
                    page[i, : len(chunk)] = chunk
        q = torch.randn(sum(new), heads, width, generator=generator)
        keys, *values = (page.to(dtype) for page in pages)
        return cls(new, lengths, tables, q.to(dtype), keys, values[0] if values else None, value_width, width**-0.5)

    def of_eight_bits(self, form: CacheForm) -> tuple[Step, Step]:
        """The same over rounded entries, as bytes and as the numbers that they stand for.

        Heads and tokens differ by far, so that no scale can stand for another.
        """
        rest = self.keys.shape[-1] - self.value_width if self.values is None else 0
        parts: list[tuple[Tensor, Tensor]] = []
        for entries in (self.keys, self.values):
            if entries is not None:
                cache = cache_of(entries.shape[-1] - rest, rest, entries.dtype, form)
                sizes = torch.logspace(-0.3, 0.3, entries[..., 0].numel()).view_as(entries[..., :1])
                held = cache.kept(entries * sizes.roll(7))
                parts.append((held, cache.computed(held, entries.dtype)))
        held, numbers = zip(*parts, strict=True)
        return (
            replace(self, keys=held[0], values=held[1] if held[1:] else None, form=form),
            replace(self, keys=numbers[0], values=numbers[1] if held[1:] else None),
        )

    def native(self, kernels: NativeKernels, threads: int) -> Tensor:
        (tokens, heads, width), groups = self.q_NHW.shape, self.keys.shape[2]
        y = torch.full((tokens, heads, self.value_width), torch.nan, dtype=self.q_NHW.dtype)
        starts = torch.tensor([0, *accumulate(self.new)], dtype=torch.int32)
        lengths, tables = torch.tensor(self.lengths, dtype=torch.int32), self.tables.contiguous()
        kernels.door("attend")(
            int(y.dtype == torch.bfloat16), FORMS.index(self.form), heads, groups, width, self.value_width,
            ctypes.c_float(self.scale), pointer(starts), pointer(lengths), pointer(tables), *tables.shape,
            pointer(self.q_NHW), pointer(self.keys), pointer(self.values), pointer(y), threads,
        )  # fmt: skip
        return y

    def definition(self) -> tuple[Tensor, Tensor]:
        """What it is in float64, and the same with every value's absolute value: what errors are measured by."""
        parts: list[tuple[Tensor, Tensor]] = []
        for (first, last), length, table in zip(
            pairwise([0, *accumulate(self.new)]), self.lengths, self.tables, strict=True
        ):
            values = self.keys[..., : self.value_width] if self.values is None else self.values
            k_SGW, v_SGV = (t[table].flatten(0, 1)[:length].double() for t in (self.keys, values))
            shared = self.q_NHW.shape[1] // k_SGW.shape[1]
            k_SHW, v_SHV = (t.repeat_interleave(shared, dim=1) for t in (k_SGW, v_SGV))
            scores_HTS = torch.einsum("thw,shw->hts", self.q_NHW[first:last].double(), k_SHW) * self.scale
            future_TS = torch.arange(length) > torch.arange(length - last + first, length)[:, None]
            weights_HTS = scores_HTS.masked_fill(future_TS, -torch.inf).softmax(-1)
            one, other = (torch.einsum("hts,shv->thv", weights_HTS, v) for v in (v_SHV, v_SHV.abs()))
            parts.append((one, other))
        return torch.cat([y for y, _ in parts]), torch.cat([size for _, size in parts])


# In bf16 weights and then results are rounded, each by at most 2^-8 of itself.
PRECISION = {torch.float32: 1e-5, torch.bfloat16: 2**-7 + 1e-4}


def check(step: Step, kernels: NativeKernels, threads: int) -> None:
    expected, size = step.definition()
    assert ((step.native(kernels, threads) - expected).abs() <= size * PRECISION[step.q_NHW.dtype]).all()


@given(data=st.data())
def test_attention_over_pages_is_softmax_attention(
    kernels: NativeKernels, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Decoding rows and chunks of prompts, grouped queries (groups > 0) and one entry for all heads (0)."""
    sequence = st.tuples(st.one_of(st.just(1), st.integers(1, 40)), st.integers(0, 150))
    sequences = data.draw(st.lists(sequence, min_size=1, max_size=4))
    groups, share = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 6))
    width = 8 * data.draw(st.integers(1, 17))
    value_width = 8 * data.draw(st.integers(1, width // 8)) if groups == 0 else 8 * data.draw(st.integers(1, 17))
    step = Step.random(sequences, max(groups, 1) * share, groups, width, value_width, dtype)
    check(step, kernels, data.draw(st.integers(1, 3)))


@pytest.mark.parametrize("shape", [(9, 3, 64, 64), (8, 2, 128, 128), (4, 0, 40, 32), (12, 0, 576, 512)], ids=str)
def test_long_contexts_in_pieces_and_long_prompts_are_the_same(
    kernels: NativeKernels, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """A few tokens at the end of more than one piece's; a chunk of a prompt longer than a unit's rows."""
    check(Step.random([(1, 700), (3, 255), (70, 200), (1, 0)], *shape, dtype), kernels, 2)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("shape", [(9, 3, 64, 64), (4, 2, 40, 40), (4, 0, 40, 32), (12, 0, 576, 512)], ids=str)
def test_entries_of_8_bits_attend_as_the_numbers_they_stand_for(
    kernels: NativeKernels, shape: tuple[int, int, int, int], dtype: torch.dtype, form: CacheForm
) -> None:
    """To the bit."""
    step = Step.random([(1, 700), (3, 255), (70, 200), (1, 0), (2, 14)], *shape, dtype)
    held, numbers = step.of_eight_bits(form)
    assert torch.equal(held.native(kernels, 2), numbers.native(kernels, 1))


def test_neither_threads_nor_neighbours_change_a_bit(kernels: NativeKernels, dtype: torch.dtype) -> None:
    step = Step.random([(1, 300), (30, 20), (2, 7)], 6, 2, 64, 64, dtype)
    together = step.native(kernels, 1)
    assert torch.equal(step.native(kernels, 3), together)
    for i, part in enumerate(together.split(step.new)):
        q_NHW, one = step.q_NHW.split(step.new)[i].contiguous(), slice(i, i + 1)
        alone = Step(step.new[one], step.lengths[one], step.tables[one], q_NHW, step.keys, step.values, 64, step.scale)
        assert torch.equal(alone.native(kernels, 2), part)


@settings(max_examples=10)
@given(data=st.data())
def test_long_prompts_attend_with_keys_and_values_of_every_head(
    kernels: NativeKernels, dtype: torch.dtype, data: st.DataObject
) -> None:
    """MLA's expanded form, of sequences with enough new tokens: 40 x 48 / (80 - 48) = 60 here."""
    heads, latent, rope, nope, value = data.draw(st.integers(1, 5)), 40, 8, 24, 24
    sequences = data.draw(st.permutations([(61, 0), (1, 20), (100, 170), (60, 30)]))
    step = Step.random(sequences, heads, 0, latent + rope, latent, dtype)
    kv_b = (normal(heads * (nope + value), latent, dtype=torch.float32, seed=5) / latent**0.5).to(dtype)
    q_nope = normal(sum(step.new), heads, 32, dtype=dtype, seed=6)
    starts = torch.tensor([0, *accumulate(step.new)], dtype=torch.int32)
    lengths, tables = torch.tensor(step.lengths, dtype=torch.int32), step.tables.contiguous()

    def attended(over: Step) -> Tensor:
        y = torch.full((sum(step.new), heads, value), 7.0, dtype=dtype)
        count = kernels.door("attend_expanded", ctypes.c_int)(
            int(dtype == torch.bfloat16), FORMS.index(over.form), heads, latent, rope, nope, value,
            ctypes.c_float(step.scale), pointer(starts), pointer(lengths), pointer(tables), *tables.shape,
            pointer(kv_b), pointer(q_nope), 32, pointer(step.q_NHW), pointer(over.keys), pointer(y),
            data.draw(st.integers(1, 3)),
        )  # fmt: skip
        assert count == 161
        return y

    y = attended(step)
    for form in FORMS[1:]:
        held, numbers = step.of_eight_bits(form)
        assert torch.equal(attended(held), attended(numbers))
    # The definition: keys and values of every head, in whole pages, rounded as the model's dtype rounds.
    entries = step.keys[:, :, 0].double()
    k_PSHN, v_PSHV = (
        torch.einsum("psk,hnk->pshn", entries[..., :latent], part)
        for part in kv_b.view(heads, -1, latent).double().split([nope, value], dim=1)
    )
    rope_PSHR = entries[..., None, latent:].expand(-1, -1, heads, -1)
    q_NHW = torch.cat((q_nope[..., :nope], step.q_NHW[..., latent:]), -1)
    keys = torch.cat((k_PSHN, rope_PSHR), -1).to(dtype)
    same = Step(step.new, step.lengths, step.tables, q_NHW, keys, v_PSHV.to(dtype), value, step.scale)
    expected, size = same.definition()
    expanded_N = torch.tensor([n > 60 for n in step.new]).repeat_interleave(torch.tensor(step.new))
    # keys that another order of summation rounds to their neighbours move scores, and those the weights
    assert ((y - expected).abs()[expanded_N] <= size[expanded_N] * 8 * PRECISION[dtype]).all()
    assert (y[~expanded_N] == 7).all()


@dataclass
class Rotation:
    """Tokens at drawn positions and places of a cache of 40."""

    cos_PR: Tensor
    sin_PR: Tensor
    positions_N: Tensor
    slots_N: Tensor

    @classmethod
    def random(cls, tokens: int, half: int) -> Rotation:
        generator = torch.Generator().manual_seed(1)
        angles = 6 * torch.rand(64, half, generator=generator)
        positions = torch.randint(64, (tokens,), generator=generator)
        return cls(angles.cos(), angles.sin(), positions, torch.randperm(40, generator=generator)[:tokens])

    def arguments(self) -> list[int | ctypes.c_void_p]:
        tensors = (self.cos_PR, self.sin_PR, self.positions_N, self.slots_N)
        return [len(self.positions_N), *(pointer(t) for t in tensors)]

    def rotate(self, x_NHR: Tensor, interleaved: bool) -> Tensor:
        return rotate(x_NHR, self.cos_PR[self.positions_N], self.sin_PR[self.positions_N], interleaved)


def assert_rounded_alike(found: Tensor, expected: Tensor) -> None:
    """Equal but for a sum's order, which in bf16 may move a number to its neighbour, once for every rounding."""
    unit = 2e-6 if found.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found, expected, atol=2 * unit * float(expected.abs().max()), rtol=unit)


@pytest.mark.parametrize("norms", [False, True], ids=["plain", "norms"])
@settings(max_examples=10)
@given(tokens=st.integers(1, 9), groups=st.integers(1, 3), share=st.integers(1, 3), eighths=st.integers(1, 16))
def test_grouped_heads_are_rotated_and_written(
    kernels: NativeKernels, dtype: torch.dtype, norms: bool, tokens: int, groups: int, share: int, eighths: int
) -> None:
    """And in 8 bits, to the byte."""
    heads, width = groups * share, 8 * eighths
    rotation = Rotation.random(tokens, width // 2)
    qkv = normal(tokens, heads + 2 * groups, width, dtype=dtype, seed=2)
    qkv *= torch.logspace(-3, 3, qkv[..., 0].numel()).view_as(qkv[..., :1])
    qkv[0, -1] = 0
    gains = [normal(width, dtype=dtype, seed=seed) if norms else None for seed in (3, 4)]
    q = torch.zeros(tokens, heads, width, dtype=dtype)
    written: list[tuple[Tensor, Tensor]] = []
    for form in FORMS:
        held = cache_of(width, 0, dtype, form).kept(torch.zeros(40, groups, width, dtype=dtype))
        keys, values = torch.zeros_like(held), torch.zeros_like(held)
        kernels.door("write_grouped")(
            int(dtype == torch.bfloat16), FORMS.index(form), heads, groups, width, ctypes.c_float(1e-6),
            *(pointer(g) for g in gains), *rotation.arguments(), pointer(qkv), qkv[0].numel(), pointer(q),
            pointer(keys), pointer(values), 2,
        )  # fmt: skip
        written.append((keys, values))
    keys, values = written[0]
    given_q, given_k, given_v = qkv.split([heads, groups, groups], dim=1)
    for x, gain, found in ((given_q, gains[0], q), (given_k, gains[1], keys[rotation.slots_N])):
        normed = x if gain is None else rms_norm(x, gain, 1e-6)
        assert_rounded_alike(found, rotation.rotate(normed, interleaved=False))
    assert torch.equal(values[rotation.slots_N], given_v)
    others = torch.ones(40, dtype=torch.bool).index_fill_(0, rotation.slots_N, False)
    for form, both in zip(FORMS, written, strict=True):
        for plain, held in zip(written[0], both, strict=True):
            assert torch.equal(held[~others], cache_of(width, 0, dtype, form).kept(plain[~others]))
            assert not held[others].any()  # nothing else is written


@settings(max_examples=10)
@given(tokens=st.integers(1, 9), heads=st.integers(1, 5), sizes=st.tuples(*[st.integers(1, 9)] * 3))
def test_latent_entries_are_normed_rotated_and_written(
    kernels: NativeKernels, dtype: torch.dtype, tokens: int, heads: int, sizes: tuple[int, int, int]
) -> None:
    """And in 8 bits, to the byte; then their rope part stays as it is."""
    nope, rope, latent = (8 * size for size in sizes)
    padded, rotation = (nope + 31) // 32 * 32, Rotation.random(tokens, rope // 2)
    q, kv = (normal(tokens, w, dtype=dtype, seed=2) for w in (heads * (nope + rope), latent + rope))
    gain, q_nope = normal(latent, dtype=dtype, seed=3), torch.ones(tokens, heads, padded, dtype=dtype)
    q_absorbed, written = torch.zeros(tokens * heads, latent + rope, dtype=dtype), []
    for form in FORMS:
        held = cache_of(latent, rope, dtype, form).kept(torch.zeros(40, latent + rope, dtype=dtype))
        written.append(held.zero_())
        kernels.door("write_latent")(
            int(dtype == torch.bfloat16), FORMS.index(form), heads, nope, rope, latent, padded, ctypes.c_float(1e-6),
            pointer(gain), *rotation.arguments(), pointer(q), q.shape[1], pointer(kv), kv.shape[1], pointer(q_nope),
            pointer(q_absorbed), pointer(held), 2,
        )  # fmt: skip
    q_NHN, q_NHR = q.unflatten(1, (heads, -1)).split([nope, rope], dim=-1)
    assert torch.equal(q_nope[..., :nope], q_NHN) and not q_nope[..., nope:].any()
    assert_rounded_alike(q_absorbed[:, latent:].view(tokens, heads, rope), rotation.rotate(q_NHR, interleaved=True))
    entries = written[0][rotation.slots_N]
    assert_rounded_alike(entries[:, :latent], rms_norm(kv[:, :latent], gain, 1e-6))
    k_N1R = rotation.rotate(kv[:, None, latent:], interleaved=True)
    assert_rounded_alike(entries[:, None, latent:], k_N1R)
    for form, held in zip(FORMS, written, strict=True):
        assert torch.equal(held[rotation.slots_N], cache_of(latent, rope, dtype, form).kept(entries))
