"""`compress --bits` on mixtures: every expert rounded for its own tokens, in stacks that llama.cpp runs."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import planish
from planish.calibrate.linears import PRIOR, list_linears, measure_gradients
from planish.calibrate.measure import sweep_back
from planish.calibrate.stream import Stream
from planish.errors import InputError
from planish.export import export
from planish.export.verify import settle, verify
from planish.folder.gguf_file import GGUF
from planish.folder.source import open_folder, open_source
from planish.modelling.canonical import join_block
from planish.request import Request
from planish.rounding import blocks
from planish.rounding.round import Metric, round_matrix
from planish.rounding.types import TYPES, find_type
from planish.sizes.fit import predict
from planish.stats import Tap
from tiny import build, save, windows

pytest.importorskip("xllamacpp", reason="llama.cpp is absent: pip install 'planish[gguf]'")
IDS = windows(12, 24)
WIDE = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 32}
APART = WIDE | {"intermediate_size": 64, "moe_intermediate_size": 32}
MODELS = {
    "mixtral": WIDE, "granitemoe": WIDE, "minimax_m2": WIDE | {"head_dim": 16},
    "gpt_oss": WIDE | {"head_dim": 16, "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                                           "original_max_position_embeddings": 16}},
    "olmoe": WIDE | {"num_key_value_heads": 4}, "qwen3_moe": APART | {"mlp_only_layers": []},
    "qwen2_moe": APART | {"mlp_only_layers": [], "shared_expert_intermediate_size": 32}, "glm4_moe": APART,
    "llama4": WIDE | {
        "num_hidden_layers": 4, "head_dim": 16, "intermediate_size_mlp": 64, "no_rope_layers": [1, 1, 1, 0], "moe_layers": [1, 3],
        "interleave_moe_layer_step": 2, "attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(build("qwen3_moe", **MODELS["qwen3_moe"]), tmp_path_factory.mktemp("experts") / "model")


def compress(model, output, **options):
    options = {
        "keep": 1, "bits": 4, "target": "gguf", "calibration": IDS.flatten().numpy(), "n_samples": 12, "seq_len": 24,
        "method": "reap",
    } | options  # fmt: skip
    return planish.compress(model, output=output, **options)


def read_linears(folder) -> dict[str, torch.Tensor]:
    """Weights of the blocks' linears as planish reads them, by module."""
    source = open_folder(folder)
    return {
        f"{source.family.blocks}.{i}.{n}": m.weight
        for i in range(source.n_blocks)
        for n, m in list_linears(join_block(source.block(i), source.family, apart=True)).items()
    }


def read_manifest(folder) -> dict[str, dict]:
    """What was rounded in the blocks, by module."""
    found = json.loads((folder / "planish.json").read_text())["rounding"]
    return {n: e for n, e in found.items() if n not in ("lm_head", "model.embed_tokens")}


