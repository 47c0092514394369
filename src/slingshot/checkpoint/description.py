"""What describes a model beside its weights: config.json, the tokenizer's files, generation_config.json. No torch.

config, tokenizer = load_config(folder), folder_tokenizer(folder)
write_description(out, config, tokenizer, "bfloat16", source=folder)
"""

from __future__ import annotations

import shutil
from pathlib import Path

from slingshot.base.errors import SlingshotError
from slingshot.base.files import inside, read_json, write_json
from slingshot.model.config import ModelConfig
from slingshot.text.tokenizer import Tokenizer

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tiktoken.model",
)  # fmt: skip
_OTHERS_TOKENIZERS = ("tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt")  # for other programs alone


def load_config(folder: Path | str) -> ModelConfig:
    """The architecture that a folder's config.json describes."""
    file = inside(Path(folder), CONFIG)
    return ModelConfig.from_hf(read_json(file), str(file))


def folder_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer and chat template of a folder, none of whose files is a link out of it."""
    for name in (GENERATION, *TOKENIZER):
        inside(folder, name)
    return Tokenizer.load(folder)


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, path: Path) -> None:
    """Raise SlingshotError, with the path, where the tokenizer has more ids than the model embeddings."""
    try:
        tokenizer.check_fits(vocab_size)
    except SlingshotError as error:
        raise SlingshotError(f"{path}: {error}") from error


def write_description(
    folder: Path, config: ModelConfig, tokenizer: Tokenizer | None, dtype: str, source: Path | None
) -> None:
    """Write everything but the weights into an existing folder. `dtype`: what config.json calls theirs.

    source: the folder that the model comes from. Its generation_config.json is kept, and what is missing there added;
    without a `tokenizer` (one that cannot be read here) its tokenizer's files are copied.
    """
    tokens: dict[str, int | list[int] | None] = {}
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        config, ends = config.model_copy(update=ids), sorted(tokenizer.eos_ids)
        tokens = {**ids, "eos_token_id": ends if len(ends) > 1 else tokenizer.eos_id}
        tokenizer.save(folder)
    elif source is not None and source.is_dir():
        for name in (*TOKENIZER, *_OTHERS_TOKENIZERS):
            if (file := inside(source, name)).exists():
                shutil.copyfile(file, folder / name)
    raw = {key: value for key, value in config.to_hf().items() if key != "dtype"} | {"torch_dtype": dtype}
    write_json(folder / CONFIG, raw)
    if source is not None and source.is_dir() and (file := inside(source, GENERATION)).exists():
        generation = read_json(file)
        if not isinstance(generation, dict):
            raise SlingshotError(f"{file} does not hold a JSON object")
        generation |= {key: id for key, id in tokens.items() if id is not None and generation.get(key) is None}
    else:
        generation = tokens | {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    write_json(folder / GENERATION, generation)
