"""The optimizer step: Muon for matrices, AdamW for embeddings, head, router and norms, and the routers' load balancing.

    optimizer = Optimizer(model, config.optimizer)
    optimizer.step(fraction)             # fraction of the peak learning rate, from `schedule`
    update_router_biases(model, load_LE, speed=1e-3)

Shape suffixes: X any leading dimensions, M rows, N columns, E experts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from slingshot.base.config import Strict
from slingshot.model.transformer import Transformer, local_part
from slingshot.training.offload import StatePlace
from slingshot.training.parallel import whole

_NOT_OF_MUON = ("embed_tokens", "lm_head", "mlp.gate.weight")
AT_ONCE = 1 << 22  # numbers in a batch of Muon's, or one parameter
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Strict):
    """The table `optimizer`. `lr` is the peak for matrices, `adam_lr` for what Muon leaves to AdamW.

    With the name adamw, `lr` is for everything. `warmup` and `decay` are shares of all steps; the rate falls linearly
    to `final` of the peak. Momenta are kept in `state_dtype`, and computed in float32. `offload`: they lie in the
    host's memory ("host"), or in files of a folder, mapped into it, and updates are the same to the bit.
    """

    name: Literal["muon", "adamw"] = "muon"
    lr: float = Field(default=3e-3, gt=0)
    adam_lr: float = Field(default=3e-3, gt=0)
    momentum: float = Field(default=0.95, ge=0, lt=1)
    betas: tuple[Beta, Beta] = (0.9, 0.95)  # arXiv 2412.19437, 4.2
    weight_decay: float = Field(default=0.1, ge=0)
    state_dtype: Literal["float32", "bfloat16"] = "float32"  # DeepSeek-V3's are bfloat16 (arXiv 2412.19437, 3.3.3)
    offload: Annotated[str, Field(min_length=1)] | None = None
    clip: float = Field(default=1.0, gt=0)
    warmup: float = Field(default=0.02, ge=0, le=1)
    decay: float = Field(default=0.4, ge=0, le=1)
    final: float = Field(default=0.05, ge=0, le=1)


def schedule(config: OptimizerConfig, step: int, steps: int) -> float:
    """Warm-up, constant, linear decay: the fraction of the peak learning rate at `step` (counted from 0)."""
    warmup, decay = config.warmup * steps, config.decay * steps
    rising = (step + 1) / warmup if warmup > 0 else 1.0
    remaining = (steps - step) / decay if decay > 0 else 1.0
    return min(1.0, rising, config.final + (1 - config.final) * min(1.0, remaining))


def newton_schulz(matrices_XMN: Tensor, steps: int = 5) -> Tensor:
    """Push every matrix's singular values towards 1, batched over leading dimensions.

    The quintic iteration of Muon with Keller Jordan's coefficients (kellerjordan.github.io/posts/muon).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices_XMN.reshape(-1, *matrices_XMN.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices_XMN.shape)


@dataclass(eq=False)
class UpdateRule:
    """How some parameters move, and what is kept of each. `lr` is the peak.

    Not torch.optim's: making one of those imports torch's compiler, as long again as torch itself at every start.
    """

    parameters: list[nn.Parameter]
    place: StatePlace
    lr: float
    weight_decay: float
    state: dict[nn.Parameter, dict[str, Tensor]] = field(init=False, default_factory=lambda: defaultdict(dict))

    def step(self, fraction: float) -> None:
        """Move every parameter that has a gradient, at `fraction` of the rate."""
        raise NotImplementedError


@dataclass(eq=False)
class AdamW(UpdateRule):
    """AdamW (arXiv 1711.05101) by torch's fused kernel, as torch.optim.AdamW(fused=True) calls it."""

    betas: tuple[float, float]

    @torch.no_grad()
    def step(self, fraction: float) -> None:
        by_kind: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = defaultdict(list)
        for parameter in self.parameters:
            if parameter.grad is not None:
                by_kind[parameter.device, parameter.dtype].append(parameter)
        for moved in by_kind.values():  # state that has to come and go does so one parameter's at a time
            for some in [[parameter] for parameter in moved] if self.place.moves(moved[0]) else [moved]:
                self._move(some, self.lr * fraction)

    def _move(self, parameters: list[nn.Parameter], lr: float) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), device=parameter.device, dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = (self.place.zeros_like(parameter) for _ in range(2))
        kept = [state[key] for key in ("exp_avg", "exp_avg_sq") for state in states]
        wide = [self.place.taken(each, parameters[0]) for each in kept]
        steps, count = [state["step"] for state in states], len(states)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            list[Tensor](parameters), gradients, wide[:count], wide[count:], [], steps, lr=lr,
            beta1=self.betas[0], beta2=self.betas[1], weight_decay=self.weight_decay, eps=1e-8, amsgrad=False,
            maximize=False,
        )  # fmt: skip
        for value, own in zip(wide, kept, strict=True):
            self.place.put_back(value, own)