def watch(written, dense) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Behind a first block as it is written: of every expert of the second one the inputs of up and of down, of its tokens."""
    stream, source = Stream(open_folder(written), IDS), open_folder(dense)
    hidden = stream.run(0, stream.place(stream.block(0)), stream.start())
    block, seen = source.block(1), {}
    experts = block.get_submodule(source.family.experts.path)
    for number in experts.numbers:
        for at, linear in enumerate(experts.linears(number)[1:]):
            linear.register_forward_pre_hook(lambda m, args, k=(number, at): seen.setdefault(k, []).append(args[0]))
    stream.run(1, block, hidden)
    return {n: tuple(torch.cat(seen[n, at]).double() for at in (0, 1)) for n in experts.numbers}


def test_every_expert_is_rounded_for_its_own_tokens(model, tmp_path, monkeypatch):
    """The naive program, for the inputs that the written first block gives; and no error above that of rounding to nearest."""
    monkeypatch.setattr(blocks, "balance", lambda *a: [])
    compress(model, tmp_path / "out", bits=3)
    record = read_manifest(tmp_path / "out")
    got, dense = read_linears(tmp_path / "out"), read_linears(model)
    seen = watch(tmp_path / "out", model)
    gradients, _ = measure_gradients(Stream(open_folder(model), IDS))
    tokens, numbers = IDS.numel(), range(len(seen))
    reached = sum(len(x) for x, _ in seen.values())
    assert reached == 2 * tokens and min(len(x) for x, _ in seen.values()) < tokens / 4
    for at, role in enumerate(("up_proj", "down_proj")):
        level = PRIOR * sum(float(seen[n][at].square().sum()) for n in numbers) / reached / seen[0][at].shape[1]
        for n in numbers:
            x, name = seen[n][at], f"model.layers.1.mlp.experts.{n}.{role}"
            moment = (x.T @ x + level * torch.eye(x.shape[1], dtype=torch.float64)) / tokens
            metric = Metric(moment, gradients[1][f"mlp.experts.{n}.{role}"])
            want = round_matrix(dense[name], find_type("iq4_nl"), metric, dtype=torch.float32)
            plain = round_matrix(dense[name], find_type("iq4_nl"), metric, dtype=torch.float32, feedback=False)
            assert float((got[name] != want.value).float().mean()) < 0.01, name  # sums of other order may tip a code
            assert record[name]["nats"] == pytest.approx(want.nats, rel=0.02)
            assert want.nats <= plain.nats


def test_gradients_of_experts_are_those_of_their_tokens(model):
    """By modules' names what `sweep_back` sees at roles, and `PRIOR` tokens more of the mean length."""
    stream = Stream(open_folder(model), IDS)
    found, _ = measure_gradients(stream)
    for role, name in (("up", "up_proj"), ("down", "down_proj")):
        taps = [Tap(f"grad:expert.{n}.{role}.out", "gram") for n in range(8)]
        for i, _, stats in sweep_back(stream, lambda shape, taps=taps: taps, probe="signs"):
            sums, rows = [stats.sums[t]["sum"].diagonal() for t in taps], [stats.tokens[t] for t in taps]
            level = sum(float(s.sum()) for s in sums) / len(sums[0]) / sum(rows)
            for n in range(8):
                want = (sums[n] + PRIOR * level) / (rows[n] + PRIOR)
                assert torch.allclose(found[i][f"mlp.experts.{n}.{name}"], want, atol=1e-9 * float(want.max()))


def slow(*names):
    return [pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize(
    "name", ["granitemoe", *slow("mixtral", "minimax_m2", "gpt_oss", "olmoe", "qwen2_moe", "glm4_moe", "llama4")]
)
def test_llama_cpp_runs_the_stacks_that_are_stored(tmp_path, name):
    """The file holds the folder's own bytes, and gives its logits. Every token reaches all experts: llama.cpp rounds activations
    to 8 bits, and a token between two experts may reach the other one there."""
    top = {"n_group": 1, "topk_group": 1} if name == "glm4_moe" else {}
    dense = save(build(name, **MODELS[name] | {"num_experts_per_tok": 8} | top), tmp_path / "model")
    result = compress(dense, tmp_path / "out")
    assert result.bytes_after == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    weights, source = read_linears(tmp_path / "out"), open_folder(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest.keys() <= weights.keys() and not any("gate.weight" in n or "router" in n for n in manifest)
    assert all(e["bytes"] == TYPES[e["type"]].count(*weights[n].shape) for n, e in manifest.items())
    row = source.family.experts
    assert sum(f".{row.path}." in n for n in manifest) == 8 * 3 * sum(
        bool(source.shape(i).experts) for i in range(source.n_blocks)
    )
    export(tmp_path / "out", "gguf", tmp_path / "m.gguf")
    file = GGUF(tmp_path / "m.gguf")
    assert {"IQ4_NL", "Q8_0"} <= file.count_types().keys() <= {"IQ4_NL", "Q8_0", "F32"}
    place = f"{source.family.blocks}.1.{row.path}"
    down = torch.stack([weights[f"{place}.{n}.{row.names[2]}"] for n in range(8)])
    assert torch.equal(file.read("blk.1.ffn_down_exps.weight", torch.float32).view(down.shape), down)
    compared = verify(tmp_path / "out", "gguf", file=tmp_path / "m.gguf")
    assert compared.passed and compared.settled_logit_difference <= compared.max_logit_difference
    assert compared.max_logit_difference < 0.05 * compared.max_logit


@pytest.mark.parametrize(
    "name", ["mixtral", *slow("qwen3_moe", "qwen2_moe", "olmoe", "glm4_moe", "minimax_m2", "phimoe")]
)
def test_transformers_reads_packed_experts(tmp_path, name):
    """Of one type without zero points, into its stacks: the numbers that planish reads, and its logits; routers stay."""
    pytest.importorskip("compressed_tensors", reason="packing is absent: pip install 'planish[pack]'")
    dense = save(build(name, **MODELS.get(name, WIDE)), tmp_path / "model")
    result = compress(dense, tmp_path / "out", target="hf", keep=0.75)
    manifest, weights = read_manifest(tmp_path / "out"), read_linears(tmp_path / "out")
    assert (
        result.format == "native" and result.keep < 0.8 and set(result.rounding["types"]) >= {"int4-32", "int4-64-asym"}
    )
    assert {e["type"] for n, e in manifest.items() if ".experts." in n} == {"int4-32"}
    theirs, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found.values())
    theirs(IDS[:1])  # decompresses what is no expert
    theirs = torch.nn.Module.float(theirs)
    source = open_folder(tmp_path / "out")
    row, last = source.family.experts, f"{source.family.blocks}.1"
    stacks = theirs.get_submodule(f"{last}.{row.path}")
    for n in range(len(stacks.down_proj)):
        gate, up, down = (weights[f"{last}.{row.path}.{n}.{part}"].float() for part in row.names)
        assert torch.equal(stacks.gate_up_proj[n], torch.cat([gate, up])) and torch.equal(stacks.down_proj[n], down)
    theirs.set_experts_implementation("eager")
    with torch.no_grad():
        want, got = (m(IDS[:2]).logits for m in (planish.load(tmp_path / "out", dtype=torch.float32), theirs))
    assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max())


