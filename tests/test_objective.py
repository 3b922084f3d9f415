"""Only tokens of answers are priced: which these are, what is sent back and measured for them, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import planish
import tiny
from planish import api
from planish.calibrate import losses
from planish.calibrate.documents import Asked
from planish.calibrate.encode import encode, encode_rendered, find_tokens, render
from planish.calibrate.measure import sweep_back
from planish.calibrate.stream import Stream
from planish.calibrate.text import list_aside, list_priced, load_tokens, mark, shuffle_windows, unmark
from planish.errors import InputError
from planish.evaluate import agreement
from planish.folder.source import MemorySource, open_source
from planish.folder.tokenizer import load_tokenizer
from planish.methods import list_methods
from planish.modelling.blocks import get_linear
from planish.plan import ablations
from planish.plan.ablations import Part, measure_interactions
from planish.request import Text, read_recipe
from planish.stats import Tap
from posed import pose_on
from test_text import byte_tokenizer, fails

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"
DIALOGUE = [
    {"role": "system", "content": "say it"},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": " né 2 "},
    {"role": "user", "content": "2"},
    {"role": "assistant", "content": "2"},
]
WINDOWS = tiny.windows(12, 24)
# every window: a prompt, an answer, a prompt; the answers begin and end elsewhere in each
SOME = torch.stack([mark(w, (torch.arange(24) >= 5 + i) & (torch.arange(24) < 15 + i)) for i, w in enumerate(WINDOWS)])


def tokens_of(*pieces: tuple[str, bool]) -> tuple[list[int], list[bool]]:
    """Byte by byte; "<s>" and "</s>" are one token each."""
    tokenizer, ids, answers = byte_tokenizer(end=True), list[int](), list[bool]()
    for text, answer in pieces:
        own = {"<s>": [256], "</s>": [257]}.get(text) or tokenizer(text)["input_ids"]
        ids, answers = [*ids, *own], [*answers, *[answer] * len(own)]
    return ids, answers


def turns(ends: bool = True) -> list[tuple[str, bool]]:
    found = []
    for role, said in (
        ("system", "say it"),
        ("user", "2 + 2?"),
        ("assistant", "né 2"),
        ("user", "2"),
        ("assistant", "2"),
    ):
        mine = role == "assistant"
        found += [("<s>", False), (f"{role}:", False), (said, mine), ("</s>", mine), ("\n", False)]
    return found


def write(path, *records: dict[str, Any]):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


RECORDS = {
    "messages": ({"messages": DIALOGUE}, turns()),
    "answer": (
        {"prompt": "a", "answer": "bb"},
        [("<s>", False), ("user:a", False), ("</s>", False), ("\n", False), ("<s>", False), ("assistant:", False), ("bb", True),
         ("</s>", True), ("\n", False)],
    ),
    "completion": ({"prompt": "<s>once ", "completion": "upon"}, [("<s>", False), ("once ", False), ("upon", True)]),
    "text": ({"text": "né"}, [("né", False)]),
}  # fmt: skip


@pytest.mark.parametrize("bos", ["auto", "once", "never"])
@pytest.mark.parametrize("with_bos", [True, False])
def test_tokens_of_answers_are_those_of_a_naive_construction(tmp_path, bos, with_bos):
    tokenizer = byte_tokenizer(with_bos=with_bos, end=True)
    tokenizer.chat_template = TEMPLATE
    path = write(tmp_path / "a.jsonl", *(r for r, _ in RECORDS.values()))
    ids, answers = list[int](), list[bool]()
    for n, (name, (_, pieces)) in enumerate(RECORDS.items()):
        own, marks = tokens_of(*pieces)
        plain = name in ("completion", "text")
        if bos == "auto":
            own, marks = ([256, *own], [False, *marks]) if with_bos and plain else (own, marks)
            if own[0] != 256:  # ends where it does not begin
                own, marks = [*own, 257], [*marks, marks[-1]]
        elif n:
            own, marks = [*tokens_of(("\n\n", False))[0], *own], [False, False, *marks]
        ids, answers = ids + own, answers + marks
    if bos != "auto" and with_bos and bos == "once":
        ids, answers = [256, *ids], [False, *answers]
    got = load_tokens(path, tokenizer, bos=bos, objective="answers")
    text = load_tokens(path, tokenizer, bos=bos)
    ids, answers = (ids[1:], answers[1:]) if bos == "never" and not with_bos else (ids, answers)
    assert unmark(got.tokens).tolist() == text.tokens.tolist() == ids
    assert list_priced(got.tokens).tolist() == [*answers[1:], answers[0]]
    assert bool(list_priced(text.tokens).all()) and (got.begin, got.policy) == (text.begin, text.policy)


def test_questions_without_a_template_are_what_eval_asks(tmp_path):
    tokenizer = byte_tokenizer(end=True)
    got = render(tokenizer, Asked("2 + 2?", "4"), answers=True)
    assert (got.text, got.plain) == ("Question: 2 + 2?\nAnswer: 4", True)
    ids, answers = encode_rendered(tokenizer, [got, got], apart=True, answers=True)
    expected = tokens_of(("Question: 2 + 2?\nAnswer:", False), (" 4", True), ("</s>", True))
    assert (ids.tolist(), answers.tolist()) == tuple(2 * e for e in expected)
    assert ids.tolist() == encode(tokenizer, [Asked("2 + 2?", "4")] * 2, apart=True).tolist()


def test_tokens_that_share_a_character_with_an_answer():
    places = [(0, 0), (0, 2), (2, 5), (2, 5), (5, 6), (6, 9), (9, 12), (0, 0)]
    spans = [(3, 5), (8, 10)]
    naive = [any(set(range(a, b)) & set(range(*s)) for s in spans) for a, b in places]
    assert find_tokens(places, spans).tolist() == naive
    assert not find_tokens(places, []).any() and not len(find_tokens([], spans))


@pytest.mark.parametrize("begin", [None, 7])
@pytest.mark.parametrize("sampling", ["random", "contiguous"])
def test_windows_carry_the_mask_of_their_tokens(begin, sampling):
    tokens = torch.arange(1000, 1300)
    tokens[torch.tensor([0, 40, 130])] = 7
    answers = (torch.arange(300) % 60 >= 45) & (torch.arange(300) > 100)
    found = tiny.sample_windows(mark(tokens, answers), 4, 20, 3, sampling, begin)
    assert bool(list_priced(found[:, :-1]).any(1).all())  # none without an answer
    for window in found:
        plain = unmark(window)
        first = next(n for n in range(1, 20) if plain[n] != 7)
        places = [
            int(plain[first]) - 1000 - first + n for n in range(20)
        ]  # of the tokens; in place of the first is `begin`
        assert plain[1:].tolist() == tokens[places[1:]].tolist() and plain[0] in (7, tokens[places[0]])
        assert list_priced(window).tolist() == [bool(answers[(p + 1) % 300]) for p in places]
    every = mark(tokens, torch.ones(300, dtype=torch.bool))
    assert torch.equal(
        tiny.sample_windows(every, 6, 20, 3, sampling, begin), tiny.sample_windows(tokens, 6, 20, 3, sampling, begin)
    )


def test_only_windows_of_whole_texts_are_shuffled():
    mixed = torch.cat([WINDOWS, SOME])
    found = shuffle_windows(mixed, 1.0)
    changed = (found != mixed).any(1)
    assert bool(changed[:12].all()) and not changed[12:].any()


# ---------------------------------------------------------------- gradients and losses


def stream(windows: Tensor = SOME) -> Stream:
    return Stream(MemorySource(tiny.build("llama_gqa", torch.float64)), windows, dtype=torch.float64)


def disturb(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        p.data += 0.1 * p.data.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype)
    return model


def void(_: Any) -> None:
    """A hook that returns nothing changes nothing."""


def priced_loss(model: nn.Module, windows: Tensor, reduction: str = "sum") -> Tensor:
    """Of the text's own next tokens, written out token by token."""
    ids, terms = unmark(windows), []
    logp = model(ids, use_cache=False).logits.double().log_softmax(-1)
    for n in range(len(ids)):
        terms += [-logp[n, t, ids[n, t + 1]] for t in range(ids.shape[1] - 1) if windows[n, t] >= 0]
    return torch.stack(terms).sum() if reduction == "sum" else torch.stack(terms).mean()


