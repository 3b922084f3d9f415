"""Dense, padded, MiMo and DeciLM folders compute what the compressed folder computes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import compressed
import tiny
from planish.errors import InputError
from planish.export import export
from planish.export.plain import open_plain
from planish.folder.weights import index_tensors
from tiny import build, load

LINEAR = [n for n in compressed.FORMS if "→" in n]


def logits(folder: Path, **kw) -> torch.Tensor:
    ids = torch.randint(3, 97, (2, 19), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return load(folder, dtype=torch.float64, **kw)(input_ids=ids).logits


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=0)


def stated(notes: list[str]) -> int:
    return sum(int(n.split(":")[1].split()[0].replace(",", "")) for n in notes if "weights" in n)


@pytest.mark.parametrize("form", compressed.FORMS)
def test_dense_has_no_low_rank_form_and_the_same_logits(form, tmp_path):
    folder = compressed.make_folder(build("llama_gqa"), tmp_path / "m", compressed.FORMS[form])
    written = export(folder, "dense", tmp_path / "d")
    same(logits(tmp_path / "d"), logits(folder))
    names = index_tensors(tmp_path / "d")
    assert not [
        n for n in names if n.endswith((".A.weight", ".B.weight", ".P.weight", ".C.weight", "_proj.U", ".order"))
    ]
    assert written.parameters - written.stored_parameters == stated(written.notes)
    if form in ("dense", "narrow MLP", "low-rank pairs", "pivoted low rank", "low-rank heads"):
        assert json.loads((tmp_path / "d" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize("family", ["llama_gqa", "llama_bias", "qwen3", "phi3_partial", "gemma2", "opt", "gpt_neox"])
def test_padding_gives_the_stock_architecture(family, tmp_path):
    form = [
        compressed.both(compressed.values(3), compressed.neurons(24)),
        compressed.both(
            compressed.low_rank("pair", 6, *"qkvo"),
            compressed.bypass("mlp") if family != "opt" else compressed.neurons(9),
        ),
        compressed.bypass("attention"),
    ]
    folder = compressed.make_folder(build(family), tmp_path / "m", form)
    written = export(folder, "dense", tmp_path / "d", pad=True)
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert (
        written.architecture == "native" and not config["model_type"].startswith("planish") and "auto_map" not in config
    )
    same(logits(tmp_path / "d"), logits(folder))


@pytest.mark.parametrize("form", [n for n in compressed.FORMS if n not in LINEAR])
def test_mimo_loads_with_transformers_own_class(form, tmp_path):
    folder = compressed.make_folder(build("llama_gqa"), tmp_path / "m", compressed.FORMS[form])
    written = export(folder, "mimo", tmp_path / "d")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "d", attn_implementation="eager")
    assert type(model).__module__.startswith("transformers.") and written.architecture == "MiMoV2FlashForCausalLM"
    with torch.no_grad():
        ids = torch.randint(3, 97, (2, 19), generator=torch.Generator().manual_seed(3))
        same(model(input_ids=ids).logits, logits(folder).float())


@pytest.mark.parametrize("form", LINEAR)
@pytest.mark.parametrize("target", ["mimo", "deci"])
def test_linear_maps_are_refused(target, form, tmp_path):
    folder = compressed.make_folder(build("llama_gqa"), tmp_path / "m", compressed.FORMS[form])
    with pytest.raises(InputError, match="linear map"):
        export(folder, target, tmp_path / "d")
    assert not list(tmp_path.glob("d*"))


def test_deci_describes_every_block(tmp_path):
    folder = compressed.make_folder(
        build("llama_gqa"),
        tmp_path / "m",
        [
            compressed.bypass("attention"),
            compressed.both(compressed.neurons(8), compressed.values(5)),
            compressed.bypass("mlp"),
        ],
    )
    written = export(folder, "deci", tmp_path / "d")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    attention, ffn = ([b[k] for b in config["block_configs"]] for k in ("attention", "ffn"))
    assert [a["no_op"] for a in attention] == [False, False, False], "block 0 keeps an attention of zeros"
    assert [f["no_op"] for f in ffn] == [False, False, True]
    assert [f["ffn_mult"] and read_width(f["ffn_mult"], 32) for f in ffn] == [256, 256, None]
    assert written.parameters - written.stored_parameters == stated(written.notes) > 3 * 32 * (256 - 44 + 256 - 8)
    names = index_tensors(tmp_path / "d")
    assert not [n for n in names if n.startswith(("model.layers.2.mlp", "model.layers.2.post_attention_layernorm"))]
    deci, old = open_plain(folder), tmp_path / "d"
    from safetensors.torch import load_file

    tensors = {k: v for f in old.glob("*.safetensors") for k, v in load_file(f).items()}
    assert tensors["model.layers.0.self_attn.o_proj.weight"].abs().max() == 0
    o = tensors["model.layers.1.self_attn.o_proj.weight"].unflatten(1, (4, 8))
    assert o[..., 5:].abs().max() == 0
    assert torch.equal(o[..., :5].flatten(1), deci.reader.tensor("model.layers.1.self_attn.o_proj.weight"))
    down = tensors["model.layers.1.mlp.down_proj.weight"]
    assert down.shape == (32, 256) and down[:, 8:].abs().max() == 0
    assert torch.equal(down[:, :8], deci.reader.tensor("model.layers.1.mlp.down_proj.weight"))


def read_width(ffn_mult: float, hidden: int) -> int:
    """An MLP's width as vLLM, SGLang and MLX read it."""
    width = int(2 * round(ffn_mult, 6) * hidden / 3)
    return width if width % 256 == 0 else width + 256 - width % 256


