"""Several adapters over one base: each sequence of a step may have one of its own.

    adapted = AdaptedModel(model, {"sums": Path("runs/sums/adapter"), "poems": Path("runs/poems/adapter")})
    runner = AdaptedRunner(NativeRunner(model, cache, kernels), adapted, cache)

Sequences without one run where they always do. Those with one run together, by torch: the base's product once for all
of them, and beside it the two small ones of each adapter for the tokens that have it (arXiv 2311.03285, 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.adapter import Adapter
from slingshot.engine.batch import FlatBatch, Runner, RunnerOutput, placed
from slingshot.engine.kv_cache import KVCache
from slingshot.engine.runner import TorchRunner
from slingshot.model.linear import AdaptedLinear, AdapterRows, Linear
from slingshot.model.transformer import Transformer


class AdaptedModel:
    """A model over the parameters of another, and beside its matrices those of the adapters, by name.

    numbers: what a batch calls the adapters, from 1 on. SlingshotError names the folder that is no adapter of this
    model, or the matrix that only a merged one can have.
    """

    def __init__(self, model: Transformer, folders: Mapping[str, Path]) -> None:
        self.numbers, self.rows = {name: number for number, name in enumerate(folders, 1)}, AdapterRows()
        with torch.device("meta"):
            self.model = Transformer(model.config)
        self.model.load_state_dict(model.state_dict(), assign=True)
        self.model.requires_grad_(False)
        self.model.compute_dtype = model.compute_dtype
        weight = model.model.embed_tokens.weight
        dtype = model.compute_dtype or weight.dtype
        modules = dict(self.model.named_modules())
        for name, folder in folders.items():
            adapter = Adapter(folder)
            for matrix, (a_RD, b_FR, scale) in adapter.changes(adapter.fit(model.config)).items():
                place = matrix.removesuffix(".weight")
                module = modules.get(place)
                if type(module) is Linear and place != "lm_head":
                    module = modules[place] = AdaptedLinear(module, self.rows)
                    self.model.set_submodule(place, module)
                if not isinstance(module, AdaptedLinear):
                    way_out = f"slingshot convert {folder} OUT merges it"
                    raise SlingshotError(f"{folder}: {place} is not changed request by request; {way_out}")
                change = a_RD.to(weight.device, dtype), (scale * b_FR).to(weight.device, dtype)
                module.changes[self.numbers[name]] = change


class AdaptedRunner:
    """`base`, for all that has no adapter; see the Runner protocol."""

    def __init__(self, base: Runner, adapted: AdaptedModel, cache: KVCache) -> None:
        self._base, self._rows = base, adapted.rows
        self._torch, self._device = TorchRunner(adapted.model, cache), cache.layers[0].device

    def refresh(self) -> None:
        self._base.refresh()

    def draft(self, batch: FlatBatch, hidden_ND: Tensor) -> RunnerOutput:
        """No adapter changes the MTP module."""
        return self._base.draft(batch, hidden_ND)

    def forward(self, batch: FlatBatch) -> RunnerOutput:
        chosen_S = batch.adapters_S
        if chosen_S is None or not chosen_S.any():
            return self._base.forward(batch)
        if chosen_S.all():
            return self._adapted(batch, chosen_S)
        plain, *of_plain = batch.only(chosen_S == 0)
        others, *of_others = batch.only(chosen_S > 0)
        found = [(self._base.forward(plain), of_plain), (self._adapted(others, chosen_S[chosen_S > 0]), of_others)]

        def whole(name: str, count: int, place: int) -> Tensor | None:
            parts = [(getattr(output, name), masks[place]) for output, masks in found]
            if parts[0][0] is None:
                return None
            like = parts[0][0]
            joined: Tensor = like.new_empty(count, *like.shape[1:])
            for part, mask in parts:
                joined[placed(mask, joined.device)] = part
            return joined

        tokens, wanted = len(batch.token_ids_N), len(batch.wanted)
        logits_RV = whole("logits_RV", wanted, 1)
        assert logits_RV is not None
        return RunnerOutput(logits_RV, whole("hidden_ND", tokens, 0), whole("routing_NLk", tokens, 0))

    def _adapted(self, batch: FlatBatch, adapters_S: Tensor) -> RunnerOutput:
        """Of sequences that all have an adapter."""
        adapters_N = adapters_S.repeat_interleave(batch.starts.diff())
        groups = ((number, (adapters_N == number).nonzero().squeeze(1)) for number in adapters_S.unique().tolist())
        self._rows.groups = [(number, placed(at_M, self._device)) for number, at_M in groups]
        try:
            return self._torch.forward(batch)
        finally:
            self._rows.groups = []
