"""Attacks on models and options that the other files do not try: one clear line, exit 2, nothing left, no foreign code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import planish
import tiny
from compressed import train_tokenizer
from planish.errors import InputError
from planish.folder.config import load_config
from planish.folder.hub import find_folder
from planish.folder.load import load
from planish.folder.source import open_source
from planish.methods import list_methods
from tiny import compress

WINDOWS = tiny.windows(16, 24)
EVIL = "open({mark!r}, 'w').close()\n"


@pytest.fixture
def refuse(run, ids, tmp_path):
    """Run compress, plan and eval on a model; all must refuse it in one line that has the words, and leave nothing."""

    def check(model: object, *words: str, evaluate: bool = True, extra: tuple[object, ...] = ()) -> None:
        out = tmp_path / "out"
        common = (model, "--method", "flat-llm", "--calibration", ids, "--n-samples", 8, "--seq-len", 16, *extra)
        commands = [("compress", *common, "-o", out), ("plan", "--measure", *common)]
        for command in commands + ([("eval", model, "--text", ids)] if evaluate else []):
            done = run(*command)
            lines = done.stderr.strip().splitlines()
            assert done.exit_code == 2 and len(lines) == 1 and done.stdout == "", (command[0], done.output)
            assert all(w in lines[0] for w in words), lines[0]
            assert not list(tmp_path.glob("out*"))

    return check


def configure(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("name", ["owner/absent", "owner/not a name!"])
def test_hub_ids_that_are_not_there(refuse, name):
    refuse(name, "no such model", "neither a folder nor")


@pytest.mark.parametrize(
    ("error", "words"),
    [("GatedRepoError", ("gated", "hf auth login")), ("RepositoryNotFoundError", ("not on the hub", "private"))],
)
def test_what_the_hub_refuses(error, words, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    class Response:
        headers: dict = {}
        request = None

    def deny(*args, **kwargs):
        raise getattr(errors, error)("many\nlines", response=Response())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", deny)
    with pytest.raises(InputError) as caught:
        find_folder("owner/model")
    assert all(w in str(caught.value) for w in ("owner/model", *words)) and "\n" not in str(caught.value)


def test_only_what_is_read_is_downloaded(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}
    tiny.save(tiny.build("llama_mha"), tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **kw: asked.update(kw) or str(tmp_path))
    find_folder("owner/model")
    files = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "consolidated.safetensors",
             "pytorch_model.bin", "original/params.json", "modeling_evil.py", "onnx/model.onnx"]  # fmt: skip
    assert list(filter_repo_objects(files, **asked)) == files[:3]


def test_pickles_are_read_by_no_command(refuse, folder, tmp_path):
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    tensors = {k: t for p in model.glob("*.safetensors") for k, t in load_file(p).items()}
    for p in [*model.glob("*.safetensors"), model / "model.safetensors.index.json"]:
        p.unlink()
    torch.save(tensors, model / "pytorch_model.bin")
    refuse(model, "pytorch_model.bin", "never pickles")


@pytest.mark.parametrize(
    "depth",
    [
        {"model_type": "qwen3", "num_hidden_layers": 10**7},  # transformers' own list of layer types takes a minute
        {"model_type": "gpt2", "n_layer": 10**7},
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 10**7}},
    ],
)
def test_more_blocks_than_any_model_has(depth, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(depth))
    with pytest.raises(InputError, match=r"config.json says 10,000,000 blocks \(n\w+\), and at most 10,000 are read"):
        planish.forecast(tmp_path)


def test_truncated_shard_is_named_by_eval_too(refuse, folder, tmp_path):
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    refuse(model, shard.name, "truncated")


def test_a_file_that_is_too_long_is_not_called_truncated(refuse, folder, tmp_path):
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes() + b"0123456789")
    refuse(model, shard.name, ": 10 more than its tensors have; download it again")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"hidden_act": "swilu"}, "transformers knows no 'swilu'"),
        ({"rope_parameters": {"rope_type": "turn", "rope_theta": 1e4}}, "transformers knows no 'turn'"),
    ],
)
def test_what_a_configuration_names_and_transformers_does_not_know(refuse, folder, tmp_path, wrong, words):
    refuse(configure(Path(shutil.copytree(folder, tmp_path / "model")), **wrong), words)


@pytest.mark.parametrize("how", ["aqlm", None])
def test_quantised_models_are_refused(refuse, folder, tmp_path, how):
    model = configure(
        Path(shutil.copytree(folder, tmp_path / "model")), quantization_config={"quant_method": how, "bits": 4}
    )
    refuse(model, "already quantised", how or "quantization_config", "original weights", evaluate=False)


def test_code_beside_a_model_is_never_run(folder, ids, tmp_path, run):
    """auto_map in the configuration and in the tokenizer's: the stock classes are used, nobody is asked, and what is
    written names no code of the source's."""
    mark = tmp_path / "ran"
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    (model / "evil.py").write_text(EVIL.format(mark=str(mark)))
    train_tokenizer(model, byte_level=True)
    for name, entry in (
        ("config.json", {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoModelForCausalLM": "evil.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.T", "evil.T"]}),
    ):
        path = model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": entry}))
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat " * 200)
    for method, native in (("flat-llm", False), ("shortgpt", True)):
        common = ("--method", method, "--calibration", text, "--n-samples", 8, "--seq-len", 16, "--keep", "0.7")
        done = run("compress", model, *common, "-o", tmp_path / method)
        assert done.exit_code == 0, done.output
        config = json.loads((tmp_path / method / "config.json").read_text())
        assert native == ("auto_map" not in config) and "evil" not in json.dumps(config)
        assert not (tmp_path / method / "evil.py").exists()
        assert run("eval", tmp_path / method, "--text", text, "--seq-len", 16).exit_code == 0
    assert run("eval", model, "--text", text, "--seq-len", 16).exit_code == 0
    assert not mark.exists()
    configure(model, model_type="evil")
    done = run("compress", model, *common, "-o", tmp_path / "evil")
    assert done.exit_code == 2 and "'evil' is not supported" in done.stderr and not mark.exists()


def test_broken_tokenizer(refuse, folder, tmp_path, run):
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    (model / "tokenizer.json").write_text("{")
    refuse(model, "cannot load the tokenizer", str(model))


@pytest.mark.slow
def test_links_of_the_hubs_cache(folder, ids, tmp_path, run):
    """snapshots/HASH/file → ../../blobs/…: read as it is, also through its hub id."""
    home = tmp_path / "models--owner--model"
    snapshot = home / "snapshots" / "abc"
    for place in (home / "blobs", snapshot, home / "refs"):
        place.mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    for n, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, home / "blobs" / f"{n:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{n:040x}")
    args = ("--method", "svd", "--calibration", str(ids), "--n-samples", "8", "--seq-len", "16", "--json")
    assert run("compress", snapshot, *args, "-o", tmp_path / "a").exit_code == 0
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "planish", "compress", "owner/model", *args, "-o", str(tmp_path / "b")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "base_model: owner/model\n" in (tmp_path / "b" / "README.md").read_text()
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


SOON = ["flat-llm", "a3", "svd-llm", "mpifa", "modegpt", "slicegpt", "palu", "nbl", "llm-drop", "shortgpt", "replaceme"]
SOON += ["erc-svd", "reap", "subfit"]


@pytest.mark.parametrize("method", tiny.pick(SOON, list(list_methods())))
def test_the_smallest_keep_that_is_named_can_be_asked_for(method, tmp_path):
    def make(keep: float):
        return compress(model, output=tmp_path / f"{keep}", keep=keep, method=method, windows=WINDOWS)

    model = tiny.build("llama_gqa", num_hidden_layers=4)
    with pytest.raises(InputError) as caught:
        make(0.001)
    named = re.search(r"the smallest keep is ([\d.]*\d)", str(caught.value))
    if method in ("reap", "hope"):  # of a model without experts
        assert "drops experts" in str(caught.value)
        return
    if method == "modegpt":  # its cap, not its shapes
        assert "cap" in str(caught.value)
        return
    assert named, str(caught.value)
    keep = float(named.group(1))
    assert make(keep).keep <= keep
    with pytest.raises(InputError):
        make(round(keep - 0.0002, 4))


@pytest.mark.parametrize(
    ("keep", "k", "words"),
    [(0.7, 1, ("would keep -0.200 of each", "must lie in 2 … 4")), (0.8, 5, ("k=5 of 4 blocks", "must lie in 1 … 4"))],
)
def test_erc_svd_names_feasible_k(keep, k, words, tmp_path):
    """N·R/k of each of the last k blocks goes, and must stay below 1 − beta."""
    with pytest.raises(InputError) as caught:
        compress(
            tiny.build("llama_gqa", num_hidden_layers=4), output=tmp_path / "out", keep=keep, method="erc-svd",
            windows=WINDOWS, settings={"k": k},
        )  # fmt: skip
    assert all(w in str(caught.value) for w in words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "method", tiny.pick(["svd", "asvd", "a3"], ["flat-llm", "svd-llm", "erc-svd", "svd", "asvd", "auto", "a3"])
)
def test_dead_neurons_and_constant_text(method, tmp_path):
    """Singular Grams of every kind simply work, with every method of the first six."""
    model = tiny.build("qwen2")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "up_proj" in name:
                p[3:20] = 0
            if "v_proj.weight" in name:
                p[2] = 0
            if "layers.1.input_layernorm" in name:
                p[:5] = 0
    for text, windows in (("real", WINDOWS), ("constant", torch.full((16, 24), 7))):
        result = compress(model, output=tmp_path / text, keep=0.6, method=method, windows=windows)
        assert result.keep <= 0.6
        assert torch.isfinite(load(tmp_path / text)(input_ids=WINDOWS).logits).all(), text


def test_a_folder_is_no_hub_id(folder, ids, tmp_path, run, monkeypatch):
    """`models/llama` looks like a hub id; the card must not name it as one."""
    (tmp_path / "models").mkdir()
    shutil.copytree(folder, tmp_path / "models" / "llama")
    monkeypatch.chdir(tmp_path)
    done = run("compress", "models/llama", "--method", "svd", "--calibration", ids, "-o", "out")
    assert done.exit_code == 0, done.output
    assert "base_model" not in (tmp_path / "out" / "README.md").read_text()


def test_vocabulary_padded_beyond_the_tokenizer(tmp_path, run):
    """Embeddings with more rows than the tokenizer has ids, as in qwen2: kept as they are."""
    model = tiny.save(tiny.build("qwen2", vocab_size=128), tmp_path / "model")
    train_tokenizer(model, byte_level=True)
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 200)
    args = ("--method", "flat-llm", "--calibration", tmp_path / "text.txt", "--n-samples", 8, "--seq-len", 16)
    assert run("compress", model, *args, "-o", tmp_path / "out").exit_code == 0
    assert load_config(tmp_path / "out").vocab_size == 128
    assert load(tmp_path / "out").get_input_embeddings().weight.shape[0] == 128