@dataclass(eq=False)
class Muon(UpdateRule):
    """Momentum, orthogonalised: W -= lr (0.2 sqrt(max(M, N)) NS(nesterov momentum) + weight_decay W).

    The scale makes an update's root mean square that of AdamW (Moonlight, arXiv 2502.16982). Leading dimensions (as of
    experts) are a batch of matrices; parameters of equal shape go through batched Newton-Schulz, which holds several
    times as much, so many at a time. A matrix of which ranks have some rows each is gathered for it, and every rank
    keeps its own rows of the result; of a sharded batch every rank does its own matrices.
    """

    momentum: float
    dtype: torch.dtype  # of Newton-Schulz

    @torch.no_grad()
    def step(self, fraction: float) -> None:
        by_shape: dict[tuple[int, ...], list[list[nn.Parameter]]] = defaultdict(list)
        for parameter in self.parameters:
            if parameter.grad is not None:
                pieces = by_shape[tuple(parameter.shape[-2:])]
                if not pieces or sum(its.numel() for its in (*pieces[-1], parameter)) > AT_ONCE:
                    pieces.append([])
                pieces[-1].append(parameter)
        for shape, pieces in by_shape.items():
            for some in pieces:
                self._move(some, shape, self.lr * fraction)

    def _move(self, parameters: list[nn.Parameter], shape: tuple[int, ...], lr: float) -> None:
        updates = [self._update(parameter) for parameter in parameters]
        orthogonal = newton_schulz(torch.cat([its.reshape(-1, *shape) for its in updates]).to(self.dtype))
        scale = -lr * 0.2 * math.sqrt(max(shape))
        counts = [its.numel() // math.prod(shape) for its in updates]
        for parameter, update, part in zip(parameters, updates, orthogonal.split(counts), strict=True):
            own, first = local_part(parameter)
            change = part.to(own.dtype).view(update.shape)
            change = change if len(change) == len(own) else change[first : first + len(own)]
            own.mul_(1 - lr * self.weight_decay).add_(change, alpha=scale)

    def _update(self, parameter: nn.Parameter) -> Tensor:
        """What is to be orthogonalised: whole matrices, of a sharded batch those that are here."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = self.place.zeros_like(parameter)
        buffer = self.place.taken(state["momentum"], parameter).lerp_(parameter.grad, 1 - self.momentum)
        update = parameter.grad.lerp(buffer, self.momentum)
        self.place.put_back(buffer, state["momentum"])
        return local_part(update)[0] if update.dim() > 2 else whole(update)


class Optimizer:
    """Muon and AdamW over one model, stepped together; its state is named tensors, as safetensors holds them."""

    def __init__(self, model: Transformer, config: OptimizerConfig) -> None:
        self.config, self.model = config, model
        matrices: list[nn.Parameter] = []
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # a frozen base beside adapters
                continue
            is_matrix = config.name == "muon" and not any(part in name for part in _NOT_OF_MUON)
            (plain if parameter.dim() < 2 else matrices if is_matrix else decayed).append(parameter)
        place = StatePlace([*decayed, *plain, *matrices], getattr(torch, config.state_dtype), config.offload)
        adam_lr = config.adam_lr if config.name == "muon" else config.lr
        self.parts: list[UpdateRule] = [
            AdamW(some, place, adam_lr, decay, config.betas)
            for some, decay in ((decayed, config.weight_decay), (plain, 0.0))
            if some
        ]
        if matrices:
            dtype = model.compute_dtype or matrices[0].dtype
            self.parts.append(Muon(matrices, place, config.lr, config.weight_decay, config.momentum, dtype))

    def step(self, fraction: float) -> float:
        """Clip the gradients' norm, step at `fraction` of the peak rate, drop them; returns the norm before clipping.

        A norm that is not finite leaves the weights untouched.
        """
        value = self._clip()
        if math.isfinite(value):
            for part in self.parts:
                part.step(fraction)
        self.model.zero_grad(set_to_none=True)
        return value

    def _clip(self) -> float:
        """Scale gradients to a norm of at most `clip`; -> the norm before. Experts may be on a mesh of their own."""
        by_mesh: dict[Any, list[nn.Parameter]] = defaultdict(list)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                by_mesh[getattr(parameter.grad, "device_mesh", None)].append(parameter)
        gradients = [[its.grad for its in each if its.grad is not None] for each in by_mesh.values()]
        norm = torch.stack([whole(nn.utils.get_total_norm(each)) for each in gradients]).norm()
        for each in by_mesh.values():
            nn.utils.clip_grads_with_norm_(each, self.config.clip, norm)
        return float(norm)

    def _slots(self) -> list[tuple[str, UpdateRule, nn.Parameter]]:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [(names[p], part, p) for part in self.parts for p in part.parameters]

    def state(self) -> dict[str, Tensor]:
        """Named tensors of the state, sharded as the parameters are: NAME.exp_avg, NAME.momentum ..."""
        slots = ((name, part.state[parameter]) for name, part, parameter in self._slots())
        return {f"{name}.{key}": value for name, state in slots for key, value in state.items()}

    def load(self, read: Callable[[str, Tensor], Tensor | None]) -> None:
        """Take back what `state` gave: `read` gives a tensor of that name, sharded as its parameter is, or None."""
        for name, part, parameter in self._slots():
            for key in ("step", "exp_avg", "exp_avg_sq", "momentum"):
                if (value := read(f"{name}.{key}", parameter)) is not None:  # which may be the file's own pages
                    kept = value.clone() if key == "step" else part.place.copy(value, parameter)
                    part.state[parameter][key] = kept


@torch.no_grad()
def update_router_biases(model: Transformer, load_LE: list[Tensor], speed: float) -> None:
    """Auxiliary-loss-free balancing: bias += speed * sign(mean load - load) after a step (arXiv 2412.19437, 2.1.2).

    load_LE is the load of the whole global batch, one [E] per MoE layer in `Transformer.moe_layers` order.
    """
    for layer, load_E in zip(model.moe_layers(), load_LE, strict=False):
        layer.gate.e_score_correction_bias += speed * (load_E.mean() - load_E).sign()
