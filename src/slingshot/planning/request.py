"""What may be asked of a plan: every option once, with how it is read, its default and its help. No torch.

    PretrainRequest.parse({"model": "deepseek-v3", "device": "h800", "tokens": "14.8T"}).tokens  # 14.8e12

The command line makes its options of these fields.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo

from slingshot.base import quantity
from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.layout import AdapterNumbers, adapter_numbers
from slingshot.cost.devices import DEVICES, Device, device
from slingshot.model.config import ModelConfig
from slingshot.planning.layout import Recompute, Zero
from slingshot.planning.model_copy import DECODE_EFFICIENCY

LONGEST = 2**27  # tokens of a prompt, a response or a sequence


class NamedModel(Strict):
    """A model's architecture under the name it was asked for by."""

    name: str
    config: ModelConfig


def _number(read: Callable[[Any, str], float], positive: bool = False) -> BeforeValidator:
    """Reads the number behind an option, which is told the option's name; `positive`: more than 0."""

    def checked(value: Any, info: ValidationInfo) -> float:
        option = f"--{(info.field_name or '').replace('_', '-')}"
        found = read(value, option)
        if positive and not found > 0:
            raise SlingshotError(f"{option} {value}: must be more than 0")
        return found

    return BeforeValidator(checked)


def _text(read: Callable[[str], Any]) -> BeforeValidator:
    """Reads what is typed; what a program hands in stays as it is."""
    return BeforeValidator(lambda value: read(value) if isinstance(value, str) else value)


def _prices(value: Any) -> tuple[float, ...]:
    prices = tuple(quantity.count(part, "a price") for part in (value.split("/") if isinstance(value, str) else value))
    if len(prices) != 3:
        raise SlingshotError("--prices: three a million: cached input, other input, output, such as 0.14/0.55/2.19")
    return prices