def test_read_only_place(folder, ids, tmp_path, run):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    place = tmp_path / "place"
    place.mkdir(mode=0o500)
    done = run(
        "compress",
        folder,
        "--method",
        "svd",
        "--calibration",
        ids,
        "--n-samples",
        8,
        "--seq-len",
        16,
        "-o",
        place / "out",
    )
    assert done.exit_code == 2 and "cannot create" in done.stderr and "Permission denied" in done.stderr


def test_a_pickle_that_calls_itself_npy(tmp_path, run, folder):
    path = tmp_path / "ids.npy"
    path.write_bytes(b"\x80\x04not an array")
    done = run("compress", folder, "--calibration", path, "-o", tmp_path / "out")
    assert done.exit_code == 2 and "no plain array" in done.stderr and "allow_pickle" not in done.stderr


@pytest.mark.parametrize(
    ("method", "setting", "value"),
    [
        ("flat-llm", "ridge", "-1"), ("flat-llm", "ridge", "nan"), ("flat-llm", "damping", "inf"), ("erc-svd", "k", "-1"),
        ("erc-svd", "beta", "1.5"), ("erc-svd", "beta", "-0.1"), ("erc-svd", "candidates", "0"), ("asvd", "samples", "0"),
        ("asvd", "alpha", "1000000"), ("asvd", "alpha", "-1"), ("auto", "ridge", "-1"), ("subfit", "windows", "-3"),
        ("sleb", "windows", "0"), ("palu", "group", "0"), ("a3", "probes", "0"), ("auto", "shuffled", "2"),
        ("auto", "refit_share", "0"), ("auto", "refit_share", "1.5"), ("auto", "anchor", "7"), ("aa-svd", "anchor", "1.01"),
        ("mpifa", "anchor", "2"), ("mpifa", "spread", "3"), ("mpifa", "attention_keep", "1.5"), ("modegpt", "cap", "1.1"),
        ("auto", "steep", None), ("auto", "units", 3), ("flat-llm", "ridge", []), ("erc-svd", "k", 1.5),
    ],
)  # fmt: skip
def test_numbers_that_no_method_can_use(method, setting, value, tmp_path):
    with pytest.raises(InputError) as caught:
        compress(
            tiny.build("llama_gqa", num_hidden_layers=2), output=tmp_path / "out", keep=0.8, method=method,
            windows=WINDOWS, settings={setting: value},
        )  # fmt: skip
    assert setting in str(caught.value) and not list(tmp_path.iterdir())


