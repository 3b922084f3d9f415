"""What other libraries do with compressed models: upload them, serve them, train adapters on them, quantise them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import types
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

import compressed
import tiny
from planish.errors import InputError
from planish.export import export
from planish.export.carriers import is_own_code
from planish.export.hub import push
from planish.export.verify import verify
from planish.folder.load import load
from planish.modelling.families import FAMILIES
from planish.modelling.modelling import class_names
from tiny import build

MIXED = [
    compressed.both(compressed.values(3), compressed.neurons(24)),
    compressed.both(compressed.low_rank("pair", 6, "q", "up"), compressed.low_rank("pivoted", 6, "down")),
    compressed.bypass("mlp", 4, shift=True),
]


@pytest.fixture
def folder(tmp_path):
    return compressed.make_folder(build("llama_gqa"), tmp_path / "m", MIXED)


# ------------------------------------------------------------------ hub


class Hub:
    """Stands for the hub's API; remembers the calls."""

    def __init__(self, **settings):
        self.settings = settings
        Hub.calls = self.calls = []

    def create_repo(self, repo, **settings):
        self.calls.append(("create", repo, settings))

    def upload_folder(self, **settings):
        self.calls.append(("upload", settings["repo_id"], settings))
        return types.SimpleNamespace(commit_url=f"hub/{settings['repo_id']}/commit/1")


def test_push_uploads_what_belongs_to_a_model(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    (folder / "notes.pickle").write_bytes(b"")
    assert push(folder, "owner/small", private=True) == "hub/owner/small/commit/1"
    (_, repo, created), (_, _, uploaded) = Hub.calls
    assert repo == "owner/small" and created == {"private": True, "exist_ok": True}
    from huggingface_hub.utils import filter_repo_objects

    names = [f.name for f in folder.iterdir()]
    sent = set(filter_repo_objects(names, allow_patterns=uploaded["allow_patterns"]))
    assert set(names) - sent == {"notes.pickle"} and {"config.json", "modelling.py"} <= sent


def test_push_refuses_before_anything_is_created(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    Hub.calls = []
    for where, repo, message in (
        (tmp_path / "absent", "a/b", "no such folder"),
        (folder, "small", "must be owner/name"),
        (folder, "a/b/c", "must be owner/name"),
        (tmp_path, "a/b", "no config.json"),
    ):
        with pytest.raises(InputError, match=message):
            push(where, repo)
    assert Hub.calls == []


def test_push_says_what_the_hub_said(folder, monkeypatch):
    class Closed(Hub):
        def create_repo(self, repo, **settings):
            raise PermissionError("you may not\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi", Closed)
    with pytest.raises(InputError, match=r"cannot upload to a/b: PermissionError: you may not; check `hf auth login`"):
        push(folder, "a/b")


# ------------------------------------------------------------------ vLLM


def test_the_plugin_is_an_entry_point_and_needs_no_vllm_to_be_imported():
    (found,) = [e for e in entry_points(group="vllm.general_plugins") if e.name == "planish"]
    assert found.value == "planish.export.vllm_plugin:register"
    assert callable(found.load()) and ("vllm" in sys.modules) <= (importlib.util.find_spec("vllm") is not None)


def test_the_plugin_registers_every_architecture_once(monkeypatch):
    class Registry:
        known: dict[str, str] = {}

        @classmethod
        def get_supported_archs(cls):
            return cls.known

        @classmethod
        def register_model(cls, name, where):
            assert name not in cls.known
            cls.known[name] = where

    fake = types.ModuleType("vllm")
    fake.ModelRegistry = Registry
    monkeypatch.setitem(sys.modules, "vllm", fake)
    from planish.export.vllm_plugin import BACKEND, register

    register()
    register()
    assert Registry.known == {class_names(f)[2]: BACKEND for f in FAMILIES}


def test_attention_meets_the_rules_of_the_transformers_backend(folder):
    """One call of the attention interface per attention, with `scaling`, by a module that has a unique `layer_idx`."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = []

    def attend(module, query, key, value, mask, scaling=None, dropout=0.0, **kwargs):
        seen.append((module.layer_idx, scaling, module.is_causal))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=scaling, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("counting", attend)
    from transformers import AutoModel
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    ALL_MASK_ATTENTION_FUNCTIONS.register("counting", sdpa_mask)
    model = AutoModel.from_pretrained(folder, attn_implementation="counting", trust_remote_code=False)
    with torch.no_grad():
        model(input_ids=tiny.windows(1, 8))
    assert seen == [(i, 8**-0.5, True) for i in range(3)]


def verify_in_vllm(folder: Path, *more: str) -> dict:
    """`planish verify --target vllm` in a process of its own."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed (it pins its own torch: use an environment of its own)")
    command = [sys.executable, "-m", "planish", "verify", str(folder), "--target", "vllm", "--json", *more]
    done = subprocess.run([*command, "--prompt-len", "24", "--new-tokens", "8"], capture_output=True, text=True)
    assert done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout)


