"""llama.cpp runs the GGUF files we write: the same logprob at every position, the same greedy text, the same ids for
texts and chats.

    make interop

Three models as float32 and as bfloat16 files: deepseek-v3-tiny-576 (query LoRA, YaRN, grouped experts, an MTP module)
and one as the recipes have it (a plain query projection, no YaRN), both pre-trained here for a minute so that their
predictions are sharp and their router biases have moved, and a real dense one, SmolLM2-135M-Instruct. Small models of
random weights go through every other shape that can be written.

Deviations measured over 630 predictions (nats; median, worst; xllamacpp 2026.10.11549, two runs on an AMD EPYC):

                float32           bfloat16
    deepseek    9.5e-7, 2.5e-5    2.9e-3, 1.4
    tiny        9.5e-7, 8.1e-6    2.7e-3, 0.68
    smollm2     8.5e-5, 3.0e-4    1.1e-2, 0.31

Of files in q4_0 and q8_0, for whose products llama.cpp rounds activations to 8 bits in blocks of 32 (an Intel Xeon with
AMX): smollm2 5.9e-2, 0.95 and 4.4e-2, 1.1; tiny in q4_0 6.0e-3, 1.0. On an AMD EPYC with AVX2 only the same within a
tenth, but for the worst of q8_0, 1.3, and of tiny, 2.5. A model of random weights 4.6e-3 in q8_0; with the
zero point off by one 1.3e-2, under another group's or row's scale 0.22, neighbours exchanged 0.57.

The float32 bounds are about ten times the worst; a mistake in a file does far more (test_a_broken_export_shows).
SmolLM2's part is llama.cpp's own: against float64 we are off by 8e-6 there, it by 1.2e-4. With bfloat16 files llama.cpp
rounds every activation to bfloat16 before a product, where we compute in float32: a token whose router stands between
two experts then goes either way. So the worst says little there and its bound is loose, while the median's is five
times what rounding does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from interop.compare import Forced, assert_same_predictions, deviations, teacher_forced
from interop.conftest import FEW_BITS
from interop.questions import LENGTH, MAX_TOKENS, TASK, Questions
from slingshot.base.progress import Progress
from slingshot.checkpoint.description import write_description
from slingshot.checkpoint.gguf import write as gguf_writer
from slingshot.checkpoint.load_save import load_model, load_tokenizer, open_weights, save_checkpoint
from slingshot.checkpoint.safetensors import write_shards
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.quantization.formats import Scheme, SchemeKind
from slingshot.tasks.loader import load_task
from slingshot.text.pretokenizers import SPLITS
from slingshot.text.tokenizer import Tokenizer
from slingshot.training.fitting import Fit, tensors
from tests.parity.test_quantized import BROKEN

Peer = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Bounds:
    """In nats: of every deviation, and of their median."""

    worst: float
    median: float


BOUNDS = {
    ("deepseek", "float32"): Bounds(worst=2e-4, median=1e-5),
    ("deepseek", "bfloat16"): Bounds(worst=5.0, median=0.015),
    ("tiny", "float32"): Bounds(worst=2e-4, median=1e-5),
    ("tiny", "bfloat16"): Bounds(worst=5.0, median=0.015),
    ("smollm2", "float32"): Bounds(worst=3e-3, median=5e-4),
    ("smollm2", "bfloat16"): Bounds(worst=1.5, median=0.05),
    ("smollm2", "int4"): Bounds(worst=5.0, median=0.15),
    ("smollm2", "int8"): Bounds(worst=5.0, median=0.15),
    ("tiny", "int4"): Bounds(worst=5.0, median=0.02),
}


@dataclass(frozen=True)
class Meeting:
    """A GGUF file, what was asked about it, and llama.cpp's answer."""

    file: Path
    ours: Path  # whose weights are the file's
    dtype: str
    bounds: Bounds
    tokenizer: Tokenizer
    questions: Questions
    answer: dict[str, Any]