def test_what_is_sent_back_is_the_gradient_of_the_answers_own_loss():
    """Moments in the first block against autograd in the whole model: prompts count as far as answers see them."""
    s, role = stream(), "o"
    with torch.enable_grad():
        model = s.source.model.requires_grad_(True)
        linear, seen = get_linear(model.model.layers[0], s.family, role), []
        handle = linear.register_forward_hook(
            lambda m, a, out: void(out.register_hook(lambda g: seen.append(g.detach())))
        )
        priced_loss(model, SOME).backward()
        handle.remove()
        model.requires_grad_(False)
    per_priced = 12 * 24 / int(list_priced(SOME).sum())
    rows = seen[0].flatten(0, 1)
    expected = rows.T @ rows * per_priced / len(rows)
    for i, _, stats in sweep_back(s, lambda shape: [Tap("grad:o.out", "gram")], probe="text"):
        if i == 0:
            least = 1e-6 * float(expected.max())  # norms are fp32
            torch.testing.assert_close(stats.mean(Tap("grad:o.out", "gram")), expected, rtol=1e-4, atol=least)
    assert (
        rows.view(12, 24, -1)[:, :4].any() and not rows.view(12, 24, -1)[0, 15:].any()
    )  # before answers, and behind the first


@pytest.mark.parametrize("probe", ["sampled", "text", "curvature"])
def test_tokens_that_predict_no_answer_send_nothing_back(probe):
    s, whole = stream(), stream(WINDOWS)
    outputs = s.outputs()
    found = torch.cat(list(losses.output_gradients(s, outputs, 3, probe)))
    plain = torch.cat(list(losses.output_gradients(whole, outputs, 3, probe)))
    priced = list_priced(SOME)
    assert not found[~priced].any()
    torch.testing.assert_close(found[priced], plain[priced] * (priced.numel() / int(priced.sum())) ** 0.5)
    alone = losses.output_gradient(whole, outputs[0], 3, 0, probe, WINDOWS[: len(outputs[0])])
    assert torch.equal(plain[: len(alone)], alone)


