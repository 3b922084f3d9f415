"""Targets constrain what is cut before anything is solved."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import compressed
import tiny
from planish.calibrate.stream import Stream
from planish.cli import app
from planish.core import Unit
from planish.errors import InputError
from planish.export.gguf import export_gguf
from planish.export.verify import verify
from planish.folder.source import open_source
from planish.methods import find_method
from planish.plan import uniform
from planish.plan.allocate import Curve
from planish.plan.footprint import footprint
from planish.plan.spread import BudgetError
from planish.plan.targets import (
    TARGETS,
    check_plan,
    constrain,
    describe_limits,
    find_target,
    fit_target,
    make_uniform,
    needs_uniform,
)
from planish.request import Request
from posed import pose_on
from tiny import build, compress

SIZES = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 128}


def units_of(method: str, model="llama_gqa", **settings):
    source = open_source(build(model, **SIZES))
    shapes = [source.shape(i) for i in range(source.n_blocks)]
    solvers = find_method(method, settings).solvers()
    return {u: s for s in solvers for shape in shapes for u in s.units(shape)}, shapes


def test_unknown_targets_are_named():
    with pytest.raises(InputError, match="unknown target 'tpu'; expected one of any, hf, onnx, vllm, gguf"):
        find_target("tpu")


@pytest.mark.parametrize("target", ["any", "hf", "onnx"])
def test_some_targets_ask_for_nothing(target):
    units, shapes = units_of("svd-llm")
    assert constrain(find_target(target), "svd-llm", units, shapes) == units


def test_widths_suit_onnx_runtime():
    """All that a3 cuts may be cut, in steps."""
    units, shapes = units_of("a3")
    for unit, solver in constrain(find_target("onnx"), "a3", units, shapes).items():
        full, step = units[unit].ranks(unit, shapes[unit.block])[-1], TARGETS["onnx"].steps[unit.name]
        assert {r % step for r in solver.ranks(unit, shapes[unit.block]) if r < full} == {0}


def test_auto_steps_are_the_targets_own():
    """On the command line, in Python and in recipes; a number is a step beside them."""
    asked = [Request.ask(model="", target="onnx", **more) for more in ({}, {"round_to": "auto"}, {"round_to": 1})]
    assert asked[0] == asked[1] == asked[2] != Request.ask(model="", target="onnx", round_to=32)
    refused = "round-to must be a whole number or auto, got '1.5'"
    for text, words in (
        ("auto", "no such model"),
        ("32", "no such model"),
        ("0", "round-to must be 1"),
        ("1.5", refused),
    ):
        assert words in CliRunner().invoke(app, ["plan", "/none", "--round-to", text]).output


def test_low_rank_methods_are_refused_for_gguf():
    units, shapes = units_of("svd-llm")
    with pytest.raises(InputError, match="svd-llm gives a low-rank linear and nothing else; llama"):
        constrain(find_target("gguf"), "svd-llm", units, shapes)


def test_units_that_a_target_cannot_hold_are_left_alone():
    units, shapes = units_of("a3")
    assert {u.name for u in units} == {"qk", "vo", "mlp"}
    kept = constrain(find_target("gguf"), "a3", units, shapes)
    assert {u.name for u in kept} == {"vo", "mlp"}
    for unit, solver in kept.items():
        step = TARGETS["gguf"].steps[unit.name]
        ranks = solver.ranks(unit, shapes[unit.block])
        full = units[unit].ranks(unit, shapes[unit.block])[-1]
        assert all(r % step == 0 or r == full for r in ranks) and ranks[-1] == full


@pytest.mark.parametrize(("width", "step"), [(1024, 32), (2048, 64)])
def test_wide_mlps_go_in_longer_steps(width, step):
    """32 × 64 neurons or more: multiples of 64, so that llama.cpp's f16 product has no rest."""
    source = open_source(build("llama_gqa", hidden_size=64, head_dim=32, intermediate_size=width))
    shapes = [source.shape(0)]
    (solver,) = (s for s in find_method("flat-llm", {}).solvers() if any(u.name == "mlp" for u in s.units(shapes[0])))
    (unit,) = (u for u in solver.units(shapes[0]) if u.name == "mlp")
    ranks = list(constrain(find_target("gguf"), "flat-llm", {unit: solver}, shapes)[unit].ranks(unit, shapes[0]))
    assert [r for r in ranks if r] == list(range(step, width + 1, step))