def build_for_vllm(family: str = "llama_gqa", **more):
    """Heads of 32: the least that vLLM's attention has on the CPU."""
    return build(family, **({"hidden_size": 128, "head_dim": 32, "intermediate_size": 96} | more))


@pytest.mark.slow
@pytest.mark.parametrize("form", [*(n for n in compressed.FORMS if not n.startswith("keys")), "mixed"])
def test_vllm_serves_every_form_without_remote_code(form, tmp_path):
    forms = {**compressed.FORMS, "mixed": [None, *MIXED]}[form]
    found = verify_in_vllm(compressed.make_folder(build_for_vllm(num_hidden_layers=4), tmp_path / "m", forms))
    assert found["passed"] and found["greedy_equal"] == found["greedy_tokens"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "opt", "gpt_neox"])
def test_vllm_serves_every_family_without_remote_code(family, tmp_path):
    wide = {} if family in ("opt", "gpt_neox") else {"head_dim": 32}
    forms = [compressed.both(compressed.values(16), compressed.neurons(24)), *MIXED[1:]]
    model = build(family, hidden_size=128, **wide)
    found = verify_in_vllm(compressed.make_folder(model, tmp_path / "m", forms))
    assert found["passed"] and found["greedy_equal"] == found["greedy_tokens"] == 8


DECI = [
    compressed.both(compressed.neurons(256), compressed.values(5)),
    compressed.bypass("attention"),
    compressed.bypass("mlp"),
]


@pytest.mark.slow
def test_vllm_runs_the_decilm_form_in_its_own_class(tmp_path):
    folder = compressed.make_folder(build_for_vllm(intermediate_size=512), tmp_path / "m", DECI)
    export(folder, "deci", tmp_path / "d")
    found = verify_in_vllm(tmp_path / "d", "--dense-reference", str(folder))
    assert found["passed"] and found["greedy_equal"] == found["greedy_tokens"] == 8


def test_mlx_runs_the_decilm_form(tmp_path):
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed (pip install mlx-lm)")
    import mlx.core as mx

    folder = compressed.make_folder(build("llama_gqa", intermediate_size=512), tmp_path / "m", DECI)
    export(folder, "deci", tmp_path / "d")
    model = utils.load_model(tmp_path / "d")[0]
    assert type(model).__module__ == "mlx_lm.models.nemotron-nas"
    ids = tiny.windows(2, 19)
    with torch.no_grad():
        want = load(folder)(input_ids=ids).logits
    got = torch.tensor(model(mx.array(ids.tolist())).tolist())
    torch.testing.assert_close(got, want, atol=1e-4 * float(want.abs().max()), rtol=0)


