"""What may be asked of a plan: every option once, with how it is read, its default and its help. No torch.

    asked = PretrainRequest.parse({"model": "deepseek-v3", "device": "h800", "count": "2048", "tokens": "14.8T"})
    asked.tokens                     # 14.8e12; numbers may also be given as numbers

The command line makes its options of these fields. Nonsense is a SlingshotError of one line with the nearest thing that
makes sense.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationInfo

from slingshot.base import quantity
from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.cost.devices import DEVICES, Device, device
from slingshot.model.config import ModelConfig
from slingshot.planning.layout import Recompute, Zero
from slingshot.planning.model_copy import DECODE_EFFICIENCY

LONGEST = 2**27  # tokens of a prompt, a response or a sequence


def _reads(read: Callable[[Any, str], Any], positive: bool = True) -> BeforeValidator:
    def checked(value: Any, info: ValidationInfo) -> Any:
        what = f"--{(info.field_name or '').replace('_', '-')}"
        found = read(value, what)
        if positive and not found > 0:
            raise SlingshotError(f"{what} {value}: must be more than 0")
        return found

    return BeforeValidator(checked)


Number = Annotated[float, _reads(quantity.count)]
Price = Annotated[float, _reads(quantity.count, positive=False)]
Whole = Annotated[int, _reads(quantity.whole)]
Size = Annotated[float, _reads(quantity.size)]
Seconds = Annotated[float, _reads(quantity.seconds)]
Share = Annotated[float, _reads(quantity.share)]


class NamedModel(Strict):
    """A model's architecture under the name it was asked for by."""

    name: str
    config: ModelConfig


def _named(value: Any) -> Any:
    return NamedModel(name=value, config=ModelConfig.preset(value)) if isinstance(value, str) else value


Model = Annotated[NamedModel, BeforeValidator(_named)]


def _hours_by_name(value: Any) -> Any:
    if isinstance(value, dict):
        return value
    stages: dict[str, float] = {}
    for text in value:
        name, separator, hours = text.rpartition("=")
        name = name.strip()
        if not separator or not name:
            raise SlingshotError(f"--stage {text!r:.60}: write NAME=HOURS, such as 'context extension=119K'")
        if name in (*stages, "pre-training"):
            raise SlingshotError(
                f"--stage {text!r:.60}: there is a line {name!r:.40} already; give it a name of its own"
            )
        stages[name] = quantity.count(hours, f"the hours of {name}")
    return stages


class PlanRequest(Strict):
    """What every plan is asked."""

    model: Model = Field(description="A preset, a folder, a .gguf file, package:NAME, or a hub name.")
    on: Annotated[Device, BeforeValidator(lambda value: device(value) if isinstance(value, str) else value)] = Field(
        alias="device", description=f"{', '.join(DEVICES)}, or local for this machine"
    )
    count: Whole | None = Field(1, description="Devices.")
    price: Price | None = Field(None, description="Of a device-hour; else the table's example.")
    memory: Size | None = Field(None, description="Of a device, such as 40GiB; else the table's.")
    precision: str | None = Field(None, description="float32, bfloat16, float16 or fp8; else as stored, else 16 bits.")
    mfu: Share | None = Field(None, description="Share of the peak reached; else 22% in 8 bits, 40% in others.")

    @property
    def device(self) -> Device:
        return self.on if self.memory is None else self.on.model_copy(update={"memory_bytes": self.memory})


class TrainingRequest(PlanRequest):
    """What every plan with training in it is asked. Of the layout's ways, what is left open is chosen."""

    tflops: Number | None = Field(None, description="TFLOP/s of a device in training, measured; instead of --mfu.")
    tp: Whole | None = Field(None, description="Tensor parallel ways; chosen when not given.")
    pp: Whole | None = Field(None, description="Pipeline stages; chosen when not given.")
    ep: Whole | None = Field(None, description="Expert parallel ways; chosen when not given.")
    zero: Annotated[Zero, BeforeValidator(lambda v: int(v) if str(v).isdecimal() else v)] | None = Field(
        None, description="ZeRO stage, 0 to 3; chosen when not given."
    )
    recompute: Recompute | None = Field(None, description="none, selective or full; chosen when not given.")

    @property
    def ways(self) -> dict[str, Any]:
        """Those of the layout's ways that are given."""
        return {
            name: way for name in ("tp", "pp", "ep", "zero", "recompute") if (way := getattr(self, name)) is not None
        }