@pytest.fixture(scope="module")
def tiny(pretrained: Callable[[str, dict[str, Any]], Path]) -> Path:
    """As the recipes have it: a plain query projection, no YaRN."""
    widths = {"q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8}
    return pretrained("tiny", {"preset": "deepseek-v3-tiny-576", "rope_scaling": None, **widths})


@pytest.fixture(scope="module", params=BOUNDS, ids="-".join)
def meeting(
    request: pytest.FixtureRequest,
    peer: Callable[[str], Peer],
    slingshot: Callable[..., None],
    few_bits: Callable[[str, Path], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Meeting:
    name, dtype = request.param
    llama_cpp = peer("llama_cpp")  # before the minute that pre-training takes
    folder = request.getfixturevalue(name)
    file = tmp_path_factory.mktemp(name) / f"{name}.gguf"
    if dtype in FEW_BITS:
        folder = few_bits(dtype, folder)
        slingshot("convert", folder, file)
    else:
        slingshot("convert", folder, file, "--dtype", dtype)
    tokenizer = load_tokenizer(folder)
    # English alone: in a text of its own, llama.cpp reports no token that ends within a character
    questions = Questions.of(tokenizer, languages=["en"])
    answer = llama_cpp({"model": str(file), "draft": False, **questions.asked()})
    ours = file if dtype == "bfloat16" else folder
    return Meeting(file, ours, dtype, BOUNDS[request.param], tokenizer, questions, answer)


def test_every_logprob_along_given_tokens(meeting: Meeting) -> None:
    """Ours in float32 arithmetic, as llama.cpp's sums are."""
    forced = [Forced(**forced) for forced in meeting.answer["forced"]]
    what = f"{meeting.file.stem}, llama.cpp {meeting.answer['version']}, {meeting.dtype}"
    assert_same_predictions(
        teacher_forced(load_model(meeting.ours), meeting.questions.prompts),
        forced,
        meeting.bounds.worst,
        meeting.bounds.median,
        what,
    )


def test_the_greedy_text_of_chats(meeting: Meeting) -> None:
    """Token by token, against one uncached pass of ours along llama.cpp's own text."""
    model = load_model(meeting.ours)
    chats = meeting.answer["chats"]
    assert all(1 <= len(chat["ids"]) <= MAX_TOKENS for chat in chats)
    mine = [
        forced.last(len(chat["ids"]))
        for chat, forced in zip(chats, teacher_forced(model, [c["prompt"] + c["ids"] for c in chats]), strict=True)
    ]
    theirs = [Forced(**chat["forced"]) for chat in chats]
    assert_same_predictions(
        mine, theirs, meeting.bounds.worst, meeting.bounds.median, f"{meeting.file.stem}, decoding, {meeting.dtype}"
    )


def test_the_ids_of_texts_and_chats(meeting: Meeting) -> None:
    assert meeting.answer["texts"] == [meeting.tokenizer.encode(text) for text in meeting.questions.texts]
    assert [chat["prompt"] for chat in meeting.answer["chats"]] == [
        meeting.tokenizer.encode_chat(chat) for chat in meeting.questions.chats
    ]


def test_the_mtp_module_drafts(
    peer: Callable[[str], Peer], slingshot: Callable[..., None], deepseek: Path, tmp_path: Path
) -> None:
    """llama.cpp's drafts by the module are right as often as ours would be, and leave the text as it is."""
    file = tmp_path / "deepseek.gguf"
    slingshot("convert", deepseek, file, "--dtype", "float32")
    tokenizer, model = load_tokenizer(deepseek), load_model(deepseek)
    problems = islice(
        load_task(TASK["name"], **TASK["params"], languages=["en"]).documents("test", 1, "steps", 0.0), 16
    )
    chats = [[{"role": "user", "content": problem.prompt}] for problem, _ in problems]
    asked = {"model": str(file), "prompts": [], "texts": [], "chats": chats, "max_tokens": MAX_TOKENS}
    plain, drafted = (peer("llama_cpp")(asked | {"draft": draft})["chats"] for draft in (False, True))
    assert [chat["ids"] for chat in drafted] == [chat["ids"] for chat in plain]
    right = total = 0
    for chat in plain:
        ids = torch.tensor([[*chat["prompt"], *chat["ids"], tokenizer.eos_id]])
        with torch.no_grad():
            hidden = model(ids, logits=False, mtp=True).mtp_hidden_BTD
            assert hidden is not None
            foreseen = model.lm_logits(hidden)[0].argmax(-1)[len(chat["prompt"]) - 1 : -2]
        right, total = right + int((foreseen == ids[0, len(chat["prompt"]) + 1 :]).sum()), total + len(foreseen)
    accepted, tried = sum(chat["accepted"] for chat in drafted), sum(chat["drafted"] for chat in drafted)
    print(f"llama.cpp accepted {accepted} of {tried} drafts, {right} of {total} of ours would be right")
    assert accepted / tried > 0.25 and abs(accepted / tried - right / total) < 0.15


DEEPSEEK: dict[str, Any] = {
    "family": "deepseek_v3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256, "routed_scaling_factor": 2.5, "q_lora_rank": 40, "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 8, "v_head_dim": 32, "moe_intermediate_size": 32, "n_routed_experts": 16, "n_shared_experts": 1,
    "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip
DENSE: dict[str, Any] = {
    "family": "dense", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}  # fmt: skip
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
SHAPE_BOUND = 1e-4  # nats, of every deviation
SHAPES: dict[str, dict[str, Any]] = {
    "v3": DEEPSEEK,
    "v3, plain query, tied, no groups, gates as they are": DEEPSEEK
    | {"q_lora_rank": None, "tie_word_embeddings": True, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    "v3, YaRN as V2's, two shared experts, all groups": DEEPSEEK
    | {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, "n_shared_experts": 2, "topk_group": 4},
    "v3, widths that fill no block": DEEPSEEK
    | {"qk_nope_head_dim": 20, "v_head_dim": 14, "kv_lora_rank": 36, "moe_intermediate_size": 28},
    "v3, at a Lite model's depth": DEEPSEEK
    | {"num_hidden_layers": 26, "q_lora_rank": None, "num_nextn_predict_layers": 0},
    "v3, without experts": DEEPSEEK | {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0},
    "llama": DENSE | {"head_dim": 32, "rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "llama, tied, YaRN": DENSE | {"tie_word_embeddings": True, "rope_scaling": YARN},
    "qwen2": DENSE | {"attention_bias": True, "rope_scaling": YARN},
    "qwen3": DENSE | {"qk_norm": True, "head_dim": 32, "rms_norm_eps": 1e-5},
}


@torch.no_grad()
def sharp(config: ModelConfig) -> Transformer:
    """Random weights whose predictions are far from uniform and in which every tensor matters."""
    model, generator = Transformer(config), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(
                0.0, 1.0 if "embed_tokens" in name else 0.9 * parameter.shape[-1] ** -0.5, generator=generator
            )
        else:
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    for layer in model.moe_layers():
        layer.gate.e_score_correction_bias.normal_(0.0, 0.2, generator=generator)
    return model


@pytest.fixture
def compared(
    peer: Callable[[str], Peer], tmp_path: Path
) -> Callable[[dict[str, Any]], tuple[list[Forced], list[Forced]]]:
    """compared(shape): what a model of that shape predicts here, and in llama.cpp from the float32 file written of
    it; with a scheme, its weights in few bits and q4_0 or q8_0."""

    def both(shape: dict[str, Any], scheme: Scheme | None = None) -> tuple[list[Forced], list[Forced]]:
        tokenizer = Tokenizer.train(["What is 3+4-2? 3足す4は7", "the quick brown fox"], 280)
        model = sharp(ModelConfig(**shape, vocab_size=tokenizer.vocab_size + 3))
        save_checkpoint(tmp_path, model, tokenizer)
        if scheme is not None:
            with Progress("rounded", 1) as progress:
                write_shards(tmp_path, tensors(open_weights(tmp_path), Fit(), scheme, None, progress))
            write_description(tmp_path, model.config.stored_as(scheme), tokenizer, "bfloat16", None)
            model = load_model(tmp_path)
        dtype = "float32" if scheme is None else None
        gguf_writer.write_gguf(tmp_path / "model.gguf", open_weights(tmp_path), tokenizer, dtype)
        prompts = torch.randint(
            7, tokenizer.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(1)
        ).tolist()
        asked = {
            "model": str(tmp_path / "model.gguf"),
            "prompts": prompts,
            "texts": [],
            "chats": [],
            "max_tokens": 1,
            "draft": False,
        }
        return teacher_forced(model, prompts), [Forced(**forced) for forced in peer("llama_cpp")(asked)["forced"]]

    return both


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(compared: Callable[..., tuple[list[Forced], list[Forced]]], shape: str) -> None:
    assert_same_predictions(*compared(SHAPES[shape]), SHAPE_BOUND, what=shape)


TEXTS = [
    "The quick brown fox's 12345 jumps, don't they? I'LL say: x=y; def f(n):\n    return n+1  # ok\n\n"
    "\n\tdone 3.14159e-10 $%^&*()",
    "3足す4は7、答えは5。 漢字かな交じり文と、カタカナ！",
    "Grüße aus Köln — naïve café; Привет, мир! שלום עולם مرحبا ١٢٣ नमस्ते",
    "🙂🙃👨‍👩‍👧 ½ ² Ⅷ \u00a0\u2003\u200b\r\n end",
]  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_every_pre_tokenizer(peer: Callable[[str], Peer], tmp_path: Path, name: str) -> None:
    """A vocabulary with merges across whatever the split leaves together has the same ids there."""
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=SPLITS[name].ignore_merges))
    backend.pre_tokenizer, backend.decoder = SPLITS[name].pre_tokenizer(), decoders.ByteLevel()
    if normalizer := SPLITS[name].normalizer():
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    tokenizer = Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})
    model = Transformer(ModelConfig(**DENSE, vocab_size=tokenizer.vocab_size))
    model.init_weights(torch.Generator().manual_seed(0))
    save_checkpoint(tmp_path, model, tokenizer)
    gguf_writer.write_gguf(tmp_path / "model.gguf", open_weights(tmp_path), tokenizer, "bfloat16")
    texts = [*TEXTS, *(part for text in TEXTS for part in text.split(" "))]
    asked = {
        "model": str(tmp_path / "model.gguf"),
        "prompts": [],
        "texts": texts,
        "chats": [],
        "max_tokens": 1,
        "draft": False,
    }
    for text, theirs in zip(texts, peer("llama_cpp")(asked)["texts"], strict=True):
        assert theirs == tokenizer.encode(text), text


def halved(key: str) -> Callable[[ModelConfig], dict[str, Any]]:
    keys = gguf_writer.write_keys
    return lambda config: {name: value / 2 if name == key else value for name, value in keys(config).items()}


def swapped(first: str, second: str) -> Callable[[str], tuple[str, int | None]]:
    place = gguf_writer.place

    def other(name: str) -> tuple[str, int | None]:
        tensor, expert = place(name)
        return tensor.replace(first, "?").replace(second, first).replace("?", second), expert

    return other


@pytest.mark.parametrize(
    ("shape", "function", "broken"),
    [
        ("llama", "_rows", partial(lambda rows, read, names, shape, _: rows(read, names, shape, 0), gguf_writer._rows)),
        ("llama", "llama3_factors", lambda config: torch.ones(config.head_dim // 2)),
        ("v3", "kv_b_parts", lambda name: (name.replace("kv_b", "v_b"), name.replace("kv_b", "k_b"))),
        ("v3", "place", swapped("ffn_gate_exps", "ffn_up_exps")),
        ("v3", "write_keys", halved("expert_weights_scale")),
        ("v3, YaRN as V2's, two shared experts, all groups", "write_keys", halved("rope.scaling.factor")),
        ("v3, YaRN as V2's, two shared experts, all groups", "write_keys", halved("rope.scaling.yarn_log_multiplier")),
        ("qwen2", "write_keys", halved("rope.scaling.factor")),
    ],
)
def test_a_broken_export_shows(
    compared: Callable[..., tuple[list[Forced], list[Forced]]],
    monkeypatch: pytest.MonkeyPatch,
    shape: str,
    function: str,
    broken: Any,
) -> None:
    monkeypatch.setattr(gguf_writer, function, broken)
    differences = deviations(*compared(SHAPES[shape]))
    print(f"{shape}, {function}: worst {max(differences):.2g}")
    assert max(differences) > 20 * SHAPE_BOUND


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_numbers_of_few_bits_and_their_order(
    compared: Callable[..., tuple[list[Forced], list[Forced]]], monkeypatch: pytest.MonkeyPatch, kind: SchemeKind
) -> None:
    """llama.cpp rounds activations to 8 bits before such a product; every mistake in order or shift does far more."""
    blocks, shape, medians = gguf_writer.blocks, SHAPES["llama"], {}
    for name, broken in {"unbroken": lambda *both: both, **BROKEN}.items():
        with monkeypatch.context() as patch:
            patch.setattr(gguf_writer, "blocks", lambda n, s, bits, do=broken: blocks(*do(n, s), bits))
            medians[name] = median(deviations(*compared(shape, Scheme(kind, 32))))
    print(kind, *(f"{name} {each:.2g}" for name, each in medians.items()))
    assert medians.pop("unbroken") < min(0.03, 0.5 * min(medians.values()))
