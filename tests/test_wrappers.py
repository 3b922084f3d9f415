"""Language models inside vision-language models: they are compressed, and all around them stays as it is."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import compressed
import planish
import tiny
import wrapped
from planish.core import Edit, Shape, Weights
from planish.errors import InputError
from planish.folder.config import read_config
from planish.modelling.modelling import find_classes
from planish.modelling.wrappers import WRAPPERS, find_language_model

WINDOWS = tiny.windows()


def some(*quick: str, names: tuple[str, ...] = wrapped.NAMES):
    """All wrappers; these where slow tests are not run."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


ALL = wrapped.NAMES + wrapped.HYBRIDS


PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """name → a model's folder, as transformers saves it, with a processor's files."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tiny.save(wrapped.build(name), tmp_path_factory.mktemp(name) / "dense")
            for file in PROCESSOR:
                (made[name] / file).write_text(json.dumps({"of": name, "file": file}))
        return made[name]

    return make


def near(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return float((a - b).abs().max()) < tolerance * max(float(b.abs().max()), 1.0)


@torch.no_grad()
def read_text(model: nn.Module) -> Tensor:
    return model(input_ids=WINDOWS[:3], use_cache=False).logits


@torch.no_grad()
def write_on(model: nn.Module, inputs: dict[str, Tensor], count: int) -> Tensor:
    """The likeliest tokens one by one, no images among them, without a cache."""
    inputs = dict(inputs)
    for _ in range(count):
        logits = model(**inputs, use_cache=False).logits[:, -1]
        logits[:, [wrapped.IMAGE, 91]] = -torch.inf
        inputs["input_ids"] = torch.cat([inputs["input_ids"], logits.argmax(-1, keepdim=True)], 1)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in inputs:
                inputs[name] = torch.nn.functional.pad(inputs[name], (0, 1))
    return inputs["input_ids"]


def own_attention(shape: Shape, w: Weights, g: torch.Generator) -> list[Edit]:
    """The stock attention in the form of a compressed one: all value dimensions, and all rotary pairs in another order."""
    if shape.qk_norm:
        return [Edit("attention", {"kind": "own", "qk": shape.qk, "v": shape.v}, {})]
    half = shape.rotary // 2
    pairs = torch.stack([torch.randperm(half, generator=g) for _ in range(shape.kv_heads)])
    edits = []
    for role, heads in (("q", shape.heads), ("k", shape.kv_heads)):
        at = torch.cat([pairs, pairs + half], 1).repeat_interleave(heads // shape.kv_heads, 0)
        rows = (at + shape.qk * torch.arange(heads)[:, None]).flatten()
        tensors = {n: w[s][rows] for n, s in (("weight", role), ("bias", f"{role}.bias")) if s in w}
        edits.append(Edit(role, {"kind": "dense", "out": len(rows), "in": shape.hidden}, tensors))
    form = {"kind": "own", "qk": shape.qk, "v": shape.v, "pairs": half}
    return [*edits, Edit("attention", form, {"pairs": pairs.int()})]


@pytest.mark.parametrize("name", some("gemma3", "qwen2_5_vl"))
def test_attention_of_full_rank_sees_what_the_stock_one_sees(name, tmp_path):
    """With an image in the text, whose tokens have other positions in time, height and width (qwen's), see each other (gemma's)
    and are added to behind the first blocks (qwen3's)."""
    model = wrapped.build(name)
    again = planish.load(compressed.make_folder(model, tmp_path / "out", [own_attention, None]))
    assert type(again).__name__.startswith("Planish") and isinstance(again, type(model))
    assert near(wrapped.see(again, name), wrapped.see(model, name))
    assert near(read_text(again), read_text(model))


@pytest.mark.parametrize("name", some("mistral3", names=ALL))
def test_keep_one_is_the_model_as_it_was(name, dense, tmp_path):
    """Tensor for tensor; and for a text the language model alone gives the same."""
    folder = dense(name)
    result = tiny.compress(folder, output=tmp_path / "out", windows=WINDOWS, method="a3", keep=1.0)
    assert result.format == "native" and result.params_after == result.params_before
    before, after = wrapped.read(folder), wrapped.read(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(after[n], before[n]) for n in before)
    model = planish.load(tmp_path / "out")
    text = model.config.text_config
    alone = find_classes(text.model_type)[2](text).eval()
    alone.model.load_state_dict(find_language_model(model).state_dict())
    alone.lm_head.load_state_dict(model.get_output_embeddings().state_dict())
    assert near(read_text(alone), read_text(model), 1e-6)


@pytest.mark.parametrize("name", some("qwen3_vl", names=ALL))
def test_what_is_around_the_language_model_is_copied_bit_for_bit(name, dense, tmp_path):
    folder, out = dense(name), tmp_path / "out"
    result = tiny.compress(folder, output=out, windows=WINDOWS, method="flat-llm", keep=0.7)
    before, after = wrapped.read(folder), wrapped.read(out)
    around = {n for n in before if "vision" in n or "visual" in n or "projector" in n}
    assert around and around <= after.keys()
    assert all(torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8)) for n in around)
    assert sum(result.untouched.values()) == sum(before[n].nbytes for n in around)
    assert all((out / f).read_bytes() == (folder / f).read_bytes() for f in PROCESSOR)
    was, now = (json.loads((f / "config.json").read_text()) for f in (folder, out))
    assert now["vision_config"] == was["vision_config"] and now["model_type"] == f"planish1_{was['model_type']}"
    model = wrapped.build(name)
    kept = sum(p.numel() for p in model.state_dict(keep_vars=True).values())
    kept -= model.get_output_embeddings().weight.numel() * bool(model.config.tie_word_embeddings)
    assert result.params_before == kept and result.bytes_after == sum(
        p.stat().st_size for p in out.glob("*.safetensors")
    )
    assert wrapped.see(planish.load(out), name).isfinite().all()