def test_uniform_ranks_are_the_best_that_fit():
    """Against every combination by hand; plans without value dimensions are left alone."""
    plan = {Unit(0, "vo"): 16, Unit(1, "vo"): 24, Unit(0, "mlp"): 64, Unit(1, "mlp"): 96}
    gguf = find_target("gguf")
    assert needs_uniform(gguf, plan) and not needs_uniform(find_target("any"), plan)
    assert not needs_uniform(gguf, {u: r for u, r in plan.items() if u.name == "mlp"}), "deci has widths per block"
    torch.manual_seed(0)
    ranks = {"vo": torch.arange(0, 33, 8), "mlp": torch.arange(0, 129, 32)}
    curves = {
        u: Curve(u, r := ranks[u.name], r * (3.0 + u.block), torch.rand(len(r)).double().cumsum(0).flip(0))
        for u in plan
    }
    by_hand = {
        (v, m): [
            sum(
                float(f[c.ranks == (v if u.name == "vo" else m)])
                for u, c in curves.items()
                for f in [getattr(c, which)]
            )
            for which in ("cost", "loss")
        ]
        for v in range(0, 33, 8)
        for m in range(0, 129, 32)
    }
    for budget in (100, 400, 700, 1200):
        found = make_uniform(gguf, plan, curves, budget)
        v, m = found[Unit(0, "vo")], found[Unit(0, "mlp")]
        assert found == {u: {"vo": v, "mlp": m}[u.name] for u in plan}
        fitting = [loss for cost, loss in by_hand.values() if cost <= budget]
        assert by_hand[v, m][0] <= budget and by_hand[v, m][1] == pytest.approx(min(fitting))
    with pytest.raises(BudgetError):
        make_uniform(gguf, plan, curves, -1)


@pytest.mark.parametrize("method", ["flat-llm", "a3", "modegpt", "auto"])
def test_equal_ranks_spend_the_budget(method):
    """No kind could have one step more, and the predicted loss is not above that of the least rank of each kind."""
    source = open_source(build("llama_gqa", **SIZES))
    settings = {"units": "structural"} if method == "auto" else {"damping": 0.01}
    job = pose_on(Stream(source, tiny.windows(16, 24)), find_method(method, settings), 0.7, target="gguf")
    planned = job.plan()
    plan = planned.ranks
    cut = {n: {r for u, r in plan.items() if u.name == n} for n in ("vo", "mlp")}
    assert all(len(ranks) == 1 for ranks in cut.values())
    assert job.left(plan) >= 0
    for name, (rank,) in ((n, tuple(r)) for n, r in cut.items()):
        unit = Unit(0, name)
        higher = [r for r in job.problem.units[unit].ranks(unit, job.problem.shapes[0]) if r > rank]
        if higher:
            assert job.left({u: higher[0] if u.name == name else r for u, r in plan.items()}) < 0
    least = job.method.plan(job.problem, job.measure).ranks
    least = {u: min(r for w, r in least.items() if w.name == u.name) for u in plan}
    loss = [sum(float(planned.frontiers[u].loss[r]) for u, r in p.items()) for p in (plan, least)]
    assert loss[0] <= loss[1] * (1 + 1e-12)


def test_blocks_that_a_plan_leaves_whole_come_along():
    """`auto` may leave a block's values alone, or remove its attention: equal ranks are asked of all that is left."""
    source = open_source(build("llama_gqa", **SIZES))
    settings = {"units": "structural", "bypass": True}
    job = pose_on(Stream(source, tiny.windows(16, 24)), find_method("auto", settings), 0.7, target="gguf")
    planned = job.plan()
    vo, mlp, attention = ([u for u in sorted(job.problem.units) if u.name == n] for n in ("vo", "mlp", "attention"))
    left = {vo[0]: 8, attention[2]: 0} | dict.fromkeys(mlp, 64)
    plan = uniform.make_uniform(job.problem, job.measure, replace(planned, ranks=left)).ranks
    assert set(plan) == {*left, vo[1]} and plan[vo[0]] == plan[vo[1]] and plan[attention[2]] == 0
    assert len({plan[u] for u in mlp}) == 1