@pytest.mark.slow
def test_packed_experts_of_unequal_blocks_load_with_planish(model, tmp_path):
    """In planish's own format experts are linears, which compressed-tensors matches by the same expression."""
    pytest.importorskip("compressed_tensors", reason="packing is absent: pip install 'planish[pack]'")
    result = compress(model, tmp_path / "out", target="any", keep=0.8, method="a3")
    assert result.format != "native" and "int4-8" in result.rounding["types"]  # 24 neurons
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        want, got = (m(IDS[:2]).logits for m in (planish.load(tmp_path / "out"), theirs))
    assert torch.equal(got, want)


def test_fewer_experts_are_rounded_too(model, tmp_path):
    """And types that differ: one for each linear of all experts of a block."""
    result = compress(model, tmp_path / "out", keep=0.7, bits=5.2)
    manifest, weights = read_manifest(tmp_path / "out"), read_linears(tmp_path / "out")
    assert result.keep < 0.75
    assert sum(e["bytes"] for e in manifest.values()) <= 5.2 / 8 * sum(weights[n].numel() for n in manifest)
    kinds = {}
    for name, entry in manifest.items():
        if ".experts." in name:
            block, role = name.split(".")[2], name.rpartition(".")[2]
            kinds.setdefault((block, role), []).append(entry["type"])
    assert len(kinds) == 6 and all(len(set(k)) == 1 and 2 <= len(k) < 8 for k in kinds.values())
    assert len({e["type"] for e in manifest.values()}) > 1
    export(tmp_path / "out", "gguf", tmp_path / "m.gguf")
    assert set(GGUF(tmp_path / "m.gguf").count_types()) > {"F32"}


def test_a_token_that_reaches_another_expert_in_llama_cpp_fails_nothing(tmp_path):
    """As long as most tokens' logits are those of the folder; a file of other weights fails."""
    dense = save(build("qwen3_moe", **MODELS["qwen3_moe"]), tmp_path / "model")
    compress(dense, tmp_path / "out")
    compress(dense, tmp_path / "other", bits="q4_0", keep=0.7)
    export(tmp_path / "out", "gguf", tmp_path / "m.gguf")
    found = verify(tmp_path / "out", "gguf", file=tmp_path / "m.gguf", prompt_len=48, new_tokens=4)
    assert found.passed and found.settled_logit_difference < 0.05 * found.max_logit < found.max_logit_difference
    assert not verify(tmp_path / "other", "gguf", file=tmp_path / "m.gguf", prompt_len=48, new_tokens=4).passed