@pytest.mark.parametrize("name", some("qwen3_vl"))
def test_removed_blocks_add_nothing(name, dense, tmp_path):
    """And what qwen3 adds behind the first blocks is still added there."""
    result = tiny.compress(
        dense(name), output=tmp_path / "out", windows=WINDOWS, method="shortgpt", settings={"sparsity": 0.6}
    )
    gone = result.submodules["attention"]["blocks"]
    model, small = wrapped.build(name), planish.load(tmp_path / "out")
    pinned = 2 if name == "qwen3_vl" else 0
    assert len(find_language_model(small).layers) == 3 - sum(i >= pinned for i in gone) and len(gone) == 2
    assert (result.format == "native") == (not pinned)
    with torch.no_grad():
        for i in gone:
            block = find_language_model(model).layers[i]
            block.self_attn.o_proj.weight.zero_(), block.mlp.down_proj.weight.zero_()
    assert near(wrapped.see(small, name), wrapped.see(model, name))
    assert near(read_text(small), read_text(model))


def test_an_empty_block_has_no_file(tmp_path):
    """The first of qwen3's may be one: what is read off names of blocks is read off the others."""
    gone = compressed.both(compressed.bypass("attention", raw=True), compressed.bypass("mlp", raw=True))
    model = wrapped.build("qwen3_vl")
    out = compressed.make_folder(model, tmp_path / "out", [gone, None, None])
    assert not any(".layers.0." in n for n in wrapped.read(out) if "language_model" in n)
    with torch.no_grad():
        block = find_language_model(model).layers[0]
        block.self_attn.o_proj.weight.zero_(), block.mlp.down_proj.weight.zero_()
    assert near(wrapped.see(planish.load(out), "qwen3_vl"), wrapped.see(model, "qwen3_vl"))


@pytest.mark.parametrize("name", some("gemma3", names=ALL))
def test_names_of_checkpoints_old_and_new(name, dense, tmp_path):
    """Both are read as transformers reads them, and written as they were."""
    model = wrapped.build(name)
    renamed = wrapped.rename(model, tmp_path / "renamed")
    outputs = []
    for n, folder in enumerate((dense(name), renamed)):
        tiny.compress(folder, output=tmp_path / str(n), windows=WINDOWS, method="flat-llm", keep=0.7)
        outputs.append(planish.load(tmp_path / str(n)))
        stems = [{".".join(k.split(".")[:2]) for k in wrapped.read(f)} for f in (folder, tmp_path / str(n))]
        assert stems[0] == stems[1]
    same = name in ("qwen3_vl", "qwen3_5", "llama4")  # of qwen3_5_moe modules stack experts
    assert (wrapped.read(dense(name)).keys() == wrapped.read(renamed).keys()) == same
    assert torch.equal(*(wrapped.see(m, name) for m in outputs))


def test_rows_are_what_transformers_has():
    """Every wrapper's classes, where its language model is, and which Auto classes know it."""
    for kind, row in WRAPPERS.items():
        config, _, lm = (getattr(transformers, n) for n in row.classes)
        assert config.model_type == kind and "text_config" in config.sub_configs
        assert AutoModelForImageTextToText._model_mapping[config] is lm
        assert row.causal == (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) == row.classes[2])
    assert {wrapped.build(n).config.model_type for n in ALL + wrapped.STOCK} == set(WRAPPERS)