GRAPHS = {"llama_gqa": ("mimo2", "value"), "mistral": ("mimo2", "value")} | {  # what llama.cpp runs it as, why not mimo2
    "llama_tied": ("deci", "stores a tied embedding twice"), "llama_rope3": ("deci", "has no rotary scaling"),
    "llama_bias": ("deci", "has no biases"), "qwen2": ("deci", "has no biases"),
    "qwen3": ("qwen3", "has no norms of queries and keys"), "granite": ("granite", "has all blocks alike"),
}  # fmt: skip


COMPRESSED = [("llama_gqa", "flat-llm"), *((f, m) for f in GRAPHS for m in ("a3", "auto"))]
SOON = [c for c in COMPRESSED if c[1] == "a3"] + [("llama_gqa", "auto"), ("qwen3", "auto"), ("llama_rope3", "auto")]


@pytest.mark.parametrize(("family", "method"), tiny.pick(SOON, COMPRESSED))
def test_what_is_compressed_for_gguf_needs_no_filling(family, method, tmp_path):
    """Not one weight more in the file than in the folder, and the budget is spent on what the family's graph holds."""
    more = {} if family in ("llama_tied", "qwen3") else {"tie_word_embeddings": False}
    model = build(family, **SIZES, **more)
    result = compress(
        model, output=tmp_path / "m", keep=0.7, method=method, windows=tiny.windows(16, 24), target="gguf",
        settings={} if method == "auto" else {"damping": "0.01"},
    )  # fmt: skip
    assert 0.5 < result.keep <= 0.7
    specs = json.loads((tmp_path / "m" / "config.json").read_text()).get("planish", {}).get("blocks", [])
    source = open_source(model)
    shapes = [source.shape(i) for i in range(source.n_blocks)]
    assert not {n for f in map(footprint, specs, shapes) for n in f.needs} & set(
        fit_target("gguf", source, shapes).refuses
    )
    written = export_gguf(tmp_path / "m", tmp_path / "m.gguf", dtype="f32")
    table = SIZES["head_dim"] // 2 if family == "llama_rope3" else 0  # frequency factors, which are no weights
    assert written.parameters == written.stored_parameters + table
    architecture, why = GRAPHS[family]
    assert written.architecture in (architecture, "llama" if architecture == "deci" else architecture)
    limits = describe_limits(fit_target("gguf", source, shapes))
    assert any(why in line for line in limits)
    assert (architecture == "mimo2") == any(line.startswith("value dimensions in multiples of 8") for line in limits)
    assert (architecture == "deci") == ("neurons in multiples of 32 (64 from 2048 on)" in limits)


@pytest.mark.parametrize("family", ["opt", "llama_yarn", "llama_dynamic", "phimoe", "olmoe"])
def test_models_that_no_file_holds_are_refused_before_anything_is_cut(family, tmp_path):
    from planish.api import forecast

    messages = {"opt": "llama.cpp has no graph of opt", "phimoe": "GGUF export does not write phimoe"}
    message = messages.get(
        family, "llama.cpp's graph of olmoe needs as many" if family == "olmoe" else "rotary embedding"
    )
    with pytest.raises(InputError, match=f"--target gguf: {message}.*or compress for --target any"):
        forecast(build(family), target="gguf", keep=0.7, method="flat-llm", calibration=tiny.windows(4, 8).numpy())
    with pytest.raises(InputError, match=message):
        compress(
            build(family), output=tmp_path / "m", keep=0.7, method="flat-llm", windows=tiny.windows(4, 8), target="gguf"
        )
    assert not list(tmp_path.iterdir())


def test_blocks_without_a_part_are_refused_where_one_graph_is_all_there_is():
    """qwen3's graph: a block goes whole or not at all, and no linear map takes its place."""
    source = open_source(build("qwen3", **SIZES))
    target = fit_target("gguf", source, [source.shape(i) for i in range(source.n_blocks)])
    for method, what in (("subfit", "linear attention"), ("nbl", "raw linear attention")):
        with pytest.raises(InputError, match=f"{method} gives a {what} and nothing else"):
            constrain(target, method, *units_of(method, "qwen3"))
    assert len(constrain(target, "shortgpt", *units_of("shortgpt", "qwen3"))) == 6
    whole = {Unit(i, n): int(i != 1) for i in range(3) for n in ("attention", "ffn")}
    check_plan(target, "shortgpt", whole)
    with pytest.raises(InputError, match="llm-drop removes only the MLP of block 1"):
        check_plan(target, "llm-drop", whole | {Unit(1, "attention"): 1})
    check_plan(find_target("gguf"), "llm-drop", whole | {Unit(1, "attention"): 1})
    job = pose_on(Stream(source, tiny.windows(8, 24)), find_method("llm-drop", {"sparsity": 0.4}), target="gguf")
    with pytest.raises(InputError, match="llm-drop removes only the"):
        job.plan()