@pytest.mark.parametrize("hidden", [32, 96, 1000, 4096, 8192])
def test_deci_names_every_width_so_that_it_is_read_right(hidden):
    from planish.export.carriers import name_width, round_width

    for width in [*range(1, 1100), 11008, 14336, 28672, 28671]:
        assert read_width(name_width(width, hidden), hidden) == round_width(width)
        assert 0 <= round_width(width) - width < 256


def test_deci_configuration_gives_objects_and_is_json_again(tmp_path):
    from transformers import AutoConfig

    folder = compressed.make_folder(build("llama_gqa"), tmp_path / "m", [None, compressed.bypass("mlp")])
    export(folder, "deci", tmp_path / "d")
    config = AutoConfig.from_pretrained(tmp_path / "d", trust_remote_code=True)
    first, second, third = config.block_configs
    assert (first.attention.n_heads_in_group, second.ffn.no_op, third.ffn.no_op) == (2, True, False)
    assert not hasattr(first.ffn, "intermediate_size") and config.hidden_size == 32
    assert (
        json.loads(config.to_json_string())["block_configs"]
        == json.loads((tmp_path / "d" / "config.json").read_text())["block_configs"]
    )


def test_settings_of_other_targets_are_refused(tmp_path):
    with pytest.raises(InputError, match="export to mimo has no setting 'pad'"):
        export(tmp_path, "mimo", tmp_path / "d", pad=True)
    with pytest.raises(InputError, match="unknown export target 'tflite'"):
        export(tmp_path, "tflite", tmp_path / "d")


FACTORED = [(f, t) for f in ("low-rank pairs", "pivoted low rank", "low-rank heads") for t in ("dense", "mimo", "deci")]


@pytest.mark.parametrize(
    ("form", "target"),
    tiny.pick([("low-rank pairs", "dense"), ("pivoted low rank", "mimo"), ("low-rank heads", "deci")], FACTORED),
)
def test_products_of_bf16_factors_are_not_rounded_to_bf16(target, form, tmp_path):
    folder = compressed.make_folder(build("llama_gqa").to(torch.bfloat16), tmp_path / "m", compressed.FORMS[form])
    written = export(folder, target, tmp_path / "d")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config["dtype"] == "float32"
    names = index_tensors(tmp_path / "d")
    size = sum(f.stat().st_size for f in (tmp_path / "d").glob("*.safetensors"))
    (note,) = [n for n in written.notes if "float32" in n]
    extra = int(note.split(": ")[1].split()[0].replace(",", ""))
    assert written.bytes - 2 * written.parameters == extra > 0 and size > 2 * written.parameters + extra
    rounded = export(folder, target, tmp_path / "r", dtype="bf16")
    assert rounded.bytes == 2 * rounded.parameters and rounded.parameters == written.parameters
    assert json.loads((tmp_path / "r" / "config.json").read_text())["dtype"] == "bfloat16" and names
    if target == "deci":  # transformers has no class for it
        return
    ids = torch.randint(3, 97, (2, 19), generator=torch.Generator().manual_seed(3))
    kw = {"attn_implementation": "eager"} if target == "mimo" else {}
    with torch.no_grad():
        want = load(folder, dtype=torch.float64)(input_ids=ids).logits
        got, off = (
            AutoModelForCausalLM.from_pretrained(tmp_path / d, **kw).double()(input_ids=ids).logits - want
            for d in ("d", "r")
        )
    scale = want.abs().max()
    assert got.abs().max() < 1e-5 * scale < off.abs().max() * 1e-1, "rounded products move the logits visibly"


