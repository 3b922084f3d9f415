"""`output_attentions` and `output_hidden_states` of compressed models: as many as there are, in order, and the right ones."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import AutoModel

import compressed
import tiny
from planish.folder.load import load
from planish.modelling.blocks import find_blocks
from planish.modelling.families import FAMILIES


def record(folder):
    """(The model's own record, outputs of its blocks as hooks see them, number of attentions that are left.)"""
    model = load(folder, attn_implementation="eager")
    row = getattr(model.config, "planish", None)
    family = FAMILIES[row["family"] if row else model.config.model_type]
    specs = row["blocks"] if row else [{}] * model.config.num_hidden_layers
    left = sum(s.get("attention", {}).get("kind") != "bypass" for s in specs)
    seen = []
    for block in find_blocks(model, family):
        block.register_forward_hook(lambda m, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    out = model(tiny.windows(2, 12), output_attentions=True, output_hidden_states=True)
    plain = model(tiny.windows(2, 12))
    assert torch.equal(out.logits, plain.logits) and plain.attentions is None and plain.hidden_states is None
    return out, seen[: len(specs)], left


def check(folder):
    out, seen, left = record(folder)
    assert len(out.hidden_states) == len(seen) + 1 and len(out.attentions) == left
    for found, expected in zip(out.hidden_states[1:-1], seen[:-1], strict=True):  # the last one is normalised
        assert torch.equal(found, expected)
    for weights in out.attentions:
        assert weights.shape[-2:] == (12, 12)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize("name", ["llama_gqa", "qwen3", "gpt2", "gpt_neox", "opt", "mpt", "phi3", "gemma2"])
@pytest.mark.parametrize("forms", [[compressed.values(4)], [compressed.values(4), None]])
def test_replaced_attentions_are_recorded(name, forms, tmp_path):
    check(compressed.make_folder(tiny.build(name), tmp_path / "out", forms))


@pytest.mark.parametrize("form", sorted(compressed.FORMS))
def test_every_form_is_recorded(form, tmp_path):
    check(compressed.make_folder(tiny.build("llama_gqa"), tmp_path / "out", compressed.FORMS[form]))


def test_base_models_and_copies_record_too(tmp_path):
    folder = compressed.make_folder(tiny.build("llama_gqa"), tmp_path / "out", [compressed.values(4), None])
    lm = load(folder, attn_implementation="eager")
    base = AutoModel.from_pretrained(folder, attn_implementation="eager")
    for model in (base, copy.deepcopy(lm), pickle.loads(pickle.dumps(lm))):
        out = model(tiny.windows(2, 12), output_attentions=True, output_hidden_states=True)
        assert len(out.attentions) == model.config.num_hidden_layers == len(out.hidden_states) - 1
    tiny.build("llama_gqa")  # the stock class is made again, and nothing of it changes for the others
    assert len(lm(tiny.windows(1, 5), output_attentions=True).attentions) == lm.config.num_hidden_layers


def test_sliced_blocks_are_recorded(tmp_path):
    tiny.compress(tiny.build("llama_mha"), output=tmp_path / "out", method="slicegpt", keep=0.7, windows=tiny.windows())
    check(tmp_path / "out")
