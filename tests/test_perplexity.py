"""Perplexity against a naive loop, on random models of several families."""

import math

import pytest
import torch

from planish.errors import InputError
from planish.evaluate import perplexity
from planish.evaluate.perplexity import evaluate, token_losses

TOKENS = torch.randint(97, (150,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def naive(model, tokens, seq_len):
    """One window and one token at a time."""
    losses = []
    for start in range(0, len(tokens) - seq_len + 1, seq_len):
        window = tokens[start : start + seq_len]
        logp = model(window[None]).logits[0].float().log_softmax(-1)
        losses += [-logp[t, window[t + 1]].item() for t in range(seq_len - 1)]
    return losses


def family(name):
    import transformers as t

    size = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    narrow = size | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8}
    torch.manual_seed(0)
    model = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**narrow, initializer_range=0.3)),
        "gemma2": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(**narrow, final_logit_softcapping=2.0, initializer_range=0.3, pad_token_id=0)
        ),
        "granite": lambda: t.GraniteForCausalLM(t.GraniteConfig(**narrow, logits_scaling=3.0, initializer_range=0.3)),
        "cohere": lambda: t.CohereForCausalLM(t.CohereConfig(**narrow, logit_scale=0.5, eos_token_id=2)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
        ),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(**size, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32)
        ),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**narrow, num_local_experts=2)),
    }[name]()
    return model.eval()


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("step", [5, 1000])
def test_equals_the_naive_loop(name, step, monkeypatch):
    model, seq_len = family(name), 32
    expected = naive(model, TOKENS, seq_len)
    largest = []
    head = model.get_output_embeddings().register_forward_hook(lambda m, a, out: largest.append(out[..., 0].numel()))
    monkeypatch.setattr(perplexity, "_LOGITS_AT_ONCE", step * 3 * 97)
    got = evaluate(model, TOKENS, seq_len, batch_size=3)
    head.remove()
    assert max(largest) <= step * 3  # the head never sees more positions than memory allows
    assert got.nll == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert got.perplexity == pytest.approx(math.exp(got.nll))
    assert (got.windows, got.tokens, got.seq_len, got.dtype) == (4, 4 * 31, 32, "float32")


def test_token_losses_keep_their_place(tiny_llama, monkeypatch):
    monkeypatch.setattr(perplexity, "_LOGITS_AT_ONCE", 7 * 2 * 97)
    got = token_losses(tiny_llama(), TOKENS[:64].view(2, 32))
    torch.testing.assert_close(got.flatten(), torch.tensor(naive(tiny_llama(), TOKENS[:64], 32)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny_llama, dtype):
    model = tiny_llama().to(dtype)
    got = evaluate(model, TOKENS, 32)
    expected = naive(model, TOKENS, 32)
    assert got.nll == pytest.approx(sum(expected) / len(expected), rel=1e-6) and got.dtype == str(dtype)[6:]
    assert got.nll == pytest.approx(evaluate(tiny_llama(), TOKENS, 32).nll, rel=0.02)


def test_batch_size_does_not_matter_and_progress_counts_windows(tiny_llama):
    seen = []
    a = evaluate(tiny_llama(), TOKENS, 16, batch_size=4, progress=lambda *n: seen.append(n))
    assert seen == [(0, 9), (4, 9), (8, 9), (9, 9)]
    assert a.nll == pytest.approx(evaluate(tiny_llama(), TOKENS, 16, batch_size=1).nll, rel=1e-6)


def test_a_uniform_model_has_the_vocabulary_as_perplexity(tiny_llama):
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert evaluate(model, TOKENS, 16).perplexity == pytest.approx(97, rel=1e-6)


def test_the_model_is_left_as_it_was(tiny_llama, monkeypatch):
    monkeypatch.setattr(perplexity, "_LOGITS_AT_ONCE", 5 * 97)
    model = tiny_llama().train()
    evaluate(model, TOKENS, 16, device="cpu")
    assert model.training
    for module in model.modules():
        assert "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("step", [5, 1000])
def test_logits_that_are_not_finite_name_their_window(tiny_llama, step, monkeypatch):
    monkeypatch.setattr(perplexity, "_LOGITS_AT_ONCE", step * 2 * 97)
    model, tokens = tiny_llama(), TOKENS.clone().clamp(max=95)
    tokens[3 * 16 + 2] = 96  # only window 3 sees the bad embedding
    model.get_input_embeddings().weight.data[96] = float("nan")
    with pytest.raises(InputError, match=r"not finite · window 3 of 9 \(tokens 48 to 63\) · got a model in float32"):
        evaluate(model, tokens, 16, batch_size=2)


def test_one_logit_of_minus_infinity_elsewhere_is_a_mask_not_an_error(tiny_llama):
    model = tiny_llama()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(97))
    model.lm_head.bias.data[96] = -math.inf
    assert math.isfinite(evaluate(model, TOKENS.clamp(max=95), 16).nll)
    with pytest.raises(InputError, match="not finite"):
        evaluate(model, torch.full((32,), 96), 16)


def test_errors(tiny_llama):
    model = tiny_llama()
    with pytest.raises(
        InputError, match=r"seq_len 65 · expected at most max_position_embeddings 64 · use --seq-len 64"
    ):
        evaluate(model, TOKENS, 65)
    with pytest.raises(InputError, match=r"evaluation tokens, position 40 · got 97 · expected 0 to 96"):
        evaluate(model, TOKENS.clone().index_fill(0, torch.tensor(40), 97), 16)
    with pytest.raises(InputError, match=r"got 10 tokens · expected at least seq_len 16"):
        evaluate(model, TOKENS[:10], 16)


def test_a_trained_model_scores_as_published(stories_dir, data_path):
    """Mean NLL 1.528 over stories 200 to 259, each cut at 512 tokens, `<s>` first."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (c.from_pretrained(stories_dir) for c in (AutoModelForCausalLM, AutoTokenizer))
    stories = data_path("text", "tinystories_sample.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    losses = []
    for story in stories[200:260]:
        ids = [1, *(i for i in tokenizer(story.strip()).input_ids if i != 1)][:512]
        losses.append(token_losses(model.eval(), torch.tensor([ids])).flatten())
    assert torch.cat(losses).mean().item() == pytest.approx(1.528, abs=0.01)
