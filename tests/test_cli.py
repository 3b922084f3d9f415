"""The command line and the Python API, as a user meets them: results, one-line errors, exit codes, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import planish
import tiny
from planish import api
from planish.errors import InputError
from planish.folder import load as loading
from planish.folder import writer
from planish.methods import list_methods

METHODS = tuple(list_methods())
SHORT = ["--n-samples", "8", "--seq-len", "16"]


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def change(folder: Path, name: str, value: float) -> None:
    """Set the first element of a tensor in whichever shard holds it."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name].view(-1)[0] = value
            save_file(tensors, path, metadata={"format": "pt"})
            return
    raise KeyError(name)


def check_refused(result, tmp_path: Path, *words: str) -> None:
    """Exit 2, one line on stderr that has all the words, nothing on stdout, no output folder and no remains of one."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert result.stdout == ""
    for word in words:
        assert word in lines[0], lines[0]
    left = {p.name for p in tmp_path.iterdir()} - {"model", "text.txt", "ids.npy", "kept"}
    assert not left, left


# ---------------------------------------------------------------- what works


@pytest.mark.parametrize("method", tiny.pick(["flat-llm", "a3", "subfit", "auto"], METHODS))
def test_plan_agrees_with_compress(method, folder, ids, tmp_path, run):
    common = [folder, "--keep", "0.75", "--method", method, "--calibration", ids, *SHORT, "--json"]
    planned, done = run("plan", "--measure", *common), run("compress", *common, "-o", tmp_path / "out")
    if done.exit_code == 2:  # a method may be too coarse for three blocks; then its plan says so too
        assert planned.exit_code == 2 and planned.stderr == done.stderr
        pytest.skip(done.stderr.strip())
    assert done.exit_code == planned.exit_code == 0, (planned.output, done.output)
    a, b = json.loads(planned.stdout), json.loads(done.stdout)
    for key in (
        "method", "keep_requested", "keep", "params_before", "block_params_before", "block_params_after",
        "kv_bytes_per_token_before", "kv_bytes_per_token_after",
    ):  # fmt: skip
        assert a[key] == b[key], key
    assert b["keep"] <= 0.75
    assert sum(u["after"] for u in a["units"]) - sum(u["before"] for u in a["units"]) == (
        b["block_params_after"] - b["block_params_before"]
    )


def test_compress_json_and_manifest(folder, ids, tmp_path, run):
    result = run(
        "compress", folder, "--keep", "0.8", "--method", "flat-llm", "--calibration", ids, *SHORT, "--seed", "3",
        "--set", "allocation=uniform", "--sampling", "random", "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {
        "method", "keep_requested", "keep", "params_before", "params_after", "block_params_before", "block_params_after",
        "kv_bytes_per_token_before", "kv_bytes_per_token_after", "seconds", "peak_rss_bytes", "output",
    } <= set(found)  # fmt: skip
    written = sum(
        t.numel()
        for p in (tmp_path / "out").glob("*.safetensors")
        for t in load_file(p).values()
        if t.is_floating_point()
    )
    assert found["params_after"] == written < found["params_before"]
    phases = {k: v for k, v in found["seconds"].items() if k != "total"}
    assert 0 < sum(phases.values()) <= found["seconds"]["total"]
    manifest = json.loads((tmp_path / "out" / "planish.json").read_text())
    record = manifest["calibration"]
    assert {k: record[k] for k in ("n_samples", "seq_len", "seed", "sampling", "bos")} == {
        "n_samples": 8, "seq_len": 16, "seed": 3, "sampling": "random", "bos": "auto",
    }  # fmt: skip
    assert record["source"] == ids.name and re.fullmatch("[0-9a-f]{64}", record["fingerprint"])
    assert manifest["settings"]["allocation"] == "uniform"


def test_eval_json_is_the_formula(folder, ids, run):
    result = run("eval", folder, "--text", ids, "--seq-len", "32", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    tokens = torch.from_numpy(np.load(ids))
    windows = tokens[: len(tokens) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        logp = loading.load(folder)(windows).logits[:, :-1].float().log_softmax(-1)
    nll = -logp.gather(-1, windows[:, 1:, None]).mean().item()
    assert found["nll"] == pytest.approx(nll, rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(nll), rel=1e-5)
    assert (found["windows"], found["tokens"], found["seq_len"]) == (30, 930, 32)
    assert found["dtype"] == "float32" and found["source"] == str(ids) and found["bos"] is False


def test_output_for_people(folder, ids, tmp_path, run):
    done = run("compress", folder, "--method", "svd-llm", "--calibration", ids, *SHORT, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "svd-llm" in done.stdout and "KV cache" in done.stdout and "peak memory" in done.stdout
    assert "perplexity" in run("eval", tmp_path / "out", "--text", ids, "--seq-len", "32").stdout
    planned = run("plan", folder, "--method", "svd-llm", "--calibration", ids, *SHORT)
    assert planned.exit_code == 0 and "nothing is written" in planned.stdout


def test_short_text_is_used_whole_with_a_note(folder, ids, tmp_path, run):
    result = run("compress", folder, "--method", "svd", "--calibration", ids, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    notes = json.loads(result.stdout)["warnings"]
    assert any("seq_len 64" in n for n in notes) and any("n_samples 15" in n for n in notes)
    assert "note: seq_len 64" in result.stderr


@pytest.mark.parametrize("method", ["a3", "modegpt"])
def test_queries_and_keys_that_are_left_are_named(method, ids, tmp_path, run):
    """Families that normalise q and k: compress and plan say that those stay; others say nothing."""
    model = tiny.save(tiny.build("qwen3"), tmp_path / "qwen3")
    options = ("--method", method, "--calibration", ids, *SHORT)
    done = run("compress", model, *options, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    left = "note: queries and keys are left as they are: this family normalises them"
    assert left in done.stderr and left in run("plan", model, *options).stderr
    plain = tiny.save(tiny.build("qwen2"), tmp_path / "qwen2")
    assert "left as they are" not in run("compress", plain, *options, "-o", tmp_path / "out2").stderr


def test_methods_lists_and_explains(run):
    listed = json.loads(run("methods", "--json").stdout)["methods"]
    assert [m["name"] for m in listed] == list(METHODS)
    assert all(m["title"] and m["reference"] for m in listed)
    one = json.loads(run("methods", "ressvd", "--json").stdout)
    assert one["name"] == "erc-svd"
    assert {"name": "beta", "type": "float", "default": 0.05} in one["settings"]
    assert "plain | whitened" in run("methods", "erc-svd").stdout
    assert all(run("methods", m).exit_code == 0 for m in METHODS)


def test_doctor_compresses_a_model(run):
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["self_test"]["passed"] and found["versions"]["planish"] == planish.__version__
    assert "planish[report]" in json.dumps(found["extras"])


def test_import_offers_functions_and_modules():
    import planish.compression
    import planish.evaluate.speed
    from planish.evaluate.perplexity import evaluate

    assert (
        callable(planish.compress)
        and callable(planish.evaluate)
        and evaluate.__module__ == "planish.evaluate.perplexity"
    )
    assert planish.compress is api.compress and planish.load is api.load


def test_python_api_in_memory(tmp_path):
    model = tiny.build("qwen2")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    ids = tiny.windows(20, 24).flatten()
    small = planish.compress(model, keep=0.7, method="svd-llm", calibration=ids, seq_len=24)
    assert isinstance(small, torch.nn.Module)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    result = planish.compress(model, keep=0.7, method="svd-llm", calibration=ids, seq_len=24, output=tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(small(ids[None, :16]).logits, planish.load(result.output)(ids[None, :16]).logits)
    one, other = planish.evaluate(small, ids, 24), planish.evaluate(tmp_path / "out", ids, 24)
    assert one == other and one.windows == 20
    assert planish.evaluate(small, ids, 24, max_windows=5).windows == 5


@pytest.mark.parametrize("method", tiny.pick(["a3", "svd-llm", "erc-svd"], METHODS))
def test_dead_neurons_and_constant_inputs_work(method, tmp_path):
    """A neuron that never fires, a silent head, and a text of one token: singular Grams everywhere."""
    model = tiny.build("llama_gqa")
    block = model.model.layers[1]
    with torch.no_grad():
        block.mlp.up_proj.weight[3] = 0
        block.self_attn.v_proj.weight[:8] = 0
    for calibration in (tiny.windows().flatten(), torch.full((288,), 5)):
        try:
            result = planish.compress(
                model, keep=0.75, method=method, calibration=calibration, seq_len=24, n_samples=12,
                output=tmp_path / "out", overwrite=True,
            )  # fmt: skip
        except InputError as error:
            if "keep" not in str(error):
                raise
            pytest.skip(f"too coarse for three blocks: {error}")
        with torch.no_grad():
            assert planish.load(result.output)(tiny.windows(2)).logits.isfinite().all()


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def refuse(folder, ids, tmp_path, run):
    """Run `compress` with changed arguments and check that it refuses."""

    def check(*words: str, model: Path | str = folder, text: Path | str = ids, extra: list[str] | None = None) -> None:
        base = ["compress", model, "--method", "flat-llm", "--calibration", text, "-o", tmp_path / "out", "--json"]
        check_refused(run(*base, *(SHORT if extra is None else extra)), tmp_path, *words)

    return check


def test_no_such_model(refuse):
    refuse("no such model", "nowhere", model="nowhere")


def test_folder_without_config(refuse, tmp_path):
    (tmp_path / "model").mkdir()
    refuse("config.json", model=tmp_path / "model")


def test_unknown_family(refuse, folder, tmp_path):
    model = copy(folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    refuse("'lama'", "llama", model=model)


def test_missing_shard(refuse, folder, tmp_path):
    model = copy(folder, tmp_path / "model")
    shard = sorted(model.glob("*.safetensors"))[2]
    shard.unlink()
    refuse(shard.name, "missing", model=model)


def test_truncated_shard(refuse, folder, tmp_path):
    model = copy(folder, tmp_path / "model")
    shard = max(model.glob("*.safetensors"), key=lambda p: p.name)
    shard.write_bytes(shard.read_bytes()[:-100])
    refuse(shard.name, model=model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(refuse, folder, tmp_path, value):
    model = copy(folder, tmp_path / "model")
    change(model, "model.layers.2.mlp.up_proj.weight", value)
    refuse("model.layers.2.mlp.up_proj.weight", "NaN or infinity", model=model)


def test_tensor_of_another_shape(refuse, folder, tmp_path):
    model = copy(folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    refuse("mlp", "expected", model=model)


def test_unknown_method_names_the_nearest(refuse):
    refuse("flat_lm", "'flat-llm'", extra=["--method", "flat_lm"])


@pytest.mark.parametrize("keep", ["0", "-0.5", "1.2", "nan"])
def test_keep_out_of_range(refuse, keep):
    refuse("(0, 1]", extra=["--keep", keep, *SHORT])


def test_keep_that_cannot_be_reached_names_the_smallest(refuse, folder, ids, tmp_path, run):
    refuse("the smallest keep is", extra=["--keep", "0.05", *SHORT])
    base = ["compress", folder, "--method", "flat-llm", "--calibration", ids, *SHORT, "-o", tmp_path / "out", "--json"]
    smallest = re.search(r"smallest keep is ([\d.]+)", run(*base, "--keep", "0.05").stderr).group(1).rstrip(".")
    assert json.loads(run(*base, "--keep", smallest).stdout)["keep"] <= float(smallest)


def test_too_few_tokens_for_a_gram(refuse, folder, ids, tmp_path, run):
    refuse("20 tokens", "44", "--set damping", extra=["--n-samples", "2", "--seq-len", "10"])
    done = run(
        "compress", folder, "--method", "flat-llm", "--calibration", ids, "--n-samples", "2", "--seq-len", "10",
        "--set", "damping=0.01", "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output


def test_damping_is_not_offered_where_there_is_none(refuse):
    refuse("use at least 44 tokens", extra=["--method", "svd-llm", "--n-samples", "2", "--seq-len", "10"])


def test_more_windows_than_the_text_holds(refuse):
    refuse("40 contiguous windows", extra=["--n-samples", "41", "--seq-len", "24"])


def test_empty_text(refuse, stories_dir, tmp_path):
    (tmp_path / "text.txt").write_text(" \n")
    refuse("text.txt", "white space", model=stories_dir, text=tmp_path / "text.txt")


def test_text_without_a_tokenizer(refuse, tmp_path):
    (tmp_path / "text.txt").write_text("once upon a time")
    refuse("tokenizer", ".npy", text=tmp_path / "text.txt")


def test_no_such_text(refuse):
    refuse("does not exist", "nothing.txt", text="nothing.txt")


def test_token_ids_beyond_the_vocabulary(refuse, tmp_path):
    np.save(tmp_path / "ids.npy", np.array([1, 2, 97] * 100))
    refuse("97", "0 to 96", "position 2", text=tmp_path / "ids.npy")


def test_windows_longer_than_the_positions(refuse):
    refuse("65", "64 positions", extra=["--seq-len", "65"])


def test_output_that_is_not_empty(folder, ids, tmp_path, run):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "precious.txt").write_text("mine")
    base = ["compress", folder, "--method", "svd", "--calibration", ids, *SHORT, "-o", kept, "--json"]
    for more in ((), ("--overwrite",)):
        check_refused(run(*base, *more), tmp_path, str(kept), "planish has not written")
    assert (kept / "precious.txt").read_text() == "mine"
    (kept / "precious.txt").unlink()
    assert run(*base).exit_code == 0 and (kept / "planish.json").exists()
    (kept / "precious.txt").write_text("mine")
    check_refused(run(*base), tmp_path, str(kept), "--overwrite")
    assert run(*base, "--overwrite").exit_code == 0 and (kept / "planish.json").exists()
    assert (kept / "precious.txt").read_text() == "mine"  # no saver of models put it there


def test_output_never_replaces_the_model(folder, ids, tmp_path, run):
    model = copy(folder, tmp_path / "model")
    before = {p.name for p in model.iterdir()}
    for output in (model, tmp_path):
        result = run("compress", model, "--calibration", ids, *SHORT, "-o", output, "--overwrite")
        check_refused(result, tmp_path, "would replace the model")
    assert {p.name for p in model.iterdir()} == before


def test_failure_leaves_the_old_output_alone(folder, ids, tmp_path, run):
    model = copy(folder, tmp_path / "model")
    change(model, "model.layers.2.mlp.up_proj.weight", float("nan"))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old.txt").write_text("old")
    (tmp_path / "kept" / "planish.json").write_text("{}")
    result = run("compress", model, "--calibration", ids, *SHORT, "-o", tmp_path / "kept", "--overwrite")
    check_refused(result, tmp_path, "NaN")
    assert (tmp_path / "kept" / "old.txt").read_text() == "old"


@pytest.mark.parametrize("at", [1, 3])
def test_disk_full(at, refuse, monkeypatch):
    real, calls = writer.write_shard, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(writer, "write_shard", full)
    refuse("No space left")


@pytest.mark.parametrize("name", ["request.json", "config.json", "planish.json"])
def test_disk_full_at_a_small_file(name, refuse, monkeypatch):
    real = writer.write_text

    def full(path, text):
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, text)

    monkeypatch.setattr(writer, "write_text", full)
    refuse("No space left", name)


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("rigde=1", ("'rigde'", "'ridge'")),
        ("ridge=much", ("ridge", "float")),
        ("allocation=flat", ("allocation", "iprs, uniform")),
        ("ridge", ("--set name=value",)),
    ],
)
def test_wrong_settings(refuse, pair, words):
    refuse(*words, extra=["--set", pair])


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--device", "tpu"], ("--device", "tpu")),
        (["--n-samples", "0"], ("--n-samples",)),
        (["--colour", "red"], ("--colour",)),
        (["--keep", "most"], ("--keep",)),
        (["--method", "shortgpt", "--sparsity", "0.25", "--max-params", "100000"], ("--sparsity", "--max-params")),
    ],
)
def test_usage_errors_are_one_line(refuse, extra, words):
    refuse(*words, extra=extra)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_absent_device(refuse):
    refuse("no cuda device", "--device cpu", extra=["--device", "cuda"])


def test_eval_refuses_in_one_line(folder, ids, tmp_path, run):
    check_refused(run("eval", "nowhere", "--text", ids), tmp_path, "no such model")
    check_refused(run("eval", folder, "--text", ids, "--seq-len", "65"), tmp_path, "64")
    check_refused(run("eval", folder, "--text", "x.txt", "--json"), tmp_path, "x.txt")
    check_refused(run("eval", folder, "--text", ids, "--seq-len", "1"), tmp_path, "--seq-len")


# ---------------------------------------------------------------- how it ends


def test_our_bug_exits_1_without_a_traceback(refuse, folder, ids, tmp_path, run, monkeypatch):
    monkeypatch.setattr(api, "read_calibration", lambda *a: 1 / 0)
    args = ["compress", folder, "--calibration", ids, "-o", tmp_path / "out"]
    result = run(*args)
    assert result.exit_code == 1 and result.stdout == ""
    assert "ZeroDivisionError" in result.stderr and "PLANISH_DEBUG=1" in result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.setenv("PLANISH_DEBUG", "1")
    assert "Traceback" in run(*args).stderr


def test_interrupt_exits_130_and_leaves_nothing(folder, ids, tmp_path, run, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "write_shard", stop)
    result = run("compress", folder, "--calibration", ids, *SHORT, "-o", tmp_path / "out")
    assert result.exit_code == 130 and "interrupted" in result.stderr
    assert not list(tmp_path.iterdir())


def call(*args: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "planish", *map(str, args)], capture_output=True, text=True, env=environment, timeout=280
    )


def test_process_json_alone_on_stdout(folder, ids, tmp_path):
    done = call(
        "compress", folder, "--method", "flat-llm", "--calibration", ids, *SHORT, "-o", tmp_path / "out", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and json.loads(done.stdout)["format"] == "planish"
    assert "Traceback" not in done.stderr and "Loading" not in done.stderr


def test_help_does_not_wait_for_torch():
    code = "import sys; sys.argv = ['planish']; import planish.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.stdout.strip() == "False", done.stderr
    done = call("--help")
    assert done.returncode == 0 and "compress" in done.stdout


def test_demo_writes_chart_table_and_model(stories_dir, tmp_path, run):
    for _ in range(2):  # an existing folder is no obstacle
        result = run("demo", "--model", stories_dir, "-o", tmp_path / "demo", "--quick", "--limit", "1e-9", "--json")
        assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert all(r["skipped"] for r in found["rows"]) and found["completions"]["dense"]
    assert all((tmp_path / "demo" / f"demo.{kind}").is_file() for kind in ("html", "svg", "json"))


def test_demo_without_its_model_says_so(tmp_path, run, monkeypatch):

    from planish.cli import showcase

    monkeypatch.setattr(showcase, "MODEL", tmp_path / "absent")
    check_refused(run("demo", "-o", tmp_path / "demo"), tmp_path, "embedded demo model is missing", "--model")


def test_eval_beside_the_dense_model(folder, ids, run):
    """--against measures a second model on the same text; options of tasks are refused beside a text."""
    done = run("eval", folder, "--text", ids, "--seq-len", "16", "--against", folder, "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["against"]["nll"] == found["nll"]
    assert "+0.00000 nats" in run("eval", folder, "--text", ids, "--seq-len", "16", "--against", folder).stdout
    refused = run("eval", folder, "--text", ids, "--limit", "3")
    assert refused.exit_code == 2 and "--limit goes with --tasks" in refused.stderr
    refused = run("eval", folder, "--text", ids, "--tasks", "x.jsonl")
    assert refused.exit_code == 2 and "two measurements" in refused.stderr


# ---------------------------------------------------------------- verify


def test_verify_exits_2_where_a_target_differs(run, tmp_path, monkeypatch):
    from planish.export import verify

    model = tiny.save(tiny.build("llama_gqa", num_hidden_layers=2), tmp_path / "model")
    short = ("--target", "hf", "--prompt-len", "8", "--new-tokens", "2")
    done = run("verify", model, *short)
    assert done.exit_code == 0 and "hf the same as transformers (tolerance 0.0001)" in done.stdout
    other = verify.Transformers(tiny.build("llama_mha", num_hidden_layers=2))
    monkeypatch.setattr(verify, "open_target", lambda *_: (other, "other"))
    done = run("verify", model, *short, "--json")
    assert done.exit_code == 2 and json.loads(done.stdout)["passed"] is False


def test_verify_only_reports_what_compression_changed(run, tmp_path):
    """Its help says so, and it exits 0."""
    model = tiny.save(tiny.build("llama_gqa", num_hidden_layers=2), tmp_path / "model")
    dense = tiny.save(tiny.build("llama_mha", num_hidden_layers=2), tmp_path / "dense")
    done = run("verify", model, "--target", "hf", "--prompt-len", "8", "--new-tokens", "2", "--dense-reference", dense)
    assert done.exit_code == 0 and f"hf differs from {dense} (tolerance 0.0001)" in done.stdout
    words = " ".join(run("verify", "--help", env={"COLUMNS": "200"}).stdout.replace("│", " ").split())
    assert "Exit 2 if they differ; with --dense-reference differences are only reported" in words
    assert "differences are then only reported" in words


@pytest.mark.parametrize("target", ["hf", "vllm"])
def test_verify_runs_no_file_where_the_target_takes_a_folder(target, run, tmp_path):
    model = tiny.save(tiny.build("llama_gqa", num_hidden_layers=2), tmp_path / "model")
    done = run("verify", model, "--target", target, "--file", tmp_path / "m.gguf")
    check_refused(done, tmp_path, f"verify --target {target} runs the folder itself; --file is for gguf and onnx")


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_threads_do_not_wait_long_and_know_it_before_torch_is_there(given, expected):
    code = (
        "import os, sys; sys.argv = ['planish']; import planish.cli as cli; "
        "cli.app = lambda **_: print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT')); cli.main()"
    )
    environment = {n: v for n, v in os.environ.items() if n not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["False", expected], done.stderr
