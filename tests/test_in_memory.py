"""Models in memory are checked as folders are: wrong ones are refused in one line that says what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import planish
import tiny
from planish.errors import InputError
from planish.folder.source import open_source
from tiny import compress

IDS = tiny.windows(16, 24)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS[:4]).logits


def shorter(family: str = "llama_gqa") -> nn.Module:
    model = tiny.build(family)
    model.model.layers = model.model.layers[:2]
    return model


def longer() -> nn.Module:
    model = tiny.build("llama_gqa")
    model.model.layers.append(tiny.build("llama_gqa").model.layers[0])
    return model


def offloaded() -> nn.Module:
    model = tiny.build("llama_gqa")
    model.model.layers[1].to("meta")
    return model


def never_loaded() -> nn.Module:
    with torch.device("meta"):
        return tiny.configure("llama_gqa") and AutoModelForCausalLM.from_config(tiny.configure("llama_gqa"))


class Integers(torch.Tensor):
    """What libraries for quantisation put in place of a weight."""


def quantised_tensors() -> nn.Module:
    model = tiny.build("llama_gqa")
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Integers), requires_grad=False)
    return model


def dynamic() -> nn.Module:
    with pytest.warns(DeprecationWarning, match="torch.ao.quantization"):
        return torch.ao.quantization.quantize_dynamic(tiny.build("llama_gqa"), {nn.Linear}, torch.qint8)


def integers() -> nn.Module:
    model = tiny.build("llama_gqa")
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    return model


class Lora(nn.Module):
    """A linear as peft wraps it."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = (nn.ModuleDict({"default": nn.Linear(2, 2)}) for _ in range(2))


def adapter() -> nn.Module:
    model = tiny.build("llama_gqa")
    model.model.layers[0].self_attn.q_proj = Lora(model.model.layers[0].self_attn.q_proj)
    return model


def loaded_adapter() -> nn.Module:
    model = adapter()
    model._hf_peft_config_loaded = True
    return model


def wider() -> nn.Module:
    """A weight cut by hand: the configuration is another's."""
    model = tiny.build("llama_gqa")
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 40, bias=False)
    return model


def biased() -> nn.Module:
    model = tiny.build("llama_gqa")
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 44, bias=True)
    return model


def base_model() -> nn.Module:
    return AutoModel.from_config(tiny.configure("llama_gqa"))


def classifier() -> nn.Module:
    return AutoModelForSequenceClassification.from_config(tiny.configure("llama_gqa"))


def other_family() -> nn.Module:
    import transformers

    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=44)
    return transformers.BertModel(config)


WRONG = {
    "shorter": (shorter, "has 2 blocks, its configuration says 3: set model.config.num_hidden_layers = 2"),
    "shorter with kinds": (lambda: shorter("qwen3"), "num_hidden_layers = 2 and leave as many in model.config.layer_types"),
    "longer": (longer, "has 4 blocks, its configuration says 3"),
    "offloaded": (offloaded, "meta device.*load it without offload, or give the folder"),
    "never loaded": (never_loaded, "meta device.*load it without offload, or give the folder"),
    "quantised tensors": (quantised_tensors, "is a .*: quantised or sharded .*give the original model"),
    "dynamic int8": (dynamic, "the checkpoint is quantised"),
    "int8": (integers, "stored as I8.*quantised"),
    "adapter": (adapter, "part of an adapter: merge it first"),
    "loaded adapter": (loaded_adapter, "carries an adapter: merge it"),
    "wider": (wider, r"layers.1.mlp.up_proj.weight in the model in memory has shape \(40, 32\), expected \(44, 32\)"),
    "biased": (biased, "unexpected tensor model.layers.1.mlp.up_proj.bias"),
    "base model": (base_model, "is a LlamaModel, not a causal language model: load it as LlamaForCausalLM"),
    "classifier": (classifier, "is a LlamaForSequenceClassification, not a causal language model"),
    "family": (other_family, "'bert' is not supported"),
    "linear": (lambda: nn.Linear(4, 4), "is a Linear, not a causal language model"),
    "parallel": (lambda: nn.DataParallel(tiny.build("llama_gqa")), "wrapped .DataParallel.: give its .module"),
    "compiled": (lambda: torch.compile(tiny.build("llama_gqa")), "wrapped .OptimizedModule.: give the model before torch.compile"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated", "ignore:.*torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_is_no_plain_causal_model_is_refused(name, tmp_path):
    build, words = WRONG[name]
    model = build()
    for use in (
        lambda: planish.compress(model, keep=0.7, method="svd", calibration=IDS.flatten(), output=tmp_path / "out"),
        lambda: planish.forecast(model, keep=0.7, method="svd", calibration=IDS.flatten()),
    ):
        with pytest.raises(InputError, match=words) as caught:
            use()
        assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_peft_models(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(tiny.build("llama_gqa"), lora)
    with pytest.raises(InputError, match="carries an adapter: merge it"):
        compress(model, output=tmp_path / "out", keep=1.0, windows=IDS)
    expected = logits(model)
    compress(model.merge_and_unload(), output=tmp_path / "out", keep=1.0, windows=IDS)
    torch.testing.assert_close(logits(planish.load(tmp_path / "out")), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("change", ["scaled", "cast", "same"])
@torch.no_grad()
def test_a_head_that_is_no_longer_tied_stays_so(change, tmp_path):
    """The flag still says tied; with the same numbers in it the head is stored once."""
    model = tiny.build("llama_tied")
    head = model.lm_head.weight.detach().clone()
    model.lm_head.weight = nn.Parameter({"scaled": 2 * head, "cast": head.double(), "same": head}[change])
    source = open_source(model)
    assert source.config.tie_word_embeddings == (change == "same") and model.config.tie_word_embeddings
    if change == "cast":
        return  # a model of two types runs nowhere
    assert sum(n.endswith(("lm_head.weight", "embed_tokens.weight")) for n in source.outside()) == (
        1 if change == "same" else 2
    )
    assert source.sizes().keys() >= source.outside().keys()
    small = planish.compress(model, keep=1.0, method="flat-llm", calibration=IDS.flatten(), seq_len=24)
    assert torch.equal(logits(small), logits(model))
    compress(tiny.save(model, tmp_path / "m"), output=tmp_path / "out", keep=1.0, windows=IDS)
    assert torch.equal(logits(planish.load(tmp_path / "out")), logits(model))


def test_within_inference_mode():
    """Methods that differentiate do so there too, and the mode is back afterwards; loaded there, a model's weights are such."""
    how = {"keep": 0.7, "method": "auto", "calibration": IDS.flatten(), "seq_len": 24, "n_samples": 8}
    expected = planish.compress(tiny.build("llama_mha"), **how)
    with torch.inference_mode():
        made = planish.compress(tiny.build("llama_mha"), **how)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(logits(made), logits(expected))


@torch.no_grad()
def test_subclasses_and_models_with_more_are_read(tmp_path):
    """A class of one's own, a hook, a training mode, gradients: none of it matters, and none of it is changed."""

    class Own(type(tiny.build("llama_mha"))):
        pass

    model = tiny.build("llama_mha").train()
    model.__class__ = Own
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    compress(model, output=tmp_path / "a", keep=0.8, windows=IDS)
    compress(tiny.build("llama_mha"), output=tmp_path / "b", keep=0.8, windows=IDS)
    assert model.training and not calls and all(p.requires_grad for p in model.parameters())
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
