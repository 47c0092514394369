"""Several adapters over one base: every row says what the model with its adapter merged would say."""

import pytest
import torch

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.adapter import write_adapter
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams
from slingshot.model.transformer import Transformer
from slingshot.training.lora import LoRAConfig, adapters, add_lora, merged, twin
from slingshot.training.parallel import Parallel

PROMPTS = ["What is 3+4-2?", "3+4-2はいくつ?", "The end. Stop here, then go on until the end.", "3 plus 4"]
CHOSEN = [None, "sums", "poems", "sums"]
PARAMS = SamplingParams(max_tokens=12, temperature=0.8, seed=1, ignore_eos=True, prompt_logprobs=0)
TARGETS = {"sums": ["attention", "mlp"], "poems": ["o_proj"]}


@pytest.fixture(scope="module")
def adapted(model, tmp_path_factory):
    """Folders of two adapters by name, and the models with one of them merged, by name; the base is None."""
    folders, models = {}, {None: model}
    for seed, (name, targets) in enumerate(TARGETS.items()):
        changed, generator = twin(model), torch.Generator().manual_seed(seed)
        config = LoRAConfig(rank=4, targets=targets, alpha=8)
        add_lora(changed, config, seed, Parallel())
        for tensor, values in adapters(changed).items():
            if tensor.endswith("lora_B"):
                values.normal_(0, 0.2, generator=generator)
        folder = folders[name] = tmp_path_factory.mktemp(name)
        write_adapter(folder, adapters(changed), 4, 8, "the model")
        models[name] = Transformer.empty(model.config)
        models[name].load_state_dict(dict(merged(changed)))
    return folders, models


def alone(models, tokenizer, prompts, chosen):
    """What each prompt's own model says of it, alone."""
    engines = {name: Engine(each, tokenizer, native="off") for name, each in models.items()}
    return [engines[name].generate(prompt, PARAMS)[0] for prompt, name in zip(prompts, chosen, strict=True)]


@pytest.mark.parametrize("native", ["off", "auto"])
def test_every_row_is_its_merged_model_s(model, tokenizer, adapted, native):
    folders, models = adapted
    engine = Engine(model, tokenizer, native=native, adapters=folders, step_tokens=16)
    found = engine.generate(PROMPTS, PARAMS, adapters=CHOSEN)
    for own, expected in zip(found, alone(models, tokenizer, PROMPTS, CHOSEN), strict=True):
        assert own.outputs[0].token_ids == expected.outputs[0].token_ids
        assert own.outputs[0].logprobs == pytest.approx(expected.outputs[0].logprobs, abs=2e-4)
        assert own.prompt_logprobs[1:] == pytest.approx(expected.prompt_logprobs[1:], abs=2e-4)


def test_adapters_differ_and_share_nothing_that_is_cached(model, tokenizer, adapted):
    folders, models = adapted
    engine, long = Engine(model, tokenizer, adapters=folders), "What is 3+4-2? " * 4
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    names = [None, "sums", "poems"] * 2
    said = [engine.generate(long, params, adapters=name)[0].outputs[0].token_ids for name in names]
    assert said[:3] == said[3:] and said[1] != said[0] != said[2] != said[1]
    assert 0 < engine.counters.cached < 3 * len(tokenizer.encode_raw(long))  # only by one's own second request
    apart = [Engine(models[name], tokenizer).generate(long, params)[0].outputs[0].token_ids for name in names[:3]]
    assert said[:3] == apart


def test_a_salt_never_leads_into_an_adapter_s_cache(model, tokenizer, adapted):
    engine, long = Engine(model, tokenizer, adapters=adapted[0]), tokenizer.encode_raw("What is 3+4-2? " * 4)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    engine.generate([long], params, adapters="sums")
    for salt in ("", "1", "1|", "|", "\0"):
        request = engine.submit(long, params, salt=salt)
        while request.result is None:
            engine.advance()
        assert request.cached == 0


def test_a_row_does_not_depend_on_its_neighbours_adapters(model, tokenizer, adapted):
    engine = Engine(model, tokenizer, adapters=adapted[0])
    together = engine.generate(PROMPTS, PARAMS, adapters=CHOSEN)
    for prompt, name, before in zip(PROMPTS, CHOSEN, together, strict=True):
        (again,) = engine.generate(prompt, PARAMS, adapters=name)
        assert again.outputs[0].token_ids == before.outputs[0].token_ids


def test_new_weights_of_the_base_are_every_adapter_s(model, tokenizer, adapted):
    folders, _ = adapted
    engine = Engine(twin(model), tokenizer, dtype=torch.float32, adapters=folders)
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    before = engine.generate("3+4", params, adapters="sums")[0].outputs[0].logprobs
    engine.update_weights({name: 1.1 * tensor for name, tensor in model.state_dict().items()}, version=1)
    assert engine.generate("3+4", params, adapters="sums")[0].outputs[0].logprobs != pytest.approx(before, abs=1e-3)


def test_speculation_keeps_what_an_adapter_says(guesser, tokenizer, tmp_path):
    changed = twin(guesser)
    add_lora(changed, LoRAConfig(rank=4), 0, Parallel())
    for tensor, values in adapters(changed).items():
        if tensor.endswith("lora_B"):
            values.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    write_adapter(tmp_path, adapters(changed), 4, 32, "the model")
    params, said = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True), []
    for speculation in ("off", "on"):
        engine = Engine(guesser, tokenizer, speculation=speculation, native="off", adapters={"it": tmp_path})
        found = engine.generate(PROMPTS[:2], params, adapters=["it", None])
        said.append([each.outputs[0].token_ids for each in found])
    assert said[0] == said[1] and engine.counters.drafted


def test_what_it_does_not_have_is_refused_by_name(model, tokenizer, adapted, tmp_path):
    engine = Engine(model, tokenizer, adapters=adapted[0])
    with pytest.raises(SlingshotError, match="adapter 'prose': this engine has sums, poems"):
        engine.add("3+4", adapter="prose")
    with pytest.raises(SlingshotError, match="1 prompts, 1 params, 1 keys and 2 adapters: give one each"):
        engine.generate(["3+4"], adapters=["sums", "poems"])
    with pytest.raises(SlingshotError, match="adapter 'sums': this engine has none"):
        Engine(model, tokenizer).add("3+4", adapter="sums")
    if model.config.n_moe_layers:
        changed = twin(model)
        add_lora(changed, LoRAConfig(rank=4, targets=["experts"]), 0, Parallel())
        write_adapter(tmp_path, adapters(changed), 4, 8, "the model")
        says = r"experts\.0\..*_proj is not changed request by request; slingshot convert .* OUT merges it"
        with pytest.raises(SlingshotError, match=says):
            Engine(model, tokenizer, adapters={"experts": tmp_path})
