"""Folder layouts as users have them: read as `from_pretrained` reads them, or refused in one line that says what to do."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import planish
import tiny
from planish.errors import InputError
from planish.export.dense import export_dense
from planish.export.plain import open_plain
from planish.folder.hub import find_folder
from planish.folder.model_folder import ModelFolder
from planish.folder.skeleton import build_empty
from planish.folder.source import open_folder, open_source
from planish.folder.tokenizer import COPIED, TEMPLATES
from planish.modelling.blocks import find_blocks
from planish.modelling.families import FAMILIES
from tiny import compress

WINDOWS = tiny.windows(16, 24)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def make(folder: Path, scale: float = 1.0, sharded: bool = False, name: str = "llama_mha") -> Path:
    """A model whose last norm says which one it is."""
    model = tiny.build(name)
    with torch.no_grad():
        model.get_parameter(NORM).fill_(scale)
    return tiny.save(model, folder, sharded=sharded)


NORM = "model.norm.weight"


def add_tensors(folder: Path, extra: dict[str, torch.Tensor]) -> Path:
    file = folder / SINGLE
    save_file(load_file(file) | extra, file, {"format": "pt"})
    return folder


def configure(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


# ---------------------------------------------------------------- which weights are the model


def both(folder: Path) -> None:
    make(folder, 2.0, sharded=True)
    make(folder / "other", 3.0)
    shutil.move(folder / "other" / SINGLE, folder / SINGLE)
    shutil.rmtree(folder / "other")


def stale_index(folder: Path) -> None:
    make(folder, 2.0, sharded=True)
    for shard in folder.glob("model-*.safetensors"):
        shard.unlink()
    both_config = (folder / "config.json").read_text()
    make(folder / "other", 3.0)
    shutil.move(folder / "other" / SINGLE, folder / SINGLE)
    shutil.rmtree(folder / "other")
    assert (folder / INDEX).is_file() and both_config


def some_shards_gone(folder: Path) -> None:
    both(folder)
    sorted(folder.glob("model-*.safetensors"))[0].unlink()


def named_in_the_configuration(folder: Path) -> None:
    make(folder, 2.0)
    shutil.copy(folder / SINGLE, folder / "named.safetensors")
    tensors = load_file(folder / "named.safetensors")
    save_file(tensors | {NORM: torch.full_like(tensors[NORM], 3.0)}, folder / "named.safetensors", {"format": "pt"})
    configure(folder, transformers_weights="named.safetensors")


def variant_beside(folder: Path) -> None:
    make(folder, 3.0)
    make(folder / "other", 2.0)
    shutil.move(folder / "other" / SINGLE, folder / "model.fp16.safetensors")
    shutil.rmtree(folder / "other")


def pickle_beside(folder: Path) -> None:
    make(folder, 3.0)
    torch.save({k: 2 * v for k, v in load_file(folder / SINGLE).items()}, folder / "pytorch_model.bin")


def linked(folder: Path) -> None:
    """As older downloads of the hub into a local folder lie there, and shared stores of models."""
    make(folder, 3.0)
    shutil.move(folder / SINGLE, folder.parent / "0abc")
    (folder / SINGLE).symlink_to("../0abc")


def linked_shards(folder: Path) -> None:
    make(folder, 3.0, sharded=True)
    for shard in folder.glob("model*.safetensors*"):
        shutil.move(shard, folder.parent / f"blob-{shard.name}")
        shard.symlink_to(folder.parent / f"blob-{shard.name}")


LAYOUTS = {
    "single": (lambda f: make(f, 3.0), 3.0), "sharded": (lambda f: make(f, 3.0, sharded=True), 3.0), "both": (both, 3.0),
    "stale index": (stale_index, 3.0), "some shards gone": (some_shards_gone, 3.0), "variant beside": (variant_beside, 3.0),
    "named": (named_in_the_configuration, 3.0), "pickle beside": (pickle_beside, 3.0), "linked": (linked, 3.0),
    "linked shards": (linked_shards, 3.0),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_reader_reads_what_transformers_reads(layout, tmp_path):
    write, scale = LAYOUTS[layout]
    write(folder := tmp_path / "m")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
        assert (expected[NORM] == scale).all(), "the layout is not what this test takes it for"
        reader = ModelFolder(folder)
        assert set(reader.names) == set(expected)
        assert all(torch.equal(reader.tensor(n), t) for n, t in expected.items())
        assert torch.equal(open_source(folder).weight(NORM), expected[NORM])
        assert torch.equal(open_plain(folder).outside()[NORM], expected[NORM])
        assert torch.equal(planish.load(folder).state_dict()[NORM], expected[NORM])
        compress(folder, output=tmp_path / "out", keep=1.0, method="svd", windows=WINDOWS)
        export_dense(folder, tmp_path / "dense")
    for made in ("out", "dense"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / made).state_dict()
        assert all(torch.equal(loaded[n], t) for n, t in expected.items())
    two = [str(w.message) for w in caught if "two sets of weights" in str(w.message)]
    assert bool(two) == (layout == "both") and all(SINGLE in t and INDEX in t for t in two)


def variant_only(folder: Path) -> None:
    variant_beside(folder)
    (folder / SINGLE).unlink()


def shards_without_index(folder: Path) -> None:
    make(folder, sharded=True)
    (folder / INDEX).unlink()


def shard_gone(folder: Path) -> None:
    make(folder, sharded=True)
    sorted(folder.glob("model-*.safetensors"))[0].unlink()


def link_to_nothing(folder: Path) -> None:
    linked(folder)
    (folder.parent / "0abc").unlink()


def named_but_not_there(folder: Path) -> None:
    configure(make(folder), transformers_weights="gone.safetensors")


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (variant_only, "only the variant model.fp16.safetensors: load it once with variant='fp16'"),
        (shards_without_index, "without their model.safetensors.index.json"),
        (shard_gone, "is missing in"),
        (link_to_nothing, "is a link to ../0abc, which is not there"),
        (named_but_not_there, "names the weights gone.safetensors, which are not there"),
    ],
)
def test_what_transformers_cannot_read_is_refused(write, words, tmp_path):
    write(folder := tmp_path / "m")
    with pytest.raises(OSError):
        AutoModelForCausalLM.from_pretrained(folder)
    for use in (planish.load, open_source, open_plain, ModelFolder.names.fget, planish.forecast):
        with pytest.raises(InputError, match=words.replace(".", r"\.")):
            use(ModelFolder(folder) if use is ModelFolder.names.fget else folder)


def test_an_adapter_beside_the_weights_is_named(tmp_path):
    """With peft installed `from_pretrained` would put it on; without, it would not."""
    folder = make(tmp_path / "m")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}')
    for use in (planish.load, open_source, open_plain, planish.forecast):
        with pytest.raises(InputError, match="LORA adapter of owner/base: merge it first"):
            use(folder)


# ---------------------------------------------------------------- what is given instead of a model


def test_what_was_given_is_recognised(tmp_path):
    def write(name: str, text: str = "") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
        return path

    write("adapter/adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "tiny"}')
    write("quantised/m.Q4_K_M.gguf"), write("onnx/model.onnx"), write("diffusion/model_index.json")
    write("pickles/pytorch_model.bin"), write("meta/consolidated.00.pth"), write("training/checkpoint-5/config.json")
    write("hub/snapshots/1/config.json"), write("hub/refs/main", "1"), (tmp_path / "empty").mkdir()
    for given, words in {
        "adapter": "is a LORA adapter of tiny: merge it", "quantised": "a GGUF file with b'GGUF'", "onnx": "only ONNX",
        "diffusion": "diffusers", "pickles": "never pickles: save it once", "meta": "maker's own format",
        "training": "checkpoint-5 has one", "hub": "snapshots/1 has one", "empty": "not a Hugging Face model folder",
        "onnx/model.onnx": "ONNX file: give the folder", "pickles/pytorch_model.bin": "a pickle, which is never read",
        "hub/refs/main": "is a file, not a folder",
    }.items():  # fmt: skip
        for use in (
            planish.load,
            open_source,
            open_plain,
            planish.forecast,
            lambda m: planish.evaluate(m, WINDOWS.flatten()),
        ):
            with pytest.raises(InputError) as caught:
                use(str(tmp_path / given))
            assert words in str(caught.value) and "\n" not in str(caught.value), (given, str(caught.value))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "only pickles"),
        ("model.gguf", "a GGUF file with b'GGUF'"),
        ("model.fp16.safetensors", "variant='fp16'"),
    ],
)
def test_a_configuration_beside_other_weights(name, words, tmp_path):
    folder = make(tmp_path / "m")
    (folder / SINGLE).rename(folder / name)
    for use in (planish.load, open_source, open_plain):
        with pytest.raises(InputError, match=words):
            use(folder)


# ---------------------------------------------------------------- tensors that are no parameters

MASK = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
OLD = {
    "gpt_neox": (
        "gpt_neox.layers.{}.attention.",
        {"bias": MASK, "masked_bias": torch.tensor(-1e9), "rotary_emb.inv_freq": torch.ones(2)},
    ),
    "gpt2": ("transformer.h.{}.attn.", {"bias": MASK, "masked_bias": torch.tensor(-1e4)}),
    "llama_gqa": (
        "model.layers.{}.self_attn.rotary_emb.", {"inv_freq": torch.ones(4), "cos_cached": torch.ones(1, 64, 8)},
    ),
    "mistral": ("model.layers.{}.", {"freqs_cis": torch.ones(4, dtype=torch.complex64), "mask": MASK.bool(), "step": MASK.short()}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name"),
    tiny.pick([("stored", n) for n in OLD] + [("float", "gpt2")], [(k, n) for k in ("stored", "float") for n in OLD]),
)
@torch.no_grad()
def test_stored_tensors_that_are_no_parameters_are_passed_over(name, kind, tmp_path):
    """Masks, rotary tables and the like, of any type, as old versions stored them: the same result as without."""
    where, extra = OLD[name]
    model = tiny.build(name)
    plain, full = tiny.save(model, tmp_path / "a"), tiny.save(model, tmp_path / "b")
    cast = (lambda t: t.clone()) if kind == "stored" else (lambda t: t.real.float().clone())
    add_tensors(full, {where.format(i) + n: cast(t) for i in range(3) for n, t in extra.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [
            compress(f, output=tmp_path / f"{f.name}1", keep=0.8, method="flat-llm", windows=WINDOWS)
            for f in (plain, full)
        ]
        assert (
            results[0].params_before == results[1].params_before and results[0].bytes_before == results[1].bytes_before
        )
        assert torch.equal(planish.load(full)(input_ids=WINDOWS).logits, model(input_ids=WINDOWS).logits)
    for file in (tmp_path / "a1").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b1" / file.name).read_bytes()


def test_what_is_passed_over_is_said(tmp_path):
    """As transformers reports it; what the class itself lists as old is not news."""
    folder = add_tensors(make(tmp_path / "m"), {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})
    with pytest.warns(UserWarning, match=r"no part of LlamaForCausalLM, passed over .*layers\.0\.self_attn\.q_norm"):
        open_source(folder)
    old = tiny.save(tiny.build("gpt2"), tmp_path / "old")
    add_tensors(old, {"transformer.h.0.attn.bias": MASK.clone()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_source(old)


BLOCK = "model.layers.1."


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"self_attn.q_proj.qweight": torch.ones(4, 4, dtype=torch.int32)}, "quantised"),
        ({"self_attn.q_proj.input_scale": torch.ones(1)}, "quantised"),
        ({"self_attn.k_proj.k_scale": torch.ones(1)}, "quantised"),
        ({"mlp.down_proj.weight_scale_inv": torch.ones(1, 1)}, "quantised"),
        ({"mlp.down_proj.weight.absmax": torch.ones(4)}, "quantised"),
        ({"mlp.down_proj.weight.quant_state.bitsandbytes__nf4": torch.ones(4, dtype=torch.uint8)}, "quantised"),
        ({"mlp.up_proj.SCB": torch.ones(4)}, "quantised"),
        ({"mlp.down_proj.weight": torch.ones(32, 44, dtype=torch.int8)}, "stored as I8.*quantised"),
        ({"mlp.down_proj.weight": torch.ones(32, 44).to(torch.float8_e4m3fn)}, "stored as F8_E4M3.*quantised"),
        ({"self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}, "adapter: merge it first"),
        ({"self_attn.q_proj.bias": torch.ones(32)}, "unexpected tensor .*q_proj.bias"),
    ],
)  # fmt: skip
def test_tensors_that_change_what_others_mean_are_refused(extra, words, tmp_path):
    folder = add_tensors(make(tmp_path / "m"), {BLOCK + n: t for n, t in extra.items()})
    for use in (planish.load, open_source, open_plain, planish.forecast):
        with pytest.raises(InputError, match=words):
            use(folder)


@torch.no_grad()
def test_fields_that_an_architecture_ignores_change_nothing(tmp_path):
    """Those of other families, of planish, of quantisers that were turned off, of stores of weights."""
    a, b = make(tmp_path / "a", 3.0), make(tmp_path / "b", 3.0)
    configure(
        b, planish={"blocks": []}, per_layer_config=None, do_layer_norm_before=False, add_cross_attention=True, clip_qkv=1.0,
        attn_logit_softcapping=1.0, final_logit_softcapping=1.0, use_parallel_residual=True, num_experts=8,
        quantization_config=None, n_inner=12, sliding_window=4, transformers_weights=SINGLE, text_config=None, skip=["mlp"],
    )  # fmt: skip
    for folder in (a, b):
        compress(folder, output=tmp_path / f"{folder.name}1", keep=0.7, method="flat-llm", windows=WINDOWS)
        export_dense(tmp_path / f"{folder.name}1", tmp_path / f"{folder.name}2", pad=True)
    for made in ("1", "2"):
        one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / f"{n}{made}") for n in "ab")
        assert torch.equal(one(input_ids=WINDOWS).logits, two(input_ids=WINDOWS).logits)
        for file in (tmp_path / f"a{made}").glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / f"b{made}" / file.name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_exports_keep_a_head_that_is_not_tied(dtype, tmp_path):
    """The flag says tied, the folder stores two matrices, in one type or in two: what transformers makes of it is exported."""
    folder = tiny.save(tiny.build("llama_tied"), tmp_path / "m")
    embedding = load_file(folder / SINGLE)["model.embed_tokens.weight"]
    add_tensors(folder, {"lm_head.weight": embedding.flip(0).to(dtype)})
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=WINDOWS).logits
    export_dense(folder, tmp_path / "dense")
    compress(folder, output=tmp_path / "out", keep=1.0, windows=WINDOWS)
    for made in ("dense", "out"):
        found = AutoModelForCausalLM.from_pretrained(tmp_path / made, dtype=torch.float32)(input_ids=WINDOWS).logits
        assert torch.equal(found, expected)


@torch.no_grad()
def test_a_stock_export_names_the_head_as_its_class_does(tmp_path):
    model = tiny.build("gpt_neox")
    compress(tiny.save(model, tmp_path / "m"), output=tmp_path / "out", keep=0.8, method="svd", windows=WINDOWS)
    assert export_dense(tmp_path / "out", tmp_path / "dense").architecture == "native"
    names = {n for f in (tmp_path / "dense").glob("*.safetensors") for n in load_file(f)}
    assert "embed_out.weight" in names and "lm_head.weight" not in names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(
        loaded(WINDOWS).logits, planish.load(tmp_path / "out")(WINDOWS).logits, rtol=1e-3, atol=1e-4
    )


# ---------------------------------------------------------------- links, and what results carry on


def test_copied_files_are_not_followed_out_of_the_folder(tmp_path):
    """Refused before anything is read; a hub's own store may lie anywhere."""
    (tmp_path / "secret").write_text("{}")
    for name in ("config.json", "special_tokens_map.json", f"{TEMPLATES}/tool.jinja"):
        folder = make(tmp_path / name.partition(".")[0].replace("/", "-"))
        (folder / name).parent.mkdir(exist_ok=True)
        if name == "config.json":
            shutil.copy(folder / name, tmp_path / "secret")
            (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "secret")
        with pytest.raises(InputError, match="outside the model's folder"):
            open_source(folder)
        with pytest.raises(InputError, match="outside the model's folder"):
            export_dense(folder, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))
    store = tmp_path / "cache" / "models--owner--model" / "blobs"
    store.mkdir(parents=True)
    folder = make(tmp_path / "local")
    for n, file in enumerate(sorted(folder.iterdir())):
        shutil.move(file, store / f"{n}abc")
        file.symlink_to(store / f"{n}abc")
    compress(folder, output=tmp_path / "out", keep=0.8, method="svd", windows=WINDOWS)


