"""How the next token is chosen: `SamplingParams` says it, `uniform_noise` and `sample` do it for a batch of rows.

Suffixes: B rows, V vocabulary, R the rows that truncate, K the candidates looked at in them.

    params = SamplingParams(temperature=0.6, top_p=0.95, max_tokens=256, n=8, seed=0)
    uniform_B = uniform_noise(streams_B, positions_B)
    ids_B, logprobs_B = sample(logits_BV, temperature_B, top_p_B, top_k_B, uniform_B)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from slingshot.base.errors import SlingshotError

# Below this a float32 logit difference of one unit in the last place already decides: ask for 0, which says so.
MIN_TEMPERATURE = 1e-4
_MOST = 2**31  # beyond any model and any patience
_KINDS: dict[str, tuple[type, str]] = {
    "bool": (bool, "true or false"), "int": (Integral, "a whole number"), "float": (Real, "a number"),
    "stop": (str, "strings"), "stop_token_ids": (Integral, "token ids"),
}  # fmt: skip
_OFF = {"top_p": 1.0, "top_k": 0, "stop": (), "stop_token_ids": ()}  # what None means


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks for.

    max_tokens: tokens at most, the end-of-sequence token included. temperature 0 is greedy. top_p 1 and top_k 0 (or
    None) keep the whole vocabulary. n: samples of the same prompt. stop: the text ends before the first of these
    strings; stop_token_ids: ids that end it besides the tokenizer's own. ignore_eos: nothing but max_tokens and stop
    strings end a sample, for timings. Raises SlingshotError for values of another kind and for impossible ones.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            value = _OFF.get(field.name) if value is None else value
            object.__setattr__(self, field.name, _of_kind(field.name, field.default, value))
        temperature = self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < float("inf")
        checks = (
            (1 <= self.max_tokens <= _MOST, f"max_tokens must be at least 1, got {self.max_tokens}"),
            (1 <= self.n <= _MOST, f"n must be at least 1, got {self.n}"),
            (temperature, f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}, got {self.temperature}"),
            (0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, got {self.top_p}"),
            (0 <= self.top_k <= _MOST, f"top_k must be 0 (off) or more, got {self.top_k}"),
            (all(self.stop), "an empty stop string would end every answer at once; remove it"),
        )
        for good, message in checks:
            if not good:
                raise SlingshotError(f"sampling: {message}")


def _of_kind(name: str, default: Any, value: Any) -> Any:
    """The value as Python's own int, float, bool or tuple; SlingshotError where the field takes no such kind."""
    if isinstance(default, tuple):
        one, words = _KINDS[name]
        good = isinstance(value, list | tuple) and all(isinstance(part, one) for part in value)
        hint = f"; write ({value!r},)" if isinstance(value, str) else ""  # to Python a tuple of characters
        words = f"a tuple of {words}"
    else:
        one, words = _KINDS[type(default).__name__]
        good, hint = isinstance(value, one) and isinstance(value, bool) == (one is bool), ""
    if not good:
        raise SlingshotError(f"sampling: {name} must be {words}, got {value!r}{hint}")
    return type(default)(value)


def noise_stream(seed: int, key: str, sample_index: int) -> int:
    """A signed 64-bit number that names one sample's stream of noise: nothing of the batch it runs in enters."""
    name = f"{seed}/{sample_index}/{key}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)


# splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) in wrapping int64.
_GOLDEN, _MIX1, _MIX2 = (bits - (1 << 64) for bits in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def uniform_noise(streams_B: Tensor, positions_B: Tensor) -> Tensor:
    """One float32 in [0, 1) a row, a multiple of 2**-24, from stream and position alone: int64 (B,), (B,) -> (B,).

    The upper 24 bits of output number `position` of the splitmix64 generator seeded with `stream`.
    """
    x_B = streams_B + positions_B * _GOLDEN
    x_B = (x_B ^ ((x_B >> 30) & ((1 << 34) - 1))) * _MIX1  # masked, because int64's shifts copy the sign
    x_B = (x_B ^ ((x_B >> 27) & ((1 << 37) - 1))) * _MIX2
    x_B = x_B ^ ((x_B >> 31) & ((1 << 33) - 1))
    return ((x_B >> 40) & 0xFFFFFF).float() * 2.0**-24


def _smallest_kept(weights_RV: Tensor, top_p_R: Tensor, top_k_R: Tensor) -> Tensor:
    """The weight below which a row's tokens are dropped: (R, V), (R,), (R,) -> (R,). Equals stand or fall together.

    top-k keeps the k heaviest; top-p then keeps the heaviest of those until their share of what top-k left reaches
    top_p, the token that reaches it included (Holtzman et al., arXiv 1904.09751). Without top-k, tokens under
    (1 - top_p) / V of the mass cannot be kept, all of them together weigh less than the tail to be cut; that spares
    sorting the vocabulary.
    """
    total_R = weights_RV.sum(-1)
    vocabulary = weights_RV.shape[-1]
    needed_R = (weights_RV >= ((1 - top_p_R) * total_R / vocabulary)[:, None]).sum(-1)
    needed_R = torch.where(top_k_R > 0, top_k_R.clamp(max=vocabulary), needed_R)
    heaviest_RK = weights_RV.topk(max(1, int(needed_R.max())), dim=-1).values
    rank_K = torch.arange(heaviest_RK.shape[-1], device=weights_RV.device)
    heaviest_RK = heaviest_RK.masked_fill(rank_K >= needed_R[:, None], 0.0)
    total_R = torch.where(top_k_R > 0, heaviest_RK.sum(-1), total_R)
    before_RK = heaviest_RK.cumsum(-1) - heaviest_RK
    kept_R = ((before_RK < (top_p_R * total_R)[:, None]) & (heaviest_RK > 0)).sum(-1)
    return heaviest_RK.gather(-1, kept_R[:, None] - 1)[:, 0]


def draw(weights_BV: Tensor, cumulative_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The id at which the cumulative weights pass `uniform` of their total: (B, V), (B, V), (B,) -> (B, 1).

    Never an id of weight zero: a parallel cumulative sum need not be monotone, so that a search may end beside a token
    that was kept. The heaviest is taken there.
    """
    # uniform < 1 keeps the target under the last entry, and `right` skips entries that add nothing.
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    ids_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True).clamp_(max=weights_BV.shape[-1] - 1)
    kept_B1 = weights_BV.gather(-1, ids_B1) > 0
    return ids_B1 if kept_B1.all() else torch.where(kept_B1, ids_B1, weights_BV.argmax(-1, keepdim=True))


def sample(
    logits_BV: Tensor, temperature_B: Tensor, top_p_B: Tensor, top_k_B: Tensor, uniform_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Choose one token a row by inverting the cumulative distribution at `uniform_B`: -> ids (B,), logprobs (B,).

    logits (B, V) float32; temperature, top_p (B,) float; top_k (B,) int64; uniform (B,) in [0, 1). ids int64, logprobs
    float32: log_softmax(logits / temperature) of the chosen ids over the whole vocabulary, before any truncation, which
    is what a trainer recomputes by a forward pass. Rows of temperature 0 take the first of the largest logits, with its
    log probability at temperature 1.
    """
    greedy_B = temperature_B == 0
    divisor_B1 = torch.where(greedy_B, 1.0, temperature_B)[:, None]
    largest_B1 = logits_BV.amax(-1, keepdim=True)
    weights_BV = (logits_BV - largest_B1).div_(divisor_B1).exp_()
    log_total_B = weights_BV.sum(-1).log()
    rows_R = (((top_p_B < 1) | (top_k_B > 0)) & ~greedy_B).nonzero()[:, 0]
    if len(rows_R):
        cut_B = torch.zeros_like(log_total_B)
        of_rows_RV = weights_BV if len(rows_R) == len(cut_B) else weights_BV[rows_R]
        cut_B[rows_R] = _smallest_kept(of_rows_RV, top_p_B[rows_R], top_k_B[rows_R])
        weights_BV.masked_fill_(weights_BV < cut_B[:, None], 0.0)
    ids_B1 = draw(weights_BV, weights_BV.cumsum(-1), uniform_B)
    if greedy_B.any():
        ids_B1 = torch.where(greedy_B[:, None], logits_BV.argmax(-1, keepdim=True), ids_B1)
    logprobs_B1 = (logits_BV.gather(-1, ids_B1) - largest_B1) / divisor_B1
    return ids_B1[:, 0], logprobs_B1[:, 0] - log_total_B