def _hours_by_name(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    stages: dict[str, Any] = {}
    for text in value:
        name, _, hours = (part.strip() for part in text.rpartition("="))
        if not name or name in (*stages, "pre-training"):
            taken = f"there is a line {name!r:.40} already; give it a name of its own"
            trouble = taken if name else "write NAME=HOURS, such as 'context extension=119K'"
            raise SlingshotError(f"--stage {text!r:.60}: {trouble}")
        stages[name] = quantity.count(hours, f"the hours of {name}")
    return stages


Number = Annotated[float, _number(quantity.count, positive=True)]
Whole = Annotated[int, _number(quantity.whole)]
Share = Annotated[float, _number(quantity.share, positive=True)]
Model = Annotated[NamedModel, _text(lambda name: NamedModel(name=name, config=ModelConfig.preset(name)))]
Hired = Annotated[Device, _text(device)]
ZeroStage = Annotated[Zero, _text(lambda text: int(text) if text.isdecimal() else text)]
Targets = Annotated[tuple[str, ...], _text(lambda text: tuple(map(str.strip, text.split(","))))]
Stages = Annotated[dict[str, Number], BeforeValidator(_hours_by_name)]
Prices = Annotated[tuple[float, float, float], BeforeValidator(_prices)]


def _asked(help: str, default: Any = None, **bounds: Any) -> Any:
    """An option that may be left out."""
    return Field(default, description=help, **bounds)


class PlanRequest(Strict):
    """What every plan is asked; `kind`: of which one."""

    kind: ClassVar[str]
    model: Model = Field(description="A preset, a folder, a .gguf file, package:NAME, or a hub name.")
    device: Hired = Field(description=f"{', '.join(DEVICES)}, or local for this machine")
    count: Whole | None = _asked("Devices.", 1)
    price: Annotated[float, _number(quantity.count)] | None = _asked("Of a device-hour; else an example.")
    memory: Annotated[float, _number(quantity.size, True)] | None = _asked("Of a device: 40GiB; else the table's.")
    precision: str | None = _asked("float32, bfloat16, float16, fp8 (serving: int8); else as stored, else 16 bits.")
    mfu: Share | None = _asked("Share of the peak reached; else 22% in 8 bits, 40% in others.")


class TrainingRequest(PlanRequest):
    """What every plan with training in it is asked. Of the layout's ways, what is left open is chosen."""

    tflops: Number | None = _asked("TFLOP/s of a device in training, measured; instead of --mfu.")
    tp: Whole | None = _asked("Tensor parallel ways; chosen when not given.")
    pp: Whole | None = _asked("Pipeline stages; chosen when not given.")
    ep: Whole | None = _asked("Expert parallel ways; chosen when not given.")
    zero: ZeroStage | None = _asked("ZeRO stage, 0 to 3; or chosen.")
    recompute: Recompute | None = _asked("none, selective or full; chosen when not given.")
    logits_chunk: Whole | None = _asked("Tokens whose logits are in memory at once; else a sequence's.")
    state_dtype: Literal["float32", "bfloat16"] | None = _asked("Of AdamW's moments; else as the precision has them.")
    offload: bool = _asked("true: AdamW's moments lie in the host's memory or on its disk; not counted.", False)

    @property
    def adapters(self) -> AdapterNumbers | None:
        """Of adapters, where these are trained and the rest is frozen."""
        return None

    @property
    def ways(self) -> dict[str, Any]:
        """Those of the layout's ways that are given."""
        return self.model_dump(include={"tp", "pp", "ep", "zero", "recompute"}, exclude_none=True)


class AdapterRequest(TrainingRequest):
    """What every plan is asked in which all of a model is trained, or adapters beside a frozen one (LoRA)."""

    lora: Whole | None = _asked("Rank of adapters that are trained in place of all weights.")
    lora_targets: Targets = _asked(
        "What adapters stand beside: attention, mlp, experts, or matrices by name.", ("attention", "mlp")
    )

    @cached_property
    def adapters(self) -> AdapterNumbers | None:
        """How many numbers they hold; SlingshotError for what this model cannot have."""
        if self.lora is None:
            return None
        config = self.model.config
        for target in self.lora_targets:
            if not adapter_numbers(config, self.lora, [target]).held:
                raise SlingshotError(f"--lora-targets {target}: this model has no such matrices")
        return adapter_numbers(config, self.lora, self.lora_targets)


class PretrainRequest(TrainingRequest):
    """Training on so many tokens."""

    kind = "pretrain"
    tokens: Number = Field(description="Tokens trained on.")
    hours: Number | None = _asked("Device-hours it took: shows what rate they come to.")
    context: Whole | None = _asked("Tokens in a sequence; else 4096.")
    batch: Number | None = _asked("Tokens in an optimizer step; else 4M, or a sequence a device.")
    stage: Stages = _asked("NAME=HOURS: a further line of the bill; may be repeated.", {})


class SamplingRequest(PlanRequest):
    """What every plan with sampling in it is asked."""

    devices_per_copy: Whole | None = _asked("Devices that hold one copy of the model; chosen when not given.")
    efficiency: Share = _asked("Share of the decode roofline that is reached.", DECODE_EFFICIENCY)


class RLRequest(AdapterRequest, SamplingRequest):
    """GRPO: rollouts, then their verification, then the update, in turns on the same devices."""

    kind = "rl"
    steps: Whole = Field(description="Optimizer steps.")
    response: Number = Field(description="Mean tokens of a response.")
    longest: Number = Field(description="Tokens a response may have at most.")
    prompts: Whole = _asked("Questions in a step.", 32)
    group: Whole = _asked("Responses to each question.", 16)
    rollout: Whole | None = _asked("Responses sampled at once; else those of a step.")
    prompt: Number = _asked("Mean tokens of a prompt.", 200)
    forwards: Annotated[int, _number(quantity.count)] = _asked("Forward passes besides the trained one.", 1)
    verify_seconds: Annotated[float, _number(quantity.seconds)] = _asked("Of one processor core for a response.", 0.1)
    verify_workers: Whole | None = _asked("Cores that verify; else 16 a device, or this machine's with --device local.")


class DistillRequest(AdapterRequest, SamplingRequest):
    """Sampling a teacher and training a student, the model, on what it wrote."""

    kind = "distill"
    teacher: Model = Field(description="The teacher, named as the model is.")
    samples: Number = Field(description="Responses of the teacher to train on.")
    response: Number = Field(description="Mean tokens of a response.")
    prompt: Number = _asked("Mean tokens of a prompt.", 200)
    accepted: Share = _asked("Share of the teacher's responses that are kept.", 1)
    epochs: Number = _asked("Passes over the samples.", 2)
    teacher_precision: str | None = _asked("Of the teacher; else as it is stored, else 16 bits.")


class ServeRequest(SamplingRequest):
    """A day of serving."""

    kind = "serve"
    count: Whole | None = _asked("Devices; else what the traffic needs, or one copy.")
    prompt: Number = _asked("Mean tokens of a prompt.", 4000, ge=1, le=LONGEST)
    response: Number = _asked("Mean tokens of a response.", 1000, ge=1, le=LONGEST)
    hit_share: Annotated[float, _number(quantity.share)] = _asked("Share of prompt tokens cached.", 0)
    latency: Annotated[float, _number(quantity.seconds, True)] = _asked("What a user waits for a token at most.", 0.05)
    input: Number | None = _asked("Input tokens of a day's traffic.")
    output: Number | None = _asked("Output tokens of a day's traffic.")
    prices: Prices | None = _asked("Per million tokens: cached input/other input/output, such as 0.14/0.55/2.19.")