class PretrainRequest(TrainingRequest):
    """Training on so many tokens."""

    tokens: Number = Field(description="Tokens trained on.")
    hours: Number | None = Field(None, description="Device-hours it took: shows what rate they come to.")
    context: Whole | None = Field(None, description="Tokens in a sequence; else 4096.")
    batch: Number | None = Field(None, description="Tokens in an optimizer step; else 4M, or a sequence a device.")
    stage: Annotated[dict[str, Number], BeforeValidator(_hours_by_name)] = Field(
        {}, description="NAME=HOURS: a further line of the bill; may be repeated."
    )


_PER_COPY = Field(None, description="Devices that hold one copy of the model; chosen when not given.")
_EFFICIENCY = Field(DECODE_EFFICIENCY, description="Share of the decode roofline that is reached.")


class RLRequest(TrainingRequest):
    """GRPO: rollouts, then their verification, then the update, in turns on the same devices."""

    steps: Whole = Field(description="Optimizer steps.")
    response: Number = Field(description="Mean tokens of a response.")
    longest: Number = Field(description="Tokens a response may have at most.")
    prompts: Whole = Field(32, description="Questions in a step.")
    group: Whole = Field(16, description="Responses to each question.")
    rollout: Whole | None = Field(None, description="Responses sampled at once; else those of a step.")
    prompt: Number = Field(200, description="Mean tokens of a prompt.")
    forwards: Annotated[int, _reads(quantity.count, positive=False)] = Field(
        1, description="Forward passes besides the trained one, such as the reference's."
    )
    verify_seconds: Annotated[float, _reads(quantity.seconds, positive=False)] = Field(
        0.1, description="Of one processor core for a response."
    )
    verify_workers: Whole | None = Field(
        None, description="Processor cores that verify; else 16 a device, or this machine's with --device local."
    )
    devices_per_copy: Whole | None = _PER_COPY
    efficiency: Share = _EFFICIENCY


class DistillRequest(TrainingRequest):
    """Sampling a teacher and training a student, the model, on what it wrote."""

    teacher: Model = Field(description="The teacher, named as the model is.")
    samples: Number = Field(description="Responses of the teacher to train on.")
    response: Number = Field(description="Mean tokens of a response.")
    prompt: Number = Field(200, description="Mean tokens of a prompt.")
    accepted: Share = Field(1, description="Share of the teacher's responses that are kept.")
    epochs: Number = Field(2, description="Passes over the samples.")
    teacher_precision: str | None = Field(None, description="Of the teacher; else as it is stored, else 16 bits.")
    devices_per_copy: Whole | None = _PER_COPY
    efficiency: Share = _EFFICIENCY


class ServeRequest(PlanRequest):
    """A day of serving."""

    count: Whole | None = Field(None, description="Devices; else what the traffic needs, or one copy.")
    prompt: Number = Field(4000, description="Mean tokens of a prompt.", ge=1, le=LONGEST)
    response: Number = Field(1000, description="Mean tokens of a response.", ge=1, le=LONGEST)
    hit_share: Annotated[float, _reads(quantity.share, positive=False)] = Field(
        0, description="Share of the prompt tokens that are cached."
    )
    latency: Seconds = Field(0.05, description="What a user waits for a token, at most.")
    input: Number | None = Field(None, description="Input tokens of a day's traffic.")
    output: Number | None = Field(None, description="Output tokens of a day's traffic.")
    prices: Annotated[tuple[float, float, float], BeforeValidator(lambda value: _prices(value))] | None = Field(
        None, description="Per million tokens: cached input/other input/output, such as 0.14/0.55/2.19."
    )
    devices_per_copy: Whole | None = _PER_COPY
    efficiency: Share = _EFFICIENCY


def _prices(value: Any) -> tuple[float, ...]:
    prices = tuple(quantity.count(part, "a price") for part in (value.split("/") if isinstance(value, str) else value))
    if len(prices) != 3:
        raise SlingshotError(
            "--prices: three per million tokens: cached input, other input, output, such as 0.14/0.55/2.19"
        )
    return prices