def test_code_that_planish_did_not_write_is_not_run(tmp_path, monkeypatch):
    folder = compressed.make_folder(build("llama_gqa"), tmp_path / "m", [compressed.bypass("mlp")])
    export(folder, "deci", tmp_path / "d")
    with pytest.raises(
        InputError, match="transformers has no class for a DeciLM folder: --target vllm with --dense-ref"
    ):
        verify(tmp_path / "d", "hf")
    assert is_own_code(tmp_path / "d")
    (tmp_path / "d" / "configuration_decilm.py").write_text("raise SystemExit")
    fake = types.ModuleType("vllm")
    fake.LLM = fake.SamplingParams = None
    fake.__spec__ = importlib.util.spec_from_loader("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    with pytest.raises(InputError, match="names code that planish did not write; it is not run"):
        verify(tmp_path / "d", "vllm", dense_reference=folder)


# ------------------------------------------------------------------ recovery and quantisation


def test_lora_trains_on_every_form(folder):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
    model = load(folder)
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    linears = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"]  # full names
    assert {n.rpartition(".")[2] for n in linears} >= {"A", "B", "P", "C", "V", "W", "q_proj"}
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=linears, task_type="CAUSAL_LM"))
    ids = tiny.windows(4, 16)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    for name, p in tuned.named_parameters():
        if "lora_" not in name:
            key = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(p, frozen[key]), "only the adapters change"
    merged = tuned.merge_and_unload()
    with torch.no_grad():
        assert torch.isfinite(merged(input_ids=ids).logits).all()


def test_integer_weights_run_on_every_form(folder):
    torchao = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed (pip install 'planish[quant]')"
    )
    model, ids = load(folder), tiny.windows(2, 16)
    with torch.no_grad():
        want = model(input_ids=ids).logits
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        got = model(input_ids=ids).logits
    assert 0 < (got - want).abs().max() < 0.1 * want.abs().max()


@pytest.mark.slow
def test_llm_compressor_quantises_every_form_and_the_result_loads_again(folder, tmp_path):
    """Weight-only integers of every linear, saved in compressed-tensors' format, loaded by the Auto class."""
    llmcompressor = pytest.importorskip(
        "llmcompressor", reason="llm-compressor is not installed (pip install llmcompressor)"
    )
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    model, ids = load(folder), tiny.windows(2, 16)
    with torch.no_grad():
        want = model(input_ids=ids).logits
        scheme = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
        groups = {"all": {"targets": ["Linear"], "weights": scheme}}
        recipe = QuantizationModifier(config_groups=groups, ignore=["lm_head"])
        llmcompressor.oneshot(model=model, recipe=recipe, pipeline="datafree")
        got = model(input_ids=ids).logits
        assert 0 < (got - want).abs().max() < 0.1 * want.abs().max()
        model.save_pretrained(tmp_path / "q")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "q", trust_remote_code=False)(input_ids=ids).logits
    torch.testing.assert_close(again, got, atol=1e-5 * float(got.abs().max()), rtol=0)


@pytest.mark.slow
def test_the_modelling_files_alone_load_the_folder(folder, tmp_path):
    """`trust_remote_code=True` where planish is not installed: the folder's own files give the same logits."""
    import subprocess

    script = (
        "import sys, torch; sys.modules['planish'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "assert type(m).__module__.startswith('transformers_modules')\n"
        f"torch.save(m(input_ids=torch.arange(3, 15)[None]).logits.detach(), {str(tmp_path / 'out.pt')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=_clean_env(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        want = load(folder)(input_ids=torch.arange(3, 15)[None]).logits
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), want)


def _clean_env(cache: Path) -> dict[str, str]:
    import os

    return {**os.environ, "HF_HOME": str(cache / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", ["Attention", "Frequencies", "Latent"])
def test_attention_calls_the_interface_where_vllm_looks_for_it(name):
    """vLLM's Transformers backend parses `forward`: one call, by a name assigned from the table, with `scaling=self.…`."""
    import ast
    import inspect
    import textwrap

    from planish.modelling import attentions

    tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(attentions, name).forward)))
    assigned = {
        t.id
        for n in ast.walk(tree)
        if isinstance(n, ast.Assign) and ast.unparse(n.value).startswith("ALL_ATTENTION_FUNCTIONS.get_interface(")
        for t in n.targets
    }
    calls = [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in assigned
    ]
    assert len(calls) == 1
    assert [ast.unparse(k.value) for k in calls[0].keywords if k.arg == "scaling"] == ["self.scaling"]