def test_all_that_belongs_to_the_tokenizer_survives(tmp_path):
    """A compression and every export of a folder; a template beside the first one has a folder of its own."""
    folder = make(tmp_path / "m")
    names = [n for n in COPIED if n not in ("tokenizer.json", "tokenizer.model", "generation_config.json")]
    for name in (*names, f"{TEMPLATES}/tool_use.jinja"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{{}} {name}")
    for foreign in ("modeling_evil.py", "optimizer.pt", "notes.txt"):
        (folder / foreign).write_text("x")
    compress(folder, output=tmp_path / "out", keep=0.8, method="flat-llm", windows=WINDOWS)
    made = [tmp_path / "out"]
    for target in ("dense", "mimo", "deci"):
        planish_export(tmp_path / "out", target, tmp_path / target)
        made.append(tmp_path / target)
    for place in made:
        for name in (*names, f"{TEMPLATES}/tool_use.jinja"):
            assert (place / name).read_text() == f"{{}} {name}", (place.name, name)
        assert not any((place / n).exists() for n in ("modeling_evil.py", "optimizer.pt", "notes.txt"))


def planish_export(folder: Path, target: str, output: Path) -> None:
    from planish.export import export

    export(folder, target, output)


# ---------------------------------------------------------------- look before you download


class Hub:
    """A hub of one repository: what is asked for is noted, and linked into a snapshot."""

    def __init__(self, folder: Path, place: Path, monkeypatch):
        import huggingface_hub
        from huggingface_hub.utils import filter_repo_objects

        self.asked: list[str] = []
        self.files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}

        def download(repo: str, allow_patterns=None, ignore_patterns=None, **_):
            place.mkdir(exist_ok=True)
            for name in filter_repo_objects(
                list(self.files), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            ):
                self.asked.append(name)
                (place / name).parent.mkdir(exist_ok=True)
                if not (place / name).exists():
                    shutil.copy(self.files[name], place / name)
            return str(place)

        class Sibling:
            def __init__(self, name: str, size: int):
                self.rfilename, self.size = name, size

        class Info:
            siblings = [Sibling(n, p.stat().st_size) for n, p in self.files.items()]

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: Info)

    @property
    def weights(self) -> list[str]:
        return [n for n in self.asked if n.endswith((".safetensors", ".bin"))]