@pytest.mark.parametrize("name", some("qwen2_5_vl", names=ALL))
def test_forecast_counts_what_is_written(name, dense, tmp_path):
    options = {"keep": 0.7, "method": "a3", "calibration": WINDOWS.flatten(), "n_samples": 8, "seq_len": 24}
    told = planish.forecast(dense(name), measure=True, **options)
    found = planish.compress(dense(name), output=tmp_path / "out", **options)
    same = ("params_before", "params_after", "bytes_before", "untouched", "kv_bytes_per_token_after", "keep")
    assert {n: getattr(told, n) for n in same} == {n: getattr(found, n) for n in same}
    apart = 48 if name == "llama4" else 0  # linears of experts that are written as stacks and foreseen one by one
    cuts = 9 * 4 + apart
    assert found.bytes_after <= told.bytes_after <= found.bytes_after + cuts * 200  # headers of so many at most
    (tmp_path / "shapes").mkdir()
    (tmp_path / "shapes" / "config.json").write_bytes((dense(name) / "config.json").read_bytes())
    alone = planish.forecast(tmp_path / "shapes", **options)
    assert (alone.params_before, alone.untouched) == (found.params_before, found.untouched)


def test_a_limit_on_bytes_counts_the_vision_tower(dense, tmp_path):
    size = sum(p.stat().st_size for p in dense("gemma3").glob("*.safetensors"))
    result = tiny.compress(
        dense("gemma3"), output=tmp_path / "out", windows=WINDOWS, method="a3", max_bytes=size - 20_000
    )
    assert size - 20_000 - 7_200 < result.bytes_after <= size - 20_000
    written = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert written == result.bytes_after


@pytest.mark.parametrize("name", some("mistral3", names=ALL))
def test_in_memory(name, dense, tmp_path):
    """The same weights as from a folder; the model that was given stays as it is."""
    options = {"keep": 0.7, "method": "a3", "calibration": WINDOWS.flatten(), "n_samples": 8, "seq_len": 24}
    model = wrapped.build(name)
    small = planish.compress(model, **options)
    planish.compress(dense(name), output=tmp_path / "out", **options)
    assert isinstance(small, type(model)) and torch.equal(
        wrapped.see(small, name), wrapped.see(planish.load(tmp_path / "out"), name)
    )
    assert torch.equal(wrapped.see(model, name), wrapped.see(wrapped.build(name), name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_keys_are_not_rebuilt_where_a_token_has_three_positions(name, dense, tmp_path):
    """Kept pairs keep their section's position; latents would need all three of every cached token."""
    with pytest.raises(InputError, match="cannot be reached by palu"):
        tiny.compress(dense(name), output=tmp_path / "out", windows=WINDOWS, method="palu", kv_keep=0.3)
    result = tiny.compress(dense(name), output=tmp_path / "out", windows=WINDOWS, method="auto", kv_keep=0.7)
    assert result.kv_bytes_per_token_after <= 0.7 * result.kv_bytes_per_token_before
    specs = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["planish"]["blocks"]
    assert not any("k_rank" in s.get("attention", {}) and "k_form" not in s["attention"] for s in specs)
    small = planish.load(tmp_path / "out")
    inputs = wrapped.picture(name)
    short = small.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(
        short, small.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None, use_cache=False)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"),
    [(n, m) for n in wrapped.NAMES for m in ("auto", "flat-llm", "a3", "svd-llm", "blockpruner")]
    + [(n, m) for n in wrapped.HYBRIDS for m in ("auto", "svd-llm")],
)
def test_methods(name, method, dense, tmp_path):
    """Saved, loaded, generating with every kind of input; with the cache as without."""
    out = tmp_path / "out"
    keep = 0.8 if (name, method) == ("qwen3_5_moe", "svd-llm") else 0.6  # most of that one's weights are experts
    result = tiny.compress(dense(name), output=out, windows=WINDOWS, method=method, keep=keep)
    assert result.keep <= keep
    small = planish.load(out)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "suppress_tokens": [wrapped.IMAGE, 91]}
    for inputs in (wrapped.picture(name), {"input_ids": WINDOWS[:2, :9]}):
        assert torch.equal(small.generate(**inputs, **options), write_on(small, inputs, 5))
    small.save_pretrained(tmp_path / "again")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
    # where tensors lie in a mapped file decides the last bit of a product with a row or two, which is what an expert may get
    assert torch.equal(*(wrapped.see(copy.deepcopy(m), name) for m in (again, small)))