def test_windows_that_are_set_aside_are_weighed_among_themselves():
    """However few of their tokens are priced: moments of either kind are means over a priced token."""
    s, whole, aside = stream(), stream(WINDOWS), 6
    found = torch.cat(list(losses.output_gradients(s, s.outputs(), 3, "text", aside))).square().sum(2)
    plain = torch.cat(list(losses.output_gradients(whole, s.outputs(), 3, "text"))).square().sum(2)
    out, priced = torch.zeros(len(SOME), dtype=torch.bool), list_priced(SOME)
    out[list_aside(0, len(SOME), aside)] = True
    shares = [float(priced[some].double().mean()) for some in (out, ~out)]
    assert out.sum() == 2 and shares[0] != shares[1]
    for some in (out, ~out):
        torch.testing.assert_close(found[some].mean(), plain[some][priced[some]].mean())


def test_losses_are_means_over_what_is_priced():
    s, other = stream(), disturb(tiny.build("llama_gqa", torch.float64))
    with torch.no_grad():
        expected = priced_loss(s.source.model, SOME, "mean")
        p = s.source.model(WINDOWS, use_cache=False).logits.log_softmax(-1)
    assert losses.nll(s, s.outputs()) == pytest.approx(float(expected), rel=1e-6)
    theirs = Stream(MemorySource(other), SOME, dtype=torch.float64)
    same_head = theirs.outputs()
    with torch.no_grad():  # both through the head of the first
        q = torch.cat([s.source.model.lm_head(s.source.model.model.norm(h)) for h in same_head]).log_softmax(-1)
    apart = (p.exp() * (p - q)).sum(-1)
    for behind, first in ((0.0, 0), (0.25, 6)):
        kept = list_priced(SOME) & (torch.arange(24) >= first)
        found = losses.divergence(s, same_head, s.outputs(), behind=behind)
        assert found == pytest.approx(float(apart[kept].mean()), rel=1e-5) and found > 1e-4
    nothing = mark(WINDOWS[0], torch.zeros(24, dtype=torch.bool))[None]
    for measured in (lambda t: losses.nll(t, t.outputs()), lambda t: losses.divergence(t, t.outputs(), t.outputs())):
        with pytest.raises(InputError, match="without an answer"):
            measured(stream(nothing))