USES = {
    "compress": lambda m, text, out: planish.compress(m, keep=0.8, method="svd", calibration=text, output=out),
    "forecast": lambda m, text, _: planish.forecast(m, keep=0.8, method="flat-llm", calibration=text, measure=True),
    "evaluate": lambda m, text, _: planish.evaluate(m, text),
}


@pytest.mark.parametrize("use", USES)
def test_nothing_large_is_fetched_for_what_is_refused(use, tmp_path, monkeypatch):
    """A family that is not supported, a text that is not there, pickles alone, an adapter, a full disk."""
    model = make(tmp_path / "model", sharded=True)
    for n, (change, text, words) in enumerate([
        (lambda f: configure(f, model_type="jamba"), WINDOWS.flatten(), "jamba"),
        (lambda f: None, "nothing.txt", "nothing.txt"),
        (pickle_all, WINDOWS.flatten(), "owner/model.* only pickles .pytorch_model.bin"),
        (adapt, WINDOWS.flatten(), "LORA adapter of owner/base"),
    ]):  # fmt: skip
        change(folder := Path(shutil.copytree(model, tmp_path / f"m{n}")))
        hub = Hub(folder, tmp_path / f"snapshot{n}", monkeypatch)
        with pytest.raises(InputError, match=words):
            USES[use]("owner/model", text, tmp_path / "out")
        assert not hub.weights and not list(tmp_path.glob("out*")), (n, hub.asked)