def test_a_missing_tensor_is_not_made_up(tmp_path):
    """transformers would go on with random numbers; eval, bench and load refuse, as compress does."""
    folder = tiny.save(tiny.build("llama_gqa"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for use in (planish.load, lambda m: compress(open_source(m), output=tmp_path / "o", keep=0.8, windows=WINDOWS)):
        with pytest.raises(InputError, match=r"tensor model.layers.1.self_attn.k_proj.weight is missing"):
            use(folder)


@torch.no_grad()
def test_a_head_of_its_own_is_kept_whatever_the_configuration_says(tmp_path):
    """tie_word_embeddings with two different matrices stored: transformers does not tie them, so neither does the result."""
    model = tiny.build("llama_tied")
    folder = tiny.save(model, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    dense = planish.load(folder)
    compress(open_source(folder), output=tmp_path / "o", keep=1.0, method="flat-llm", windows=WINDOWS)
    assert not torch.equal(dense.lm_head.weight, dense.model.embed_tokens.weight)
    assert torch.equal(planish.load(tmp_path / "o")(WINDOWS[:2]).logits, dense(WINDOWS[:2]).logits)


@pytest.mark.parametrize("name", ["thesis.txt", "notes/a.json"])
def test_overwrite_replaces_nothing_but_the_model(name, tmp_path):
    model = tiny.build("llama_gqa", num_hidden_layers=2)
    out = tmp_path / "out"
    how = {"output": out, "keep": 0.8, "method": "flat-llm", "windows": WINDOWS, "overwrite": True}
    compress(model, **how)
    other, stale = out / name, out / "model-99999-of-99999.safetensors"
    other.parent.mkdir(exist_ok=True)
    other.write_text("years of work")
    stale.write_bytes(b"of an earlier model")
    compress(model, **how)
    assert other.read_text() == "years of work" and planish.load(out) and not stale.exists()
    assert not (out / "resume").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": "0.8"}, "keep must be a number, got '0.8'"),
        ({"keep": True}, "keep must be a number, got True"),
        ({"kv_keep": [0.5]}, "kv-keep must be a number"),
        ({"max_latency": "3"}, "max-latency must be a number"),
        ({"context": 1.5}, "context must be a whole number"),
        ({"round_to": "8"}, "round-to must be a whole number or auto, got '8'"),
        ({"round_to": "largest"}, "round-to must be a whole number or auto, got 'largest'"),
        ({"round_to": 0}, "round-to must be 1 or more, got 0"),
        ({"seq_len": "16"}, "seq-len must be a whole number"),
        ({"n_samples": 2.5}, "n-samples must be a whole number"),
        ({"calibration": "builtin"}, "tokenizer="),
    ],
)
def test_wrong_types_in_python(options, words, tmp_path):
    model = tiny.build("llama_gqa", num_hidden_layers=2)
    with pytest.raises(InputError, match=re.escape(words)):
        planish.compress(model, output=tmp_path / "out", method="svd-llm", **({"calibration": WINDOWS[0]} | options))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [{"seq_len": 0}, {"seq_len": 1}, {"seq_len": "8"}, {"batch_size": "1"}, {"max_windows": 0.5}], ids=str
)
def test_wrong_numbers_in_evaluate(options):
    with pytest.raises(InputError, match=next(iter(options)).replace("_", "-")):
        planish.evaluate(tiny.build("llama_gqa", num_hidden_layers=2), WINDOWS.flatten(), **options)