def test_agreement_and_interactions_are_of_what_is_priced(monkeypatch):
    model, dense = tiny.build("llama_gqa"), disturb(tiny.build("llama_gqa"))
    monkeypatch.setattr(agreement, "AT_ONCE", 300)
    found = agreement.compare(model, dense, SOME.flatten(), 24)
    with torch.no_grad():
        p, q = (m(WINDOWS).logits[:, :-1].double().log_softmax(-1) for m in (dense, model))
    kept = list_priced(SOME)[:, :-1]
    assert found.tokens == int(kept.sum())
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1)[kept].mean()), rel=1e-4)
    assert found.top1 == pytest.approx(
        float((p.argmax(-1) == q.argmax(-1))[kept].double().mean()), abs=2 / found.tokens
    )
    monkeypatch.setattr(ablations, "TOKENS", 3)
    s, at = stream(SOME[:2]), [5, 8, 12, 24 + 7, 24 + 14]
    measure = pose_on(s, "cocurve", 0.7).measure

    def interact(*kept: int) -> Tensor:
        priced = torch.zeros(48, dtype=torch.bool)
        priced[list(kept)] = True
        windows = torch.where(priced.view(2, 24), WINDOWS[:2], ~WINDOWS[:2])
        return measure_interactions(measure, s.part(windows), [Part(0), Part(1, 3, 9)])

    torch.testing.assert_close(interact(*at), torch.stack([interact(n) for n in at]).mean(0), rtol=1e-5, atol=1e-9)


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objective") / "model"
    tiny.build("llama_gqa", vocab_size=258, bos_token_id=256, eos_token_id=257).save_pretrained(folder)
    tokenizer = byte_tokenizer(end=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    said = [{"prompt": f"what is {i} + {i}?", "answer": f"it is {2 * i}, no more and no less"} for i in range(60)]
    return write(tmp_path_factory.mktemp("chat") / "chat.jsonl", *said)


OPTIONS = {"keep": 0.8, "n_samples": 16, "seq_len": 32}


def weights(folder) -> bytes:
    return b"".join(p.read_bytes() for p in sorted(folder.glob("*.safetensors")))


def test_where_all_is_an_answer_the_result_is_that_of_the_text(tmp_path):
    folder = tmp_path / "model"
    tiny.build("llama_gqa", vocab_size=258, bos_token_id=256, eos_token_id=257).save_pretrained(folder)
    tokenizer = byte_tokenizer(end=True)
    tokenizer.chat_template = BARE
    tokenizer.save_pretrained(folder)
    said = [{"messages": [{"role": "assistant", "content": f"{i} and {i * i} " * 5}]} for i in range(60)]
    path, records = write(tmp_path / "a.jsonl", *said), []
    for objective in ("text", "answers"):
        planish.compress(folder, output=tmp_path / objective, calibration=path, objective=objective, **OPTIONS)
        records.append(json.loads((tmp_path / objective / "planish.json").read_text())["calibration"])
    assert records[1].pop("priced") == 1 and [r.pop("objective") for r in records] == ["text", "answers"]
    assert records[0] == records[1] and len(weights(tmp_path / "text")) > 1000
    assert weights(tmp_path / "text") == weights(tmp_path / "answers")


@pytest.mark.slow
def test_statistics_and_recipes_know_the_objective(model, chat, tmp_path, monkeypatch):
    """Of one cache both take their own; a recipe gives the same again."""
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path / "cache"))
    common = OPTIONS | {"calibration": chat}
    for n, objective in enumerate(("answers", "text", "answers", "text")):  # each makes its cache, and uses it
        planish.compress(model, output=tmp_path / f"{objective}{n}", objective=objective, cache=True, **common)
    for objective, runs in (("answers", (0, 2)), ("text", (1, 3))):
        planish.compress(model, output=tmp_path / objective, objective=objective, **common)
        assert all(weights(tmp_path / f"{objective}{n}") == weights(tmp_path / objective) for n in runs)
    assert weights(tmp_path / "text") != weights(tmp_path / "answers")
    record = json.loads((tmp_path / "answers" / "planish.json").read_text())["calibration"]
    assert record["objective"] == "answers" and 0.2 < record["priced"] < 0.8
    recipe = read_recipe(tmp_path / "answers" / "recipe.yaml")
    assert recipe.calibration.objective == "answers"
    planish.compress(**recipe.arguments, output=tmp_path / "again")
    assert weights(tmp_path / "again") == weights(tmp_path / "answers")