def test_finished_models_say_what_a_stack_must_hold(tmp_path):
    source = open_source(build("llama_gqa"))

    def needs(form: str) -> set[str]:
        compressed.make_folder(source.model, tmp_path / form, compressed.FORMS[form])
        specs = json.loads((tmp_path / form / "config.json").read_text())["planish"]["blocks"]
        return {need for i, spec in enumerate(specs) for need in footprint(spec, source.shape(i)).needs}

    assert needs("attention removed") == {"removed attention"}
    assert needs("low-rank pairs") == {"low-rank linear"}
    assert "fewer query/key dimensions" in needs("fewer rotary pairs")
    assert "raw linear attention" in needs("submodules → linear before the norm")
    assert needs("value dimensions and MLP widths per block") == {"fewer value dimensions", "fewer neurons"}


def test_a_plan_says_what_the_target_asks_and_costs(tmp_path):
    """flat-llm for gguf: equal ranks in steps; its predicted loss beside the one without them, by the same frontiers."""
    from planish.api import forecast

    model = build("llama_gqa", hidden_size=64, intermediate_size=192, head_dim=16)
    ids = tiny.windows(16, 48).flatten().numpy()
    settings = {"calibration": ids, "n_samples": 16, "seq_len": 48, "keep": 0.7, "method": "auto"}
    found = forecast(model, target="gguf", measure=True, **settings)
    assert found.nats and found.target == "gguf"
    assert [line.partition(":")[0] for line in found.limits] == [
        "no low-rank linear",
        "no fewer query/key dimensions",
        "value dimensions in multiples of 8, equal in all blocks",
        "neurons in multiples of 32 (64 from 2048 on), equal in all blocks",
    ]
    assert set(found.predicted) <= {"vo", "mlp"} and set(found.predicted_any) - {"vo", "mlp"}
    assert sum(found.predicted.values()) > sum(found.predicted_any.values()) > 0, "limits cost something"
    free = forecast(model, measure=True, **settings)
    assert free.predicted == pytest.approx(found.predicted_any) and not free.predicted_any and not free.limits
    shapes_alone = forecast(model, target="vllm", keep=0.7, method="a3", calibration=ids, n_samples=16, seq_len=48)
    expected = forecast(model, target="gguf", **settings)
    assert not expected.measured and expected.limits == found.limits and not expected.predicted
    assert len({u["rank"] for u in expected.units if u["unit"] == "mlp"}) == 1 and expected.keep <= 0.7
    assert shapes_alone.limits and not shapes_alone.predicted and not shapes_alone.needed_statistics


@pytest.mark.parametrize(
    ("family", "lacks"),
    [
        ("lfm2", "what mixers keep of a sequence"),
        ("nemotron_h", "what mixers keep of a sequence"),
        ("gemma4", "heads whose sizes differ between blocks"),
        ("gpt_oss", "scores that no token answers to"),
        ("llama4", "rotary tables of complex numbers"),
    ],
)
def test_what_the_backend_of_vllm_lacks_is_said_before_anything_is_cut(family, lacks, tmp_path):
    """By `compress`, and by `verify` of a folder that was made for transformers."""
    asked = {"keep": 0.8, "method": "flat-llm", "windows": tiny.windows(16, 24)}
    message = f"vLLM's Transformers backend, which runs other than stock shapes, does not hold {lacks}"
    with pytest.raises(InputError, match=f"--target vllm: {message}.*compress for --target any"):
        compress(build(family), output=tmp_path / "m", target="vllm", **asked)
    assert not list(tmp_path.iterdir())
    compress(build(family), output=tmp_path / "m", **asked)
    with pytest.raises(InputError, match=message):
        verify(tmp_path / "m", "vllm")
