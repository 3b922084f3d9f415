"""EoRA adapters: the naive program's product, exact at full rank for every form, read by PEFT, honest about torchao."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import compressed
import tiny
from planish.errors import InputError
from planish.export.eora import compensate, find_group, list_linears, round_weight, solve
from planish.modelling.blocks import find_blocks
from planish.modelling.families import FAMILIES
from tiny import build, load

MIXED = [
    compressed.both(compressed.values(3), compressed.neurons(24)),
    compressed.both(compressed.low_rank("pair", 6, "q", "up"), compressed.low_rank("pivoted", 6, "down")),
    compressed.bypass("mlp", 4, shift=True),
]


def read_adapter(path) -> tuple[dict[str, torch.Tensor], dict]:
    """Linear → B A (out, in) in fp64, and the configuration."""
    tensors = load_file(path / "adapter_model.safetensors")
    stem = "base_model.model."
    names = {n.removeprefix(stem).rpartition(".lora_")[0] for n in tensors}
    product = {
        n: tensors[f"{stem}{n}.lora_B.weight"].double() @ tensors[f"{stem}{n}.lora_A.weight"].double() for n in names
    }
    return product, json.loads((path / "adapter_config.json").read_text())


@torch.no_grad()
def apply_adapter(model: nn.Module, products: dict[str, torch.Tensor], bits: int) -> nn.Module:
    for name, product in products.items():
        weight = model.get_submodule(name).weight
        weight.copy_(round_weight(weight, bits) + product.to(weight.dtype))
    return model


@torch.no_grad()
def run_naively(model: nn.Module, windows: torch.Tensor, rank: int, bits: int) -> dict[str, torch.Tensor]:
    """The whole model for every block: Grams with hooks, a Cholesky root, an SVD, an explicit product."""
    model = model.double()
    family = FAMILIES[model.config.model_type]
    products = {}
    for i, block in enumerate(find_blocks(model, family)):
        grams = {}
        handles = [
            linear.register_forward_pre_hook(
                lambda m, x, n=n, grams=grams: grams.__setitem__(n, x[0].flatten(0, 1).T @ x[0].flatten(0, 1))
            )
            for n, linear in list_linears(block).items()
        ]
        model(input_ids=windows)
        for handle in handles:
            handle.remove()
        for n, linear in list_linears(block).items():
            w = linear.weight.data
            rounded = round_weight(w.float(), bits).double()
            lower = torch.linalg.cholesky(grams[n] + 1e-8 * grams[n].diagonal().mean() * torch.eye(len(grams[n])))
            u, s, v = torch.linalg.svd((w - rounded) @ lower, full_matrices=False)
            product = (u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(lower)
            products[f"{family.blocks}.{i}.{n}"] = product
            linear.weight.data = rounded + product
    return products


@pytest.mark.parametrize("family", ["llama_gqa", "qwen3"])
def test_the_products_are_the_naive_programs(family, tmp_path):
    build(family).save_pretrained(tmp_path / "m")
    windows = tiny.windows(6, 24)
    compensate(tmp_path / "m", windows, tmp_path / "a", rank=5, dtype=torch.float64)
    products, _ = read_adapter(tmp_path / "a")
    want = run_naively(build(family), windows, 5, 4)
    assert products.keys() == want.keys()
    for name, product in products.items():
        assert (product - want[name]).norm() < 2e-5 * want[name].norm(), name


def test_every_root_of_the_gram_gives_the_same_product_and_the_loss_is_the_tail():
    g = torch.Generator().manual_seed(0)
    w, x = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((20, 12), (12, 40)))
    for weight in (w, w.T.contiguous()):
        gram = x @ x.T if weight.shape[1] == 12 else (y := torch.randn(20, 50, generator=g, dtype=torch.float64)) @ y.T
        rounded = round_weight(weight, 4)
        b, a, before, after = solve(weight, rounded, gram, 3, damping=0.0)
        values, vectors = torch.linalg.eigh(gram)
        rotation = torch.linalg.qr(torch.randn(len(gram), len(gram), generator=g, dtype=torch.float64)).Q
        for root in (torch.linalg.cholesky(gram), vectors * values.sqrt(), (vectors * values.sqrt()) @ rotation):
            u, s, v = torch.linalg.svd((weight - rounded) @ root)
            want = (u[:, :3] * s[:3]) @ v[:3] @ torch.linalg.inv(root)
            torch.testing.assert_close(b @ a, want, atol=1e-10, rtol=1e-8)
            whole = ((weight @ gram) * weight).sum()
            assert before == pytest.approx(float(s.square().sum() / whole))
            assert after == pytest.approx(float(s[3:].square().sum() / whole))
        torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1))


def test_directions_without_energy_do_no_harm():
    g = torch.Generator().manual_seed(1)
    w, x = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((40, 24), (24, 6)))
    x[3] = 0
    b, a, before, after = solve(w, round_weight(w, 4), x @ x.T, 6)
    assert torch.isfinite(b).all() and torch.isfinite(a).all()
    assert (b @ a).abs().max() < 100 * (w - round_weight(w, 4)).abs().max(), "nothing explodes"
    assert after < 1e-6 * before, "six samples span six directions"
    zero = solve(torch.zeros(8, 8), torch.zeros(8, 8), torch.zeros(8, 8), 2)
    assert zero[2:] == (0.0, 0.0) and not zero[0].isnan().any()


@pytest.mark.parametrize(
    "family", ["llama_bias", "llama_tied", "mistral", "qwen2", "phi3", "gemma2", "opt", "gpt_neox", "mpt"]
)
def test_full_rank_gives_every_family_back(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path / "m")
    found = compensate(tmp_path / "m", tiny.windows(4, 12), tmp_path / "a", rank=1000, bits=4)
    products, config = read_adapter(tmp_path / "a")
    assert found.linears == len(products) == len(config["target_modules"]) and set(products) == set(
        config["target_modules"]
    )
    check(model, apply_adapter(load(tmp_path / "m"), products, 4))


def test_full_rank_gives_a_compressed_model_back(tmp_path):
    folder = compressed.make_folder(build("llama_gqa"), tmp_path / "m", MIXED)
    compensate(folder, tiny.windows(4, 12), tmp_path / "a", rank=1000)
    products, _ = read_adapter(tmp_path / "a")
    assert {n.rpartition(".")[2] for n in products} >= {"A", "B", "P", "C", "V", "W", "q_proj"}
    check(load(folder), apply_adapter(load(folder), products, 4))


@torch.no_grad()
def check(model: nn.Module, restored: nn.Module) -> None:
    ids = tiny.windows(2, 12)
    want = model(input_ids=ids).logits
    torch.testing.assert_close(restored(input_ids=ids).logits, want, atol=2e-4 * float(want.abs().max()), rtol=0)


def test_more_rank_loses_less_and_bytes_are_counted(tmp_path):
    build("llama_gqa").save_pretrained(tmp_path / "m")
    errors = []
    for rank in (1, 4, 16):
        found = compensate(tmp_path / "m", tiny.windows(8, 32), tmp_path / str(rank), rank=rank)
        errors.append(found.error_after)
        tensors = load_file(tmp_path / str(rank) / "adapter_model.safetensors")
        assert found.adapter_bytes == sum(t.nbytes for t in tensors.values())
    assert found.error_before > errors[0] > errors[1] > errors[2] > 0
    sizes = [(m.out_features, m.in_features) for b in build("llama_gqa").model.layers for m in list_linears(b).values()]
    assert found.weight_bytes == sum(out * (n // 2 + n // find_group(n, 4) * 4) for out, n in sizes)


def test_peft_loads_the_adapter_on_the_rounded_model(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'planish[tune]')")
    folder = compressed.make_folder(build("llama_gqa"), tmp_path / "m", MIXED)
    compensate(folder, tiny.windows(4, 12), tmp_path / "a", rank=5)
    products, _ = read_adapter(tmp_path / "a")
    model = load(folder)
    with torch.no_grad():
        for name in products:
            weight = model.get_submodule(name).weight
            weight.copy_(round_weight(weight, 4))
    ids = tiny.windows(2, 12)
    with torch.no_grad():
        got = peft.PeftModel.from_pretrained(model, tmp_path / "a")(input_ids=ids).logits
        want = apply_adapter(load(folder), products, 4)(input_ids=ids).logits
    torch.testing.assert_close(got, want, atol=1e-5 * float(want.abs().max()), rtol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_torchao_rounds_to_the_same_numbers(bits):
    pytest.importorskip("torchao.quantization", reason="torchao is not installed (pip install 'planish[quant]')")
    from planish.export.eora import round_like_torchao

    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(round_like_torchao(weight, bits), round_weight(weight, bits))


def test_rounding_is_to_the_nearest_level():
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(3))
    for bits, group in ((4, 16), (8, 48)):
        assert find_group(48, bits) == group
        rounded = round_weight(weight, bits)
        scale = weight.unflatten(1, (-1, group)).abs().amax(-1) / (2 ** (bits - 1) - 0.5)
        steps = rounded.unflatten(1, (-1, group)) / scale[..., None]
        torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
        assert ((weight - rounded).unflatten(1, (-1, group)).abs().amax(-1) <= scale * 0.5001).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "rounds weights to 4 or 8 bits, got 3"),
        ({"rank": 0}, "rank must be 1 or more, got 0"),
        ({"quantiser": "best"}, "unknown quantiser 'best'; expected one of round, torchao"),
    ],
)
def test_what_is_refused(settings, message, tmp_path):
    build("llama_gqa").save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match=message):
        compensate(tmp_path / "m", tiny.windows(1, 8), tmp_path / "a", **settings)
    assert not (tmp_path / "a").exists()


def test_other_refusals(tmp_path):
    build("llama_gqa").save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match="exists and is not empty"):
        compensate(tmp_path / "m", tiny.windows(1, 8), tmp_path / "m")
    build("gpt2").save_pretrained(tmp_path / "g")
    with pytest.raises(InputError, match="gpt2 stores its linears transposed"):
        compensate(tmp_path / "g", tiny.windows(1, 8), tmp_path / "a")
