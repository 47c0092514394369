"""What the APIs of chats and of completions ask alike: how to sample, and what the answer must look like.

    class ChatCompletionRequest(SamplingFields): ...
    params = body.sampling(REASONER, top_logprobs=3)        # ApiError 400 for what cannot be

OpenAI's names, and vLLM's where OpenAI has none. Keys that are not known here are tolerated, but for those of REFUSED:
they would change the answer, and this server does not do what they ask.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slingshot.base.errors import SlingshotError
from slingshot.engine.sampling import SamplingParams
from slingshot.serving.errors import ApiError

# Keys, and what they may hold all the same.
REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": (), "modalities": (["text"],), "functions": ([],), "function_call": ("none",), "web_search_options": (),
    "use_beam_search": (False,), "length_penalty": (1, 1.0), "min_tokens": (0,), "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,), "typical_p": (1, 1.0), "top_a": (0, 0.0), "mirostat": (0,),
    "verbosity": ("medium",), "options": ({},), "prompt_embeds": (), "continuous_usage_stats": (False,),
    "chat_template": (), "documents": ([],), "allowed_token_ids": (), "best_of": (1,), "num_ctx": (),
    "num_predict": (), "think": (), "enable_thinking": (),
}  # fmt: skip

MOST_STRINGS, MOST_CHARACTERS = 128, 4096  # of `stop`, and of `bad_words`: they are looked for at every token

ANY_OBJECT = {"type": "object", "additionalProperties": True}  # a schema that any object keeps to


class StreamOptions(BaseModel):
    include_usage: bool = False


class JsonSchemaFormat(BaseModel):
    """OpenAI's; every schema is kept to strictly."""

    name: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")


class ResponseFormat(BaseModel):
    type: str
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(BaseModel):
    """vLLM's."""

    model_config = ConfigDict(extra="forbid")
    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class SamplingFields(BaseModel):
    """None is: not given."""

    model_config = ConfigDict(extra="allow")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    bad_words: list[str] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _not_refused(self) -> SamplingFields:
        for key, value in (self.model_extra or {}).items():
            if key in REFUSED and value is not None and value not in REFUSED[key]:
                raise ValueError(f"{key} is not supported by this server: leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with what was used."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, defaults: dict[str, Any], **more: Any) -> SamplingParams:
        """As the engine takes it; more: what the API at hand adds. ApiError 400 where it contradicts itself."""
        names = (
            "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop_token_ids", "ignore_eos", "bad_words",
            "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
        )  # fmt: skip
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if given.get("top_k") == -1:
            given["top_k"] = 0
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        for name, strings in (("stop", stop), ("bad_words", self.bad_words or ())):
            if len(strings) > MOST_STRINGS or sum(map(len, strings)) > MOST_CHARACTERS:
                message = f"{name}: at most {MOST_STRINGS} strings, of {MOST_CHARACTERS} characters in all"
                raise ApiError(400, message, param=name)
        try:
            return SamplingParams(**defaults | given | self._structure() | more | {"stop": stop})
        except SlingshotError as error:
            raise ApiError(400, str(error)) from error

    def _structure(self) -> dict[str, Any]:
        """What the answer is held to, by the names of SamplingParams."""
        found: list[dict[str, Any]] = []
        if (wanted := self.response_format) is not None and wanted.type != "text":
            if wanted.type not in ("json_object", "json_schema"):
                known = "text, json_object, json_schema"
                raise ApiError(400, f"response_format {wanted.type!r:.80} is none of {known}", param="response_format")
            if wanted.type == "json_schema" and wanted.json_schema is None:
                raise ApiError(400, "response_format json_schema needs json_schema.schema", param="response_format")
            held = wanted.json_schema if wanted.type == "json_schema" else None
            found.append({"json_schema": ANY_OBJECT if held is None else held.schema_})
        guided: dict[str, Any] = {
            "json_schema": self.guided_json, "regex": self.guided_regex, "choice": self.guided_choice,
            "grammar": self.guided_grammar,
        }  # fmt: skip
        found += [{name: value} for name, value in guided.items() if value is not None]
        if (its := self.structured_outputs) is not None:
            json = ANY_OBJECT if its.json_object else its.json_
            held_to = {"json_schema": json, "regex": its.regex, "choice": its.choice, "grammar": its.grammar}
            found += [{name: value} for name, value in held_to.items() if value is not None]
        if len(found) > 1:
            raise ApiError(400, "response_format, structured_outputs and guided_... say different things: give one")
        return found[0] if found else {}
