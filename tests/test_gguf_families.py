"""Families that llama.cpp runs as graphs of their own: the file gives the logits of the folder, whatever was cut."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch
from torch import nn

import compressed
import tiny
import wrapped
from planish.errors import InputError
from planish.export.verify import verify
from planish.folder.source import open_source
from planish.modelling.families import FAMILIES
from planish.plan.graphs import GRAPHS, LLAMAS, refuse_family, refuse_rope

gguf = pytest.importorskip("gguf")
from planish.export.gguf import export_gguf  # noqa: E402

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp is absent: pip install 'planish[gguf]'"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*is loaded with eager attention")  # soft caps

DIFFER = "value dimensions and MLP widths per block"
DENSE = {  # tiny model of every dense family → what it has beside its usual settings
    "arcee": {}, "granite": {}, "seed_oss": {}, "gemma": {}, "gemma2": {}, "gemma3": {}, "hunyuan": {}, "olmo": {}, "olmo2": {},
    "olmo3": {}, "exaone4": {}, "stablelm": {}, "nemotron": {"head_dim": 8}, "starcoder2": {}, "gpt2": {}, "gpt_neox": {},
    "mpt": {}, "smollm3": {"no_rope_layers": [1, 1, 1, 0], "num_hidden_layers": 4}, "ernie4_5": {"use_bias": False},
    "glm4": {}, "cohere": {}, "cohere2": {}, "phi": {}, "apertus": {}, "falcon": {"bias": False}, "falcon_new": {},
    "falcon_new_shared": {}, "stablelm_parallel": {}, "gpt_neox_serial": {}, "ministral3": {},
}  # fmt: skip
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {}, "qwen3_moe": {"mlp_only_layers": []}, "qwen2_moe": {"mlp_only_layers": []}, "olmoe": {"num_key_value_heads": 4},
    "granitemoe": {}, "glm4_moe": {}, "minimax_m2": {}, "deepseek_v3": {},
    "gpt_oss": tiny._rope("yarn", factor=4.0, original_max_position_embeddings=16),
    "deepseek_v2": {"topk_method": "greedy", "n_group": None, "topk_group": None},
    "qwen3_next": {"linear_value_head_dim": 6, "mlp_only_layers": []}, "qwen3_5_moe": {"linear_value_head_dim": 6},
    "granite_hybrid": {"mamba_n_groups": 1},
    "nemotron_h_moe": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "llama4": {
        "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "moe_layers": [1, 3], "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1,
    },
}  # fmt: skip
HYBRIDS: dict[str, dict[str, Any]] = {  # dense feed-forwards, and mixers of other kinds
    "lfm2": {}, "qwen3_5": {"linear_value_head_dim": 6}, "granite_dense": {"mamba_n_groups": 1}, "falcon_h1": {}, "nemotron_h": {},
}  # fmt: skip


QUICK = ("granite", "gemma2", "olmo2", "gpt2", "glm4", "mixtral", "lfm2", "qwen3_5_moe", "qwen3_vl")


def quick(names: Any) -> list[Any]:
    """The names, slow tests all but one of each kind."""
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


def build(name: str) -> nn.Module:
    return tiny.build(name, **(DENSE | MIXTURES | HYBRIDS)[name])


def check(folder) -> None:
    found = verify(folder, "gguf", prompt_len=20, new_tokens=4)
    assert found.passed and found.greedy_equal == found.greedy_tokens, found
    close = 1e-3 if found.tolerance > 1e-3 else 1e-5  # GELU is looked up in a table of half-precision numbers
    assert found.max_logit_difference < close * found.max_logit


def test_every_graph_is_tried_here():
    kinds = {tiny.configure(n).model_type for n in (*DENSE, *MIXTURES, *HYBRIDS, "gemma4")}
    kinds |= {wrapped.build(n).config.text_config.model_type for n in VISION}
    assert kinds == set(GRAPHS) and not kinds & set(LLAMAS) and kinds <= set(FAMILIES)


@needs_llama_cpp
@pytest.mark.parametrize("name", quick(DENSE))
def test_llama_cpp_gives_the_logits_of_what_was_cut_differently_in_every_block(name, tmp_path):
    check(compressed.make_folder(build(name), tmp_path / "m", compressed.FORMS[DIFFER]))


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("form", ["dense", "low-rank pairs", "MLP removed", "blocks removed"])
def test_llama_cpp_gives_the_logits_of_every_form(name, form, tmp_path):
    check(compressed.make_folder(build(name), tmp_path / "m", compressed.FORMS[form]))


@needs_llama_cpp
@pytest.mark.parametrize("name", quick([*HYBRIDS, "qwen3_next", "qwen3_5_moe", "granite_hybrid", "nemotron_h_moe"]))
def test_llama_cpp_gives_the_logits_of_a_hybrid(name, tmp_path):
    """Also of linears of low rank in attention, mixers and feed-forwards, which are multiplied back."""
    windows = tiny.windows(8, 12)
    check(tiny.save(build(name), tmp_path / "dense"))
    tiny.compress(build(name), output=tmp_path / "m", windows=windows, method="svd-llm", keep=0.8)
    specs = json.loads((tmp_path / "m" / "config.json").read_text())["planish"]["blocks"]
    assert any(role.startswith("mixer.") for spec in specs for role in spec.get("linears", {}))
    check(tmp_path / "m")


@needs_llama_cpp
@pytest.mark.parametrize("name", quick(["lfm2", "nemotron_h"]))
def test_feed_forwards_of_hybrids_may_differ_in_width(name, tmp_path):
    """Filled up where the graph has one width, or each as wide as it is."""
    settings = {"parts": "mlp"}
    tiny.compress(
        build(name), output=tmp_path / "m", windows=tiny.windows(8, 12), method="a3", keep=0.8, settings=settings
    )
    check(tmp_path / "m")
    written = export_gguf(tmp_path / "m", tmp_path / "m.gguf", dtype="f32")
    assert written.parameters == written.stored_parameters or name == "lfm2", written.notes


VISION = ("qwen3_vl",)  # whose language model is found in wrappers alone


@needs_llama_cpp
@pytest.mark.parametrize("name", quick([*VISION, "qwen3_5", "llama4"]))
def test_a_language_model_inside_a_wrapper(name, tmp_path):
    """Its sections of rotary pairs have one position in text."""
    text = wrapped._ROWS[name][1]["text_config"] | HYBRIDS.get(name, {}) | MIXTURES.get(name, {})
    forms = [compressed.neurons(24), None] if name in VISION else [None]
    check(compressed.make_folder(wrapped.build(name, text_config=text), tmp_path / "m", forms))


SIZED = [compressed.neurons(30), compressed.neurons(20), compressed.neurons(60), compressed.low_rank("pair", 9)]


@needs_llama_cpp
@pytest.mark.parametrize("forms", [[None], SIZED], ids=["stock", "cut"])
def test_llama_cpp_gives_the_logits_of_gemma4(forms, tmp_path, monkeypatch):
    """Blocks that read others' keys, two head sizes, a width of every feed-forward. GELU as llama.cpp has it, from a table of
    half-precision numbers; then only those inputs differ that lie on the border of two of these."""
    exact = nn.functional.gelu

    def tabled(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
        y = exact(x.half().float(), approximate="tanh").half().float()
        return torch.where(x >= 10, x, torch.where(x <= -10, 0.0, y))

    folder = compressed.make_folder(tiny.build("gemma4"), tmp_path / "m", forms)
    monkeypatch.setattr(nn.functional, "gelu", tabled)
    found = verify(folder, "gguf", prompt_len=20, new_tokens=4)
    assert found.max_logit_difference < 3e-4 * found.max_logit and found.greedy_equal == found.greedy_tokens
    monkeypatch.undo()
    assert verify(folder, "gguf", prompt_len=20, new_tokens=4).max_logit_difference < 4e-3 * found.max_logit


@needs_llama_cpp
@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_llama_cpp_gives_the_logits_of_a_mixture(name, tmp_path):
    check(tiny.save(build(name), tmp_path / "m"))


@needs_llama_cpp
@pytest.mark.parametrize("name", quick(MIXTURES))
def test_llama_cpp_gives_the_logits_of_a_mixture_with_fewer_experts(name, tmp_path):
    windows = tiny.windows(4, 8)
    result = tiny.compress(build(name), output=tmp_path / "m", windows=windows, method="reap", keep=0.85, target="gguf")
    assert result.format == "native"
    check(tmp_path / "m")
    written = export_gguf(tmp_path / "m", tmp_path / "m.gguf", dtype="f32")
    latent = "deepseek" in name
    assert written.parameters == written.stored_parameters or latent, written.notes
    kept = tiny.load(tmp_path / "m").config
    count = getattr(kept, FAMILIES[kept.model_type].experts.count)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {k.partition(".")[2]: f.contents() for k, f in reader.fields.items()}
    assert fields["expert_count"] == count < 8 and fields["expert_used_count"] == kept.num_experts_per_tok
    stacks = [t for t in reader.tensors if "_exps" in t.name]
    assert stacks and all(int(t.shape[-1]) == count for t in stacks)


@needs_llama_cpp
@pytest.mark.parametrize("method", ["a3", pytest.param("flat-llm", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", quick(["glm4_moe", "minimax_m2"]))
def test_attention_and_neurons_of_experts_may_be_cut(name, method, tmp_path):
    tiny.compress(build(name), output=tmp_path / "m", windows=tiny.windows(8, 12), method=method, keep=0.8)
    check(tmp_path / "m")


def test_experts_in_rounded_types_are_those_of_each_matrix(tmp_path):
    """A stack's bytes are its experts' bytes one after the other, as the gguf library rounds them."""
    model = tiny.build("mixtral", hidden_size=64, intermediate_size=32)
    model.save_pretrained(tmp_path / "m")
    written = export_gguf(tmp_path / "m", tmp_path / "m.gguf", dtype="q8_0")
    assert written.dtype == "q8_0"
    stored = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    experts = model.model.layers[1].mlp.experts
    for name, weight in (("up", experts.gate_up_proj[:, 32:]), ("down", experts.down_proj)):
        stack = stored[f"blk.1.ffn_{name}_exps.weight"]
        assert stack.tensor_type == gguf.GGMLQuantizationType.Q8_0
        for found, matrix in zip(stack.data, weight.detach(), strict=True):
            assert (found == gguf.quantize(matrix.numpy(), gguf.GGMLQuantizationType.Q8_0)).all()
    router = stored["blk.1.ffn_gate_inp.weight"]
    assert router.tensor_type == gguf.GGMLQuantizationType.F32


def test_one_expert_at_a_time_is_in_memory(tmp_path, monkeypatch):
    """While a stack is written, no tensor that is read is larger than one expert's linear."""
    tiny.build("granitemoe").save_pretrained(tmp_path / "m")
    from planish.folder.model_folder import ModelFolder

    read, real = [], ModelFolder.tensor
    monkeypatch.setattr(ModelFolder, "tensor", lambda self, name: read.append((name, t := real(self, name))) or t)
    export_gguf(tmp_path / "m", tmp_path / "m.gguf", dtype="f32")
    experts = [t for name, t in read if ".experts." in name]
    assert len(experts) == 2 * 8 * 3 and all(t.shape in ((12, 32), (32, 12)) for t in experts)