def test_a_model_of_one_position():
    model = tiny.build("llama_gqa", num_hidden_layers=2)
    model.config.max_position_embeddings = 1
    for more in ({}, {"seq_len": 2}):
        with pytest.raises(InputError, match="windows of 2 tokens or more do not fit"):
            planish.evaluate(model, WINDOWS.flatten(), **more)
        with pytest.raises(InputError, match="windows of 2 tokens or more do not fit"):
            planish.forecast(model, method="a3", calibration=WINDOWS.flatten(), **more)


@pytest.mark.parametrize(
    ("kind", "words", "not_said"),
    [("F8_E4M3", "is quantised; start from the original weights", "again"), ("U16", "which is not read", "again")],
)
def test_dtypes_that_are_not_read(folder, tmp_path, kind, words, not_said):
    path = shutil.copytree(folder, tmp_path / "model")
    shard = sorted(path.glob("*.safetensors"))[-1]
    raw = shard.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    entry = next(v for n, v in header.items() if n != "__metadata__")
    entry["dtype"], entry["shape"] = (
        kind,
        [32 // int(kind[1:].split("_")[0]), *entry["shape"]],
    )  # as many bytes as before
    new = json.dumps(header).encode()
    shard.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + size :])
    with pytest.raises(InputError, match=words) as caught:
        planish.forecast(path, method="svd-llm")
    assert not_said not in str(caught.value) and kind in str(caught.value)


def test_families_are_listed_once(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "model")
    for kind, near in (("gpt_neo", True), ("zzzz", False)):
        with pytest.raises(InputError, match="is not supported") as caught:
            planish.forecast(configure(path, model_type=kind), method="svd-llm")
        assert ("nearest: " in str(caught.value)) == near
        listed = str(caught.value).partition("supported: ")[2].rstrip(")").split(", ")
        assert "mistral" in listed and len(listed) == len(set(listed))