@pytest.mark.slow
def test_one_wrong_expert_fails_though_few_tokens_reach_it(tmp_path):
    """Most tokens' logits are right; all that reach the expert differ."""
    dense = save(build("qwen2_moe", **MODELS["qwen2_moe"]), tmp_path / "model")
    compress(dense, tmp_path / "out")
    export(tmp_path / "out", "gguf", tmp_path / "m.gguf")
    assert verify(tmp_path / "out", "gguf", file=tmp_path / "m.gguf").passed
    entry = GGUF(tmp_path / "m.gguf").tensors["blk.1.ffn_down_exps.weight"]
    assert entry.kind == "IQ4_NL"
    with (tmp_path / "m.gguf").open("r+b") as file:
        file.seek(entry.start + 3 * entry.size // 8)
        file.write((b"\0\x2c" + bytes(16)) * (entry.size // 8 // 18))  # IQ4_NL: all weights -127 / 16
    found = verify(tmp_path / "out", "gguf", file=tmp_path / "m.gguf")
    assert not found.passed and found.settled_logit_difference > found.tolerance * found.max_logit


def test_what_no_token_between_two_experts_explains():
    """A quarter of the tokens may be far off, but not every one of an expert's, where there are a few."""
    near, reached = torch.full((16,), 0.01), torch.arange(16)[:, None] // 4
    some, all_own = near.clone(), near.clone()
    some[[0, 4, 8]] = 1.0
    all_own[8:12] = torch.tensor([0.5, 0.4, 0.6, 1.0])
    assert settle(near, [reached]) == settle(some, [reached]) == pytest.approx(0.01)
    assert settle(all_own, []) == pytest.approx(0.01) and settle(all_own, [reached]) == pytest.approx(0.4)
    some[1:3] = 1.0
    assert settle(some, []) == 1.0
    reached[:8] = torch.arange(8)[:, None] % 4 + 4  # two tokens each: too few to tell
    near[[0, 4]] = 1.0
    assert settle(near, [reached]) == pytest.approx(0.01)


def test_an_expert_that_no_token_reaches_is_rounded(tmp_path):
    dense = build("glm4_moe", **MODELS["glm4_moe"] | {"n_group": 1, "topk_group": 1})
    with torch.no_grad():
        dense.model.layers[1].mlp.gate.e_score_correction_bias[3] = -100.0
    folder = save(dense, tmp_path / "model")
    compress(folder, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    idle = [e for n, e in manifest.items() if ".experts.3." in n]
    assert len(idle) == 3 and all(0 < e["error"] < 0.05 and 0 <= e["nats"] < 1e-2 for e in idle)
    first, second = (read_linears(f)["model.layers.1.mlp.experts.3.down_proj"] for f in (folder, tmp_path / "out"))
    assert 0 < float((first - second).norm() / first.norm()) < 0.2


@pytest.mark.slow
def test_a_size_lets_dropped_experts_and_types_compete(model, tmp_path):
    outside, inner = predict(Request.ask(model="", target="gguf"), open_source(model), "4")
    size = int(outside + 0.9 * inner)
    done = compress(model, tmp_path / "out", keep=None, bits=None, max_bytes=size)
    assert done.bytes_after <= size and done.rounding and not done.warnings
    cut = [c for c in done.choices if c["keep"] < 1 and not c["error"]]
    assert cut and any(r["fits"] for r in done.ladder["rungs"]) is False
    assert min(cut, key=lambda c: c["kl"])["chosen"]


@pytest.mark.parametrize("target", ["gguf", *slow("hf")])
def test_predicted_bytes_are_at_least_those_written(model, tmp_path, target):
    outside, inner = predict(Request.ask(model="", target=target), open_source(model), "4")
    done = compress(model, tmp_path / "out", target=target)
    assert 0.9 * (outside + inner) < done.bytes_after <= outside + inner


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("mixtral", {"target": "vllm"}, "packed ones have not been tried in vLLM"),
        ("granitemoe", {"target": "hf"}, "stores its experts stacked, where transformers reads no packed integers"),
        ("mixtral", {"target": "hf", "bits": "int4-32-asym"}, "experts of one type without zero points"),
        ("mixtral", {"target": "hf", "bits": 3.4}, "ask for --bits 3 or int3-64"),
        ("deepseek_v3", {}, r"has linears of its own \(latent\)"),
        ("qwen3_5_moe", {}, r"has linears of its own \(mixer\)"),
    ],
)
def test_what_is_not_rounded_is_said(tmp_path, name, options, words):
    with pytest.raises(InputError, match=words):
        compress(save(build(name), tmp_path / "model"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