def test_shared_experts_stay_as_wide_as_they_were(tmp_path):
    """Where their width is a multiple of an expert's, narrower experts are more of them, or the folder keeps its own format."""
    model = build("deepseek_v3")
    settings = {"parts": "mlp"}
    tiny.compress(model, output=tmp_path / "m", windows=tiny.windows(8, 12), method="a3", keep=0.8, settings=settings)
    block, loaded = model.model.layers[1].mlp, tiny.load(tmp_path / "m").model.layers[1].mlp
    assert loaded.shared_experts.up_proj.out_features == block.shared_experts.up_proj.out_features
    assert loaded.experts.linears(0)[0].out_features < block.experts.intermediate_dim


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("opt", {}, "llama.cpp has no graph of opt"),
        ("phimoe", {}, "GGUF export does not write phimoe: llama.cpp's graph routes by a plain softmax"),
        ("granite", {"hidden_act": "gelu"}, "GGUF export of granite needs the activation silu, got 'gelu'"),
        ("qwen3_moe", {}, r"graph of qwen3_moe has mlp_only_layers=\[\] built in, config.json says \[1\]"),
        ("deepseek_v2", {}, "graph of deepseek_v2 has topk_method='greedy' built in"),
        ("falcon", {}, "graph of falcon has bias=False built in, config.json says True"),
        ("smollm3", {}, "graph smollm3 rotates all blocks but every 4th; block 1 does otherwise"),
        ("exaone4_windows", {}, "graph of exaone4 has sliding_window=None built in"),
        ("cohere_norms", {}, "graph of cohere has use_qk_norm=False built in, config.json says True"),
        ("phi_norms", {}, "graph of phi has qk_layernorm=False built in"),
        ("stablelm_norms", {}, "graph of stablelm has qk_layernorm=False built in"),
        ("olmoe", {}, "graph of olmoe needs as many key/value heads as heads, got 2 for 4"),
        ("gpt_oss", {}, "llama.cpp rounds the ends of YaRN's ramp, and .* rope_parameters.truncate=false"),
        (
            "gpt_oss",
            {"layer_types": ["full_attention", "sliding_attention"]} | MIXTURES["gpt_oss"],
            "graph gpt-oss has windows in all blocks but every 2th; block 0 does otherwise",
        ),
        ("granite_hybrid", {}, "graph of granitemoehybrid has mamba_n_groups=1 built in, config.json says 2"),
        ("falcon_h1", {"mamba_rms_norm": True}, "multiplies what a mixer gives by its gate before the norm"),
        (
            "qwen3_5",
            {},
            "graph of qwen3_5_text has keys and values of one size in delta nets, config.json says 6 and 5",
        ),
        ("llama4", {}, "graph of llama4_text has attention_chunk_size=8192 built in, config.json says 8"),
        ("nemotron_h_moe", {}, "graph of nemotron_h has no dense feed-forward in a model with experts"),
        (
            "gemma4",
            {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8},
            "graph of gemma4_text is written without experts beside its feed-forward",
        ),
        (
            "gemma4",
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
            "graph of gemma4_text takes shared keys from the last two blocks that have their own",
        ),
        (
            "llama4",
            MIXTURES["llama4"] | {"moe_layers": [0, 1]},
            r"graph of llama4_text has experts in every 2th block.* config.json lists \[0, 1\]",
        ),
        ("nemotron", {}, "graph of nemotron needs heads × head size = hidden size, got 4 × 12 for 32"),
    ],
)
def test_what_a_graph_does_not_run_is_refused(name, settings, message, tmp_path):
    tiny.build(name, **settings).save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match=message):
        export_gguf(tmp_path / "m", tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


@needs_llama_cpp
@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("granite", {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ("seed_oss", {"rope_type": "yarn", "factor": 4.0}),
        ("olmo2", {"rope_type": "linear", "factor": 4.0}),
        ("deepseek_v3", {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7}),
    ],
)
def test_scaled_rotations_are_written(name, rope, tmp_path):
    original = {} if rope["rope_type"] == "linear" else {"original_max_position_embeddings": 16}
    model = tiny.build(name, rope_parameters={"rope_theta": 10000.0, **rope, **original})
    model.save_pretrained(tmp_path / "m")
    check(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("seed_oss", {"rope_type": "llama3"}),
        ("granite", {"rope_type": "dynamic"}),
        ("olmo2", {"rope_type": "yarn", "mscale": 2.0}),
    ],
)
def test_other_rotations_are_refused(name, rope):
    config = tiny.configure(name)
    assert refuse_rope(config.model_type, config) is None
    config.rope_parameters = {"rope_theta": 1e4, "factor": 4.0, **rope}
    assert "is not written to GGUF" in str(refuse_rope(config.model_type, config))
    assert refuse_family(config.model_type, config) is None


def test_a_graph_can_be_named_but_not_another(tmp_path):
    build("granite").save_pretrained(tmp_path / "m")
    assert export_gguf(tmp_path / "m", tmp_path / "m.gguf", architecture="granite").architecture == "granite"
    with pytest.raises(InputError, match="granite can be written as granite; got 'llama'"):
        export_gguf(tmp_path / "m", tmp_path / "m.gguf", architecture="llama")


def test_blocks_of_which_nothing_is_left_can_be_read(tmp_path):
    """A block without norms of its own inputs keeps no tensor at all when both of its parts go."""
    folder = compressed.make_folder(build("olmo2"), tmp_path / "m", compressed.FORMS["blocks removed"])
    ids = tiny.windows(1, 12)
    assert torch.isfinite(tiny.load(folder)(ids).logits).all()
    assert open_source(build("olmo2")).n_blocks == 2