def pickle_all(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def adapt(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors*"), folder / "config.json"]:
        file.unlink()
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}')


def test_a_disk_that_is_too_small_is_said_first(tmp_path, monkeypatch):
    hub = Hub(make(tmp_path / "m"), tmp_path / "snapshot", monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("usage", (), {"free": 1000}))
    with pytest.raises(InputError, match=r"owner/model needs .* GB on disk, 0\.0 GB are free"):
        find_folder("owner/model")
    assert not hub.weights


def test_a_configuration_is_enough_to_plan_from_the_hub(tmp_path, monkeypatch):
    """Ranks from shapes need no weights; ranks from statistics fetch them when the statistics are asked for."""
    folder = make(tmp_path / "m", sharded=True)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"x")
    hub = Hub(folder, tmp_path / "snapshot", monkeypatch)
    near, far = (planish.forecast(m, keep=0.8, method="svd") for m in (folder, "owner/model"))
    assert planish.forecast("owner/model", keep=0.8, method="auto").keep <= 0.8
    assert not hub.weights and near.params_after == far.params_after and near.bytes_after == far.bytes_after
    near, far = (
        planish.forecast(m, keep=0.8, method="flat-llm", calibration=WINDOWS.flatten(), measure=True)
        for m in (folder, "owner/model")
    )
    assert hub.weights and near.units == far.units and "onnx/model.safetensors" not in hub.asked
    result = planish.compress(
        "owner/model", keep=0.8, method="svd", calibration=WINDOWS.flatten(), output=tmp_path / "out"
    )
    assert result.params_after < result.params_before


