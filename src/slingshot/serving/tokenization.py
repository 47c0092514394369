"""POST /tokenize and /detokenize, and GET /tokenizer_info, as vLLM has them.

body.answer(model)      # {"count", "max_model_len", "tokens", "token_strs"}, or {"prompt"}
tokenizer_info(model)   # what clients that encode by these need to know: lm-eval does
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from slingshot.serving.errors import ApiError
from slingshot.serving.question import Question, plain_messages
from slingshot.serving.served_model import ServedModel


class TokenizeRequest(BaseModel):
    """A text, or a chat. model: the first one where it is not said."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: list[dict[str, Any]] | None = None
    return_token_strs: bool = False

    def answer(self, model: ServedModel) -> dict[str, Any]:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "give one of prompt and messages", param="prompt")
        if self.messages is not None:
            if not self.add_generation_prompt and not self.continue_final_message:
                raise ApiError(400, "add_generation_prompt: false needs continue_final_message: true")
            question = Question(
                model.name,
                messages=plain_messages(self.messages),
                tools=self.tools or (),
                continues=self.continue_final_message,
            )
            ids = model.encode(question)
        elif self.add_special_tokens is False:
            ids = model.tokenizer.encode(self.prompt or "")
        else:
            ids = model.encode(Question(model.name, prompt=self.prompt))
        told = {"count": len(ids), "max_model_len": model.backend.max_length, "tokens": ids, "token_strs": None}
        if self.return_token_strs:
            spelt = map(model.tokenizer.detokenizer.bytes_of, ids)
            told["token_strs"] = [each.decode("utf-8", errors="replace") for each in spelt]
        return told


class DetokenizeRequest(BaseModel):
    model: str | None = None
    tokens: list[int]

    def answer(self, model: ServedModel) -> dict[str, Any]:
        return {"prompt": model.tokenizer.decode(self.tokens)}


def tokenizer_info(model: ServedModel) -> dict[str, Any]:
    """The tokens that tokenizer_config.json names, and the chat template."""
    tokens = {name: model.tokenizer.token(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return tokens | {"chat_template": model.tokenizer.chat_template}