CARRIERS = {
    "fewer value dimensions": "mimo",
    "MLP widths per block": "deci",
    "attention removed": "deci",
    "MLP removed": "deci",
}


@pytest.mark.parametrize("size", [44, 512])
@pytest.mark.parametrize("form", compressed.FORMS)
def test_the_carrier_that_is_named_holds_the_folder_without_zeros(form, size, tmp_path):
    """Named exactly where the export adds no weight; deci's widths are multiples of 256."""
    from planish.export.carriers import export_deci, export_mimo, find_carrier

    forms = compressed.FORMS[form]
    if form == "MLP widths per block" and size == 512:
        forms = [compressed.neurons(256), None]
    folder = compressed.make_folder(build("llama_gqa", intermediate_size=size), tmp_path / "m", forms)
    found = find_carrier(folder)
    expected = CARRIERS.get(form)
    assert found == (None if expected == "deci" and size % 256 else expected)
    if found:
        written = {"mimo": export_mimo, "deci": export_deci}[found](folder, tmp_path / "out")
        assert written.parameters <= written.stored_parameters


@pytest.mark.parametrize("target", ["dense", "mimo", "deci"])
@pytest.mark.parametrize("where", [".", "..", "../..", "link"])
def test_a_model_is_never_replaced_by_its_export(target, where, tmp_path):
    folder = compressed.make_folder(build("llama_gqa"), tmp_path / "models" / "m", [compressed.values(5)])
    (tmp_path / "other").symlink_to(folder.parent, target_is_directory=True)
    output = tmp_path / "other" / "m" if where == "link" else folder / where
    before = {p: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(InputError, match="would replace the model"):
        export(folder, target, output, overwrite=True)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("where", "how"), [("model.layers.1.mlp.up_proj.weight", float("nan")), ("lm_head.weight", -float("inf"))]
)
@pytest.mark.parametrize("target", ["dense", "mimo", "deci", "onnx"])
def test_weights_that_are_no_numbers_are_refused(target, where, how, tmp_path):
    model = build("llama_gqa")
    model.get_parameter(where).data[3, 2] = how
    model.save_pretrained(tmp_path / "m")
    if target == "onnx":
        pytest.importorskip("onnxscript")
    with pytest.raises(InputError, match=rf"tensor {where} .*holds NaN or infinity"):
        export(tmp_path / "m", target, tmp_path / "d")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize("target", ["dense", "mimo"])
def test_values_beyond_the_asked_type_are_refused(target, tmp_path):
    model = build("llama_gqa")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e5
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity as float16"):
        export(tmp_path / "m", target, tmp_path / "d", dtype="f16")
    assert export(tmp_path / "m", target, tmp_path / "d", dtype="bf16").dtype == "bf16"


def test_products_that_are_no_numbers_are_refused(tmp_path):
    def huge(shape, weights, generator):
        edits = compressed.low_rank("pair", 4, "up")(shape, weights, generator)
        return [replace(e, tensors={n: t * 1e30 for n, t in e.tensors.items()}) for e in edits]

    folder = compressed.make_folder(build("llama_gqa"), tmp_path / "m", [None, huge])
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity as float32"):
        export(folder, "dense", tmp_path / "d")
    pytest.importorskip("gguf")
    with pytest.raises(InputError, match=r"blk\.1\.ffn_up\.weight holds NaN or infinity"):
        export(folder, "gguf", tmp_path / "m.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_mixtures_are_not_filled_up(tmp_path):
    build("mixtral").save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="a mixtral is not filled up to its stock architecture: export without --pad"):
        export(tmp_path / "m", "dense", tmp_path / "d", pad=True)
    assert not (tmp_path / "d").exists()


@torch.no_grad()
@pytest.mark.parametrize("family", ["lfm2", pytest.param("nemotron_h", marks=pytest.mark.slow)])
def test_hybrids(family, tmp_path):
    """Also blocks without attention; linears of mixers are multiplied back."""
    tiny.compress(tiny.build(family), output=tmp_path / "m", windows=tiny.windows(8, 12), method="svd-llm", keep=0.8)
    export(tmp_path / "m", "dense", tmp_path / "d")
    ids = tiny.windows(2, 12)
    small, dense = tiny.load(tmp_path / "m"), tiny.load(tmp_path / "d")
    assert type(dense) is type(tiny.build(family))
    torch.testing.assert_close(dense(ids).logits, small(ids).logits, rtol=1e-3, atol=1e-3)