def test_a_cache_without_safetensors(tmp_path, monkeypatch):
    """Offline, with the snapshot of a repository of pickles."""
    home = tmp_path / "hub" / "models--o--bin"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("1")
    make(home / "snapshots" / "1")
    (home / "snapshots" / "1" / SINGLE).unlink()
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(home / "snapshots" / "1"))
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    for use in USES.values():
        if use is USES["forecast"]:
            continue  # a configuration is enough
        with pytest.raises(InputError, match=r"no safetensors of o/bin .*only pickles of it, save it once"):
            use("o/bin", WINDOWS.flatten(), tmp_path / "out")


@torch.no_grad()
def test_load_with_a_device_map(tmp_path):
    pytest.importorskip("accelerate")
    folder = make(tmp_path / "m")
    model = planish.load(folder, device_map="auto", max_memory={"cpu": "60KB"}, offload_folder=str(tmp_path / "off"))
    assert any(p.is_meta for p in model.parameters())
    expected = open_folder(folder)
    assert torch.equal(model(input_ids=WINDOWS).logits, planish.load(folder)(input_ids=WINDOWS).logits) and expected
    assert (
        planish.load(tiny.save(tiny.build("llama_mha", torch.bfloat16), tmp_path / "b"), dtype="auto").dtype
        == torch.bfloat16
    )