REMOTE = """
import importlib.abc, json, sys, torch

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "planish":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
found = {}
for key, (folder, stock, causal, ids) in json.loads(sys.argv[1]).items():
    inputs = torch.load(ids)
    kw = {} if stock else {"trust_remote_code": True}
    models = [AutoModelForImageTextToText.from_pretrained(folder, **kw)]
    if stock:
        import transformers
        models.append(getattr(transformers, stock).from_pretrained(folder))
    if causal:
        models.append(AutoModelForCausalLM.from_pretrained(folder, **kw))
    with torch.no_grad():
        logits = [m(**inputs, use_cache=False).logits for m in models]
    assert all(torch.equal(x, logits[0]) for x in logits), key
    found[key] = logits[0]
assert "planish" not in sys.modules
torch.save(found, sys.argv[2])
"""


FORMS = {  # of language models without an MLP, or without an attention, in every block: stock ones, and ours
    "qwen3_5": ([compressed.neurons(24)], [compressed.low_rank("pair", 4, "up", "down"), None]),
    "qwen3_5_moe": ([compressed.experts(5)], [compressed.low_rank("pair", 4, "expert.0.up", "expert.0.down"), None]),
    "llama4": ([None, compressed.experts(5), compressed.experts(5)], [compressed.values(5), None]),
}


@pytest.mark.slow
def test_without_planish(dense, tmp_path):
    """Stock shapes with nothing of ours in the wrapper's own class; others with the modelling files in the folder."""
    asked, expected = {}, {}
    for name in ALL:
        torch.save(wrapped.picture(name), tmp_path / f"{name}.pt")
        stock_forms, own = FORMS.get(name, ([compressed.neurons(24)], [compressed.values(5), None]))
        for key in (f"{name} stock", f"{name} own"):
            out, row = tmp_path / key, WRAPPERS[wrapped.build(name).config.model_type]
            compressed.make_folder(wrapped.build(name), out, stock_forms if key.endswith("stock") else own)
            stock = row.classes[2] if not list(out.glob("*.py")) else None
            assert (stock is not None) == key.endswith("stock")
            asked[key] = (str(out), stock, row.causal, str(tmp_path / f"{name}.pt"))
            expected[key] = wrapped.see(planish.load(out), name)
    environment = {
        "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }  # fmt: skip
    command = [sys.executable, "-c", REMOTE, json.dumps(asked), str(tmp_path / "logits.pt")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for word in ("newly initialized", "MISSING", "MISMATCH"):
        assert word not in done.stderr, done.stderr[-3000:]
    found = torch.load(tmp_path / "logits.pt")
    assert all(near(found[key], expected[key]) for key in asked)


# ------------------------------------------------------------------ wrong input


def change(folder: Path, place: Path, **fields) -> Path:
    """A copy of a folder's config.json, with these fields (None: without them)."""
    place.mkdir()
    config = json.loads((folder / "config.json").read_text()) | fields
    (place / "config.json").write_text(json.dumps({n: v for n, v in config.items() if v is not None}))
    return place


def test_wrong_configurations_say_so(dense, tmp_path):
    folder = dense("gemma3")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    cases = {
        "has no text_config: nothing says what the language model inside gemma3 is": {"text_config": None},
        "mistral3 around a language model of the family 'mamba2' is not supported": {
            "model_type": "mistral3", "text_config": text | {"model_type": "mamba2"},
        },
        "'siglip_vision_model' is a vision tower, without a language model": {"model_type": "siglip_vision_model"},
        "model family 'llava_next' is not supported": {"model_type": "llava_next"},
    }  # fmt: skip
    for n, (message, fields) in enumerate(cases.items()):
        with pytest.raises(InputError, match=message):
            read_config(change(folder, tmp_path / str(n), **fields))


def test_a_vision_tower_alone_is_refused(dense, tmp_path):
    from safetensors.torch import save_file

    place = change(dense("qwen3_vl"), tmp_path / "vision")
    vision = {n: t for n, t in wrapped.read(dense("qwen3_vl")).items() if "visual" in n}
    save_file(vision, place / "model.safetensors")
    with pytest.raises(InputError, match=r"holds no language model: of its \d+ tensors none is called …layers.…"):
        tiny.compress(place, output=tmp_path / "out", windows=WINDOWS)


def test_a_base_model_in_memory_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"load it as Gemma3ForConditionalGeneration \(AutoModelForImageTextToText\)"):
        tiny.compress(wrapped.build("gemma3").model, output=tmp_path / "out", windows=WINDOWS)


def test_compressed_ones_are_not_compressed_again(dense, tmp_path):
    tiny.compress(dense("mistral3"), output=tmp_path / "out", windows=WINDOWS, method="flat-llm", keep=0.7)
    with pytest.raises(InputError, match="already compressed"):
        tiny.compress(tmp_path / "out", output=tmp_path / "again", windows=WINDOWS)
