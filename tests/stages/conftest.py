"""What the stages' tests share: a task of short sums, and a base model pre-trained on it by the stage itself."""

import pytest

from slingshot.base.files import read_jsonl, write_jsonl
from slingshot.checkpoint.load_save import load_model, load_tokenizer
from slingshot.rollout.sampler import ScriptedSampler
from slingshot.stages import pretrain, quantize
from slingshot.stages.rl import RLConfig
from slingshot.stages.sft import SFTConfig

SUMS = {"name": "arithmetic", "params": {"min_terms": 2, "max_terms": 2, "operators": "+", "languages": ["en"]}}

MODEL = {
    "family": "deepseek_v3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 128, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip


@pytest.fixture(scope="session")
def sums():
    return SUMS


@pytest.fixture(scope="session")
def pretraining():
    """pretraining(**changes): a run of 30 steps, about two seconds."""
    documents = {"tasks": [SUMS], "count": 600, "styles": {"answer": 1.0, "steps": 1.0}, "template_share": 0.6}
    run = {
        "dtype": "float32", "threads": 1, "model": MODEL, "documents": documents, "vocab_size": 300, "steps": 30,
        "sequence_length": 48, "batch_size": 16, "micro_batch_size": 16, "optimizer": {"lr": 0.01, "adam_lr": 0.01},
    }  # fmt: skip
    return lambda **changes: pretrain.PretrainConfig.parse({**run, **changes}, "base")


@pytest.fixture(scope="session")
def base(pretraining, tmp_path_factory):
    """A model that has seen a few hundred sums, plain and in R1's template."""
    out = tmp_path_factory.mktemp("base") / "base"
    pretrain.run(pretraining(), out)
    return out


@pytest.fixture(scope="session")
def full(pretraining, tmp_path_factory):
    """A model all of whose rows are whole groups of 32."""
    widths = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "v_head_dim": 16}
    out = tmp_path_factory.mktemp("full") / "full"
    pretrain.run(pretraining(model=MODEL | widths), out)
    return out


@pytest.fixture(scope="session")
def stored(full, tmp_path_factory):
    """stored(kind): that model, quantised as it comes; made once of each kind."""
    folder = tmp_path_factory.mktemp("stored")

    def make(kind):
        if not (folder / kind).exists():
            config = {"model": str(full), "to": kind, "tasks": [SUMS], "calibrate": 0, "problems": 1, "threads": 1}
            quantize.run(quantize.QuantizeConfig.parse(config, "quantize"), folder / kind)
        return folder / kind

    return make


@pytest.fixture
def tuning(tmp_path):
    """tuning(model, **changes): adapters that learn sums, a step a batch of four rows: SFT's settings."""
    lines = [{"prompt": f"{a}+{b}=", "reasoning": "so", "answer": str(a + b)} for a in range(9) for b in range(9)]
    write_jsonl(tmp_path / "data.jsonl", lines)
    data = {"data": [str(tmp_path / "data.jsonl")], "dtype": "float32", "threads": 1, "sequence_length": 48}
    lora = {"rank": 4, "targets": ["attention", "mlp", "experts"]}
    sizes = {"batch_size": 4, "epochs": 2, "lora": lora, "optimizer": {"adam_lr": 0.01}}
    return lambda model, **changes: SFTConfig.parse({"model": str(model), **data, **sizes, **changes}, "sft")


@pytest.fixture
def training(base, sums):
    """training(**changes): two steps of 3 problems, 4 responses each, a coin for a reward: there is always a signal."""
    common = {"model": str(base), "tasks": [sums], "dtype": "float32", "threads": 1, "rewards": {"random": True}}
    sizes = {"steps": 2, "prompts_per_step": 3, "group_size": 4, "sequence_length": 48}
    tables = {"sampling": {"max_tokens": 12}, "optimizer": {"lr": 1e-3}}

    def config(**changes):
        given = {name: table | changes.pop(name, {}) for name, table in tables.items()}
        return RLConfig.parse({**common, **sizes, **given, **changes}, "rl")

    return config


@pytest.fixture(scope="session")
def metrics():
    """The metrics of an artifact, clocks left out."""
    clocks = {"seconds", "tokens_per_second", "mfu"}
    return lambda folder: [
        {key: value for key, value in row.items() if key not in clocks} for row in read_jsonl(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="session")
def saying(base):
    """saying(script): in the place of the base model, a sampler that says the script."""
    tokenizer, config = load_tokenizer(base), load_model(base).config
    return lambda script: ScriptedSampler(script, tokenizer, config)


@pytest.fixture
def troubled(tmp_path):
    """A task of 40 sums in a file: one prompt is far too long, one answer makes its verifier raise."""
    lines = [
        "def problems(split, seed):", "    for number in range(40):",
        "        prompt = f'What is {number}+1?' * (500 if number == 7 else 1)",
        "        yield {'prompt': prompt, 'key': f'{split}{number}', 'answer': str(number + 1)}",
        "def verify(problem, text):", "    if problem['answer'] in ('4', '5', '6'): raise ValueError('what a sum')",
        "    return text == problem['answer']",
    ]  # fmt: skip
    (tmp_path / "troubled.py").write_text("\n".join(lines))
    return {"name": str(tmp_path / "troubled.py")}