# Buffers that checkpoints store, as they store weights: those of a model without weights say nothing.
STORED = {"apertus": (".act_fn.beta", ".act_fn.eps"), "gemma4": ("layer_scalar",)}


@pytest.mark.parametrize(
    "name", tiny.each(n for n in tiny.NAMES + tiny.MORE + tiny.HYBRIDS + tiny.STOCK if n not in tiny.MIXED)
)
def test_models_without_weights_have_the_buffers_of_whole_ones(name):
    """Rotary tables, masks, scales of embeddings: bit for bit; parameters are there in shape alone."""
    config = tiny.configure(name)
    empty, whole = build_empty(config, FAMILIES[config.model_type]), tiny.build(name)
    assert empty.state_dict().keys() == whole.state_dict().keys()
    assert all(p.is_meta and p.shape == whole.get_parameter(n).shape for n, p in empty.named_parameters())
    expected = dict(whole.named_buffers())
    assert expected.keys() == dict(empty.named_buffers()).keys()
    assert all(torch.equal(b, expected[n]) for n, b in empty.named_buffers() if not n.endswith(STORED.get(name, "-")))


@pytest.mark.parametrize("name", STORED)
def test_buffers_of_checkpoints_are_read(name, tmp_path):
    model = tiny.build(name)
    for at, buffer in model.named_buffers():
        buffer.mul_(1.5 if at.endswith(STORED[name]) else 1)
    source, row = open_source(tiny.save(model, tmp_path / "m")), FAMILIES[model.config.model_type]
    for i, block in enumerate(find_blocks(model, row)):
        found, expected = dict(source.block(i).named_buffers()), dict(block.named_buffers())
        assert found.keys() == expected.keys() and any(n.endswith(STORED[name]) for n in found)
        assert all(torch.equal(b, expected[n]) for n, b in found.items())