def test_a_recipe_without_it_means_the_text(tmp_path):
    (tmp_path / "r.yaml").write_text("version: 1\nmodel: m\ncalibration: {source: wikitext2}\n")
    assert read_recipe(tmp_path / "r.yaml").calibration.objective == "text"


SOON = ["a3", "flat-llm", "svd-llm", "mpifa", "modegpt", "palu", "llm-drop", "shortgpt", "reap", "auto"]


@pytest.mark.parametrize("name", tiny.pick(SOON, sorted(list_methods())))
def test_a_method_prices_answers_or_says_that_it_does_not(name, tmp_path, monkeypatch):
    looked = []
    for module in (losses, ablations):
        monkeypatch.setattr(module, "list_priced", lambda w: looked.append(1) or list_priced(w))
    model = tiny.build("deepseek_v2" if name in ("reap", "hope") else "llama_gqa")
    result = tiny.compress(model, output=tmp_path / "out", method=name, keep=0.85, windows=SOME)
    said = [w for w in result.warnings if "objective answers changes nothing" in w]
    assert bool(looked) != bool(said), (looked[:1], result.warnings)
    assert all(name in w for w in said)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("source", ["builtin", "c4", "text.txt", "rows.jsonl", "ids.npy", "asked.jsonl"])
def test_sources_without_answers(source, tmp_path):
    import numpy as np

    (tmp_path / "text.txt").write_text("no answer")
    write(tmp_path / "rows.jsonl", {"text": "none"}, {"text": "none either"})
    write(tmp_path / "asked.jsonl", {"messages": DIALOGUE[:2]})
    np.save(tmp_path / "ids.npy", np.arange(9))
    tokenizer = byte_tokenizer(end=True)
    tokenizer.chat_template = TEMPLATE
    path = source if "." not in source else tmp_path / source
    with fails("no answers to price", source, "`messages`", "`prompt` and `answer`", "--objective text"):
        load_tokens(path, tokenizer, objective="answers")


def test_ids_and_texts_in_memory_hold_no_answers():
    for given in (torch.arange(9), ["a text"]):
        with fails("no answers to price"):
            load_tokens(given, byte_tokenizer(), objective="answers")


def test_a_mixture_with_a_text_is_refused(model, chat):
    asked = Text(source=f"{chat}:1,builtin:1", n_samples=8, seq_len=32, objective="answers")
    with fails("no answers to price · builtin"):
        api.read_calibration(open_source(model), load_tokenizer(model), asked)


def test_templates_that_change_what_is_said(tmp_path):
    tokenizer = byte_tokenizer(end=True)
    path = write(tmp_path / "a.jsonl", {"messages": DIALOGUE})
    for template in (
        TEMPLATE.replace("m.content | trim", "m.content | upper"),
        TEMPLATE.replace("m.content | trim", "m.content | trim if loop.last else ''"),
    ):
        tokenizer.chat_template = template
        with fails("other words than they are given", "né 2", "--objective text"):
            load_tokens(path, tokenizer, objective="answers")
        load_tokens(path, tokenizer)


def test_a_tokenizer_that_does_not_say_where_tokens_are(tmp_path):
    class Slow:
        is_fast, bos_token_id, eos_token_id, chat_template = False, None, None, TEMPLATE

    path = write(tmp_path / "a.jsonl", {"messages": DIALOGUE})
    with fails("Slow does not", "fast"):
        load_tokens(path, Slow(), objective="answers")


def test_another_objective(model, run, chat, tmp_path):
    with fails("unknown objective", "text or answers"):
        planish.compress(model, objective="chat", calibration=chat, keep=0.8)
    done = run("compress", model, "--calibration", "builtin", "--objective", "answers", "-o", tmp_path / "x")
    assert done.exit_code == 2 and "no answers to price" in done.output
    assert "--objective" not in run("eora", "--help").output and "--objective" in run("sweep", "--help").output
