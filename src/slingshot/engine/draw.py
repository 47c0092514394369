"""One token a row, chosen by inverting the distribution at a number that seed, prompt, sample and position make.

    rows = DrawParams.of(params)                                   # kept as long as the same rows are drawn for
    uniform_B = uniform_noise(streams_B, positions_B)
    ids_B, logprobs_B = sample(logits_BV, rows, uniform_B)

Every row is worked on by itself, so what else is in the batch does not enter. Suffixes: B rows, V vocabulary, R the
rows that truncate, K the candidates looked at in them, C chunks of the vocabulary, W ids in one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from slingshot.engine.batch import placed
from slingshot.engine.sampling import SamplingParams
from slingshot.kernels.native import NativeKernels, pointer

_LAST = 1 - 2.0**-24  # the largest number below 1 that noise can be


@dataclass(frozen=True)
class DrawParams:
    """Sampling parameters of B rows as tensors; those of greedy rows, but that, are off.

    divisor_B1: the temperature, 1 where greedy. truncated_R: rows with top-k or top-p, None where there are none;
    has_greedy, has_min_p: whether a row asks for such.
    """

    divisor_B1: Tensor
    greedy_B: Tensor
    top_p_B: Tensor
    top_k_B: Tensor
    min_p_B: Tensor
    truncated_R: Tensor | None
    has_greedy: bool
    has_min_p: bool

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> Self:
        drawn = [(its.top_p, its.top_k, its.min_p) if its.temperature else (1.0, 0, 0.0) for its in params]
        truncated = [row for row, (top_p, top_k, _) in enumerate(drawn) if top_p < 1 or top_k]
        greedy, min_p = [its.temperature == 0 for its in params], [min_p for *_, min_p in drawn]
        where = torch.device(device)
        return cls(
            placed(torch.tensor([[its.temperature or 1.0] for its in params]), where),
            placed(torch.tensor(greedy, dtype=torch.bool), where),
            placed(torch.tensor([top_p for top_p, *_ in drawn]), where),
            placed(torch.tensor([top_k for _, top_k, _ in drawn], dtype=torch.long), where),
            placed(torch.tensor(min_p), where),
            placed(torch.tensor(truncated), where) if truncated else None,
            any(greedy),
            any(min_p),
        )


def noise_stream(seed: int, key: str, sample_index: int) -> int:
    """A signed 64-bit number that names one sample's stream of noise: nothing of the batch it runs in enters."""
    name = f"{seed}/{sample_index}/{key}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)


# splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) in wrapping uint64.
_GOLDEN, _MIX1, _MIX2 = (np.uint64(bits) for bits in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_SHIFTS = tuple(np.uint64(bits) for bits in (30, 27, 31, 40))


def uniform_noise(streams_B: Tensor, positions_B: Tensor) -> Tensor:
    """One float32 in [0, 1) a row, a multiple of 2**-24, from stream and position alone: (B,) int64, (B,) -> (B,).

    The upper 24 bits of output number `position` of the splitmix64 generator seeded with `stream`. On the CPU, by
    numpy, which takes a quarter of torch's time for few rows.
    """
    first, second, third, upper = _SHIFTS
    x_B = streams_B.numpy().view(np.uint64) + positions_B.numpy().view(np.uint64) * _GOLDEN
    x_B = (x_B ^ (x_B >> first)) * _MIX1
    x_B = (x_B ^ (x_B >> second)) * _MIX2
    x_B = (x_B ^ (x_B >> third)) >> upper
    return torch.from_numpy(x_B.astype(np.float32) * np.float32(2.0**-24))


def _smallest_kept(weights_RV: Tensor, top_p_R: Tensor, top_k_R: Tensor, candidates: int) -> Tensor:
    """The weight below which a row's tokens are dropped: (R, V), (R,), (R,) -> (R,). Equals stand or fall together.

    top-k keeps the k heaviest; top-p then keeps the heaviest of those until their share of what top-k left reaches
    top_p, the token that reaches it included (Holtzman et al., arXiv 1904.09751). Nearly all mass lies in few tokens,
    and sorting a vocabulary is slow: only what weighs more than a floor is sorted, which sinks for the rows that need
    more. The heaviest token weighs 1. With candidates so many of the heaviest are looked at, and the host waits for
    nothing: NaN for a row for which they are too few.
    """
    vocabulary, counted_R = weights_RV.shape[-1], top_k_R > 0
    count_R = torch.where(counted_R, top_k_R.clamp(max=vocabulary), vocabulary)
    total_R = weights_RV.sum(-1)
    if candidates:
        heaviest_RK = weights_RV.topk(min(candidates, vocabulary), dim=-1).values
        cut_R, enough_R = _cut(heaviest_RK, top_p_R, count_R, counted_R, total_R)
        enough_R = torch.where(counted_R, count_R <= candidates, enough_R)
        return cut_R if candidates >= vocabulary else torch.where(enough_R, cut_R, torch.nan)
    if not total_R.isfinite().all():  # nothing can be sorted; the log probability tells
        return torch.zeros_like(total_R)
    # Under this floor tokens weigh less together than the tail that is to be cut.
    lowest_R = torch.where(counted_R, 0.0, (1 - top_p_R) * total_R / vocabulary)
    cut_R, open_R = torch.zeros_like(total_R), torch.arange(len(total_R), device=total_R.device)
    for floor in (1e-3, 1e-5, 0.0) if vocabulary > 2048 else (0.0,):
        of_open_RV = weights_RV if len(open_R) == len(cut_R) else weights_RV[open_R]
        floor_R = lowest_R[open_R].clamp(min=floor)
        heavier_RK = _heavier(of_open_RV, floor_R) if floor else of_open_RV * (of_open_RV > floor_R[:, None])
        most = int((heavier_RK > 0).sum(-1).clamp(max=count_R[open_R]).max())
        heaviest_RK = heavier_RK.topk(most, dim=-1).values
        of_rows = top_p_R[open_R], count_R[open_R], counted_R[open_R], total_R[open_R]
        cut_R[open_R], enough_R = _cut(heaviest_RK, *of_rows)
        open_R = open_R[~enough_R]
        if not len(open_R):
            break
    return cut_R


def _cut(
    heaviest_RK: Tensor, top_p_R: Tensor, count_R: Tensor, counted_R: Tensor, total_R: Tensor
) -> tuple[Tensor, Tensor]:
    """What `_smallest_kept` gives, as far as the heaviest weights of each row tell, and whether they suffice."""
    most = heaviest_RK.shape[-1]
    heaviest_RK.masked_fill_(torch.arange(most, device=heaviest_RK.device) >= count_R[:, None], 0.0)
    found_R = heaviest_RK.sum(-1)
    goal_R = top_p_R * torch.where(counted_R, found_R, total_R)
    before_RK = heaviest_RK.cumsum(-1) - heaviest_RK
    kept_R = ((before_RK < goal_R[:, None]) & (heaviest_RK > 0)).sum(-1)
    cut_R = heaviest_RK.gather(-1, (kept_R[:, None] - 1).clamp(min=0))[:, 0]
    return cut_R, torch.where(counted_R, (heaviest_RK > 0).sum(-1) == count_R, found_R > goal_R)


def _heavier(weights_RV: Tensor, floor_R: Tensor) -> Tensor:
    """Those of a row's weights that are larger than its floor, and zeros between them; 16 are looked at together."""
    padding = -weights_RV.shape[-1] % 16
    weights_RV = torch.nn.functional.pad(weights_RV, (0, padding)) if padding else weights_RV
    weights_RGW = weights_RV.unflatten(-1, (-1, 16))
    holds_RG = weights_RGW.amax(-1) > floor_R[:, None]
    counts_R = holds_RG.sum(-1)
    places_RM = torch.arange(int(counts_R.max()), device=counts_R.device) < counts_R[:, None]
    groups_RM = torch.zeros(places_RM.shape, dtype=torch.long, device=counts_R.device)
    groups_RM[places_RM] = holds_RG.nonzero()[:, 1]
    found_RMW = weights_RGW.take_along_dim(groups_RM[..., None], 1)
    return found_RMW.masked_fill(~(places_RM[..., None] & (found_RMW > floor_R[:, None, None])), 0.0).flatten(1)


def first_largest(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row and the first id that has it: (B, V) -> (B, 1), (B, 1)."""
    width = next((width for width in (64, 32, 16) if logits_BV.shape[-1] % width == 0), 1)
    if width == 1:
        ids_B1 = logits_BV.argmax(-1, keepdim=True)
        return logits_BV.gather(-1, ids_B1), ids_B1
    logits_BCW = logits_BV.unflatten(-1, (-1, width))
    chunk_B1 = logits_BCW.amax(-1).argmax(-1, keepdim=True)
    logits_BW = logits_BCW.take_along_dim(chunk_B1[..., None], 1)[:, 0]
    of_chunk_B1 = logits_BW.argmax(-1, keepdim=True)
    return logits_BW.gather(-1, of_chunk_B1), chunk_B1 * width + of_chunk_B1


def draw(weights_BV: Tensor, cumulative_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The id at which the cumulative weights pass `uniform` of their total: (B, V), (B, V), (B,) -> (B, 1).

    Never an id of weight zero: a parallel cumulative sum need not be monotone, so that a search may end beside a token
    that was kept. The heaviest is taken there.
    """
    # uniform < 1 keeps the target under the last entry, and `right` skips entries that add nothing.
    target_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    ids_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True).clamp_(max=weights_BV.shape[-1] - 1)
    kept_B1 = weights_BV.gather(-1, ids_B1) > 0
    if kept_B1.device.type == "cpu" and kept_B1.all():  # asking a GPU takes longer
        return ids_B1
    return torch.where(kept_B1, ids_B1, weights_BV.argmax(-1, keepdim=True))


def draw_by_chunks(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """`draw` in two steps, the chunk and the id in it: sums over a chunk are much faster than cumulative sums."""
    width = next((width for width in (256, 128, 64, 32) if weights_BV.shape[-1] % width == 0), 0)
    if not width or weights_BV.shape[-1] < 16 * width:
        return draw(weights_BV, weights_BV.cumsum(-1), uniform_B)
    weights_BCW = weights_BV.unflatten(-1, (-1, width))
    sums_BC = weights_BCW.sum(-1)
    cumulative_BC = sums_BC.cumsum(-1)
    chunk_B1 = draw(sums_BC, cumulative_BC, uniform_B)
    weights_BW = weights_BCW.take_along_dim(chunk_B1[..., None], 1)[:, 0]
    of_chunk_B1 = sums_BC.gather(-1, chunk_B1)
    before_B1 = cumulative_BC.gather(-1, chunk_B1) - of_chunk_B1
    rest_B1 = (uniform_B[:, None] * cumulative_BC[:, -1:] - before_B1) / of_chunk_B1
    return chunk_B1 * width + draw(weights_BW, weights_BW.cumsum(-1), rest_B1[:, 0].clamp(0, _LAST))


def sample(
    logits_BV: Tensor, params: DrawParams, uniform_B: Tensor, kernels: NativeKernels | None = None, candidates: int = 0
) -> tuple[Tensor, Tensor]:
    """Choose one token a row by inverting the cumulative distribution at `uniform_B`: -> ids (B,), logprobs (B,).

    logits (B, V) float32; uniform (B,) in [0, 1). ids int64, logprobs float32: log_softmax(logits / temperature) of the
    chosen ids over the whole vocabulary, before any truncation, which is what a trainer recomputes by a forward pass.
    Rows of temperature 0 take the first of the largest logits, with its log probability at temperature 1.
    kernels do the same, faster. With candidates all is done on the logits' device before anyone knows whether top-k and
    top-p kept more of a row's tokens than so many: then its log probability is NaN, and nothing is chosen.
    """
    if kernels is not None:
        return native_sample(kernels, logits_BV, params, uniform_B)
    if not params.has_greedy:
        largest_B1 = logits_BV.amax(-1, keepdim=True)
    else:
        largest_B1, likeliest_B1 = first_largest(logits_BV)
    weights_BV = (logits_BV - largest_B1).div_(params.divisor_B1).exp_()
    log_total_B = weights_BV.sum(-1).log()
    cut_B = params.min_p_B if params.has_min_p else None
    if params.truncated_R is not None:
        rows_R = params.truncated_R
        smallest_B = torch.zeros_like(log_total_B)
        of_rows_RV = weights_BV if len(rows_R) == len(smallest_B) else weights_BV[rows_R]
        smallest_B[rows_R] = _smallest_kept(of_rows_RV, params.top_p_B[rows_R], params.top_k_B[rows_R], candidates)
        log_total_B.masked_fill_(smallest_B.isnan(), torch.nan)
        cut_B = smallest_B if cut_B is None else torch.maximum(cut_B, smallest_B)
    if cut_B is not None:  # the likeliest weighs 1
        weights_BV.masked_fill_(weights_BV < cut_B[:, None], 0.0)
    ids_B1 = draw_by_chunks(weights_BV, uniform_B)
    if params.has_greedy:
        ids_B1 = torch.where(params.greedy_B[:, None], likeliest_B1, ids_B1)
    logprobs_B1 = (logits_BV.gather(-1, ids_B1) - largest_B1) / params.divisor_B1
    return ids_B1[:, 0], logprobs_B1[:, 0] - log_total_B


def native_sample(
    kernels: NativeKernels, logits_BV: Tensor, params: DrawParams, uniform_B: Tensor
) -> tuple[Tensor, Tensor]:
    """`sample` by native/sample.cpp."""
    (rows, vocabulary), logits_BV = logits_BV.shape, logits_BV.contiguous()
    ids_B, logprobs_B = torch.empty(rows, dtype=torch.long), torch.empty(rows)
    scratch = torch.empty(rows, 2, -(-vocabulary // 256))
    asked = params.divisor_B1, uniform_B, params.top_p_B, params.min_p_B, params.top_k_B, params.greedy_B
    tensors = map(pointer, (logits_BV, *asked, scratch, ids_B, logprobs_B))
    kernels.door("sample")(rows, vocabulary, *tensors, torch.get_num_threads())
    return ids_B, logprobs_B
