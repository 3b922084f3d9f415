"""Reading a SOURCE and cutting windows; every message a user can get."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from planish.calibrate import documents
from planish.calibrate.documents import builtin_files
from planish.calibrate.text import (
    Text,
    cut_window,
    eval_windows,
    fingerprint,
    interleave,
    load_tokens,
    share_out,
    shuffle_windows,
)
from planish.errors import InputError
from planish.mixture import join_mixture, split_mixture
from tiny import sample_windows


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def byte_tokenizer(with_bos: bool = False, end: bool = False):
    """One token per byte, ids 0 to 255; 256 is the beginning of a sequence, 257 its end."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    ends = {"eos_token": "</s>"} if end else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=8, **ends)


TOKENIZER = byte_tokenizer()


def fails(*words: str):
    """An InputError whose message has all of these."""
    return pytest.raises(InputError, match="(?s)" + "".join(f"(?=.*{w})" for w in words))


# --- sources


def test_txt(tmp_path, tokenizer, recwarn, caplog):
    (tmp_path / "a.txt").write_text("two words\n\nné", encoding="utf-8")
    got = load_tokens(tmp_path / "a.txt", tokenizer)
    assert tokenizer.decode(got.tokens) == "two words\n\nné"
    assert got.tokens.dtype == torch.int64 and got.tokens.ndim == 1
    assert (got.source, got.bos, got.is_ids, got.sampling) == (str(tmp_path / "a.txt"), False, False, "random")
    assert not caplog.records  # nothing about model_max_length, which is 8


@pytest.mark.parametrize(("name", "content"), [("a.txt", "né"), ("a.jsonl", '{"text": "né"}')])
def test_a_byte_order_mark_is_no_text(tmp_path, tokenizer, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert tokenizer.decode(load_tokens(tmp_path / name, tokenizer).tokens) == "né"


def spell(text: Text) -> str:
    """The text with its special tokens as characters: < begins, > ends a sequence."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return (
        "".join({256: "<", 257: ">"}.get(i) or alphabet[i] for i in text.tokens.tolist())
        .replace("Ġ", " ")
        .replace("Ċ", "|")
    )


@pytest.mark.parametrize(
    ("bos", "with_bos", "expected", "policy"),
    [
        ("auto", True, "<one<two", "every"),
        ("auto", False, "one>two>", "never"),
        ("every", True, "<one<two", "every"),
        ("every", False, "one>two>", "every"),
        ("once", True, "<one||two", "once"),
        ("once", False, "one||two", "never"),
        ("never", True, "one||two", "never"),
        ("never", False, "one||two", "never"),
    ],
)
def test_where_sequences_begin(tmp_path, bos, with_bos, expected, policy):
    """Documents are joined, as in the papers, only when the token is to come once or never."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "two"}\n')
    got = load_tokens(tmp_path / "a.jsonl", byte_tokenizer(with_bos, end=True), bos=bos)
    assert (spell(got), got.policy, got.bos) == (expected, policy, policy != "never")
    assert got.begin == (256 if policy == "every" else None)


def test_bos_that_cannot_be(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    bare = byte_tokenizer()
    bare.bos_token = None
    with fails("bos every", "no beginning-of-sequence token"):
        load_tokens(tmp_path / "a.txt", bare, bos="every")
    with fails("'always'", "auto, every, once or never"):
        load_tokens(tmp_path / "a.txt", bare, bos="always")
    assert load_tokens(np.arange(4), byte_tokenizer(), bos="every").begin == 256
    assert load_tokens(np.arange(4), byte_tokenizer(with_bos=True)).begin is None  # ids are taken as they are


def test_every_window_begins_where_the_model_expects(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 3)
    text = load_tokens(tmp_path / "a.txt", byte_tokenizer(with_bos=True))
    for sampling in ("random", "contiguous"):
        windows = sample_windows(text.tokens, 3, 7, 1, sampling, text.begin)
        assert windows.shape == (3, 7) and (windows[:, 0] == 256).all() and (windows[:, 1:] < 256).all()


@given(tokens=st.lists(st.integers(0, 3), min_size=2, max_size=40), seq_len=st.integers(2, 9))
def test_windows_with_a_beginning_hold_every_token_once(tokens, seq_len):
    tokens = torch.tensor(tokens)
    if len(tokens) < seq_len:
        return
    windows = eval_windows(tokens, seq_len, 0)
    assert (windows[:, 0] == 0).all() and windows.shape[1] == seq_len
    rest, held = tokens.tolist(), windows.tolist()
    for window in held:  # the naive reader: a beginning is put in front unless it stands there
        body = window if rest[0] == 0 else window[1:]
        assert rest[: len(body)] == body
        rest = rest[len(body) :]
    assert not rest or len(rest) < (seq_len if rest[0] == 0 else seq_len - 1)
    assert torch.equal(sample_windows(tokens, len(held), seq_len, 0, "contiguous", 0), windows)
    assert torch.equal(cut_window(tokens, 0, seq_len), tokens[:seq_len])


def test_lists_of_texts():
    got = load_tokens(["one", " \n", "two"], byte_tokenizer(end=True))
    assert (spell(got), got.source, got.is_ids) == ("one>two>", "texts", False)
    with fails("number 1 is of type int"):
        load_tokens(["one", 2], byte_tokenizer())
    with fails("no text"):
        load_tokens([], byte_tokenizer())


@given(texts=st.lists(st.text(st.characters(exclude_categories=()), min_size=1), min_size=1, max_size=4))
def test_any_text_that_python_can_hold_gets_through(texts):
    """Half a surrogate pair too, which no encoding can hold: it becomes the replacement character."""
    if not any(t.strip() for t in texts):
        return
    got = load_tokens(texts, TOKENIZER)
    expected = [t.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for t in texts if t.strip()]
    assert TOKENIZER.decode(got.tokens, clean_up_tokenization_spaces=False) == "".join(expected)


def test_half_a_character_in_json(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "half \ud83d a pair \ud83d\ude00"}) + "\n")
    assert tokenizer.decode(load_tokens(tmp_path / "a.jsonl", tokenizer).tokens) == "half \ufffd a pair 😀"


def test_conversations_go_through_the_models_own_template(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n" + '{"text": "one"}\n'
    )
    tokenizer = byte_tokenizer(with_bos=True)
    with fails("no chat template", "field `text`"):
        load_tokens(tmp_path / "a.jsonl", tokenizer)
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert spell(load_tokens(tmp_path / "a.jsonl", tokenizer)) == "<user: hi|<one"
    tokenizer.chat_template = "{{ raise_exception('only assistants') }}"
    with fails("refuses", "user", "only assistants"):
        load_tokens(tmp_path / "a.jsonl", tokenizer)
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": [{"role": "user"}]}))
    with fails("b.jsonl, line 1", "`role` and `content`"):
        load_tokens(tmp_path / "b.jsonl", tokenizer)


def test_jsonl_joins_documents_by_a_blank_line(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "one\\u2028x", "id": 1}\n\n{"text": "two"}\n', encoding="utf-8")
    assert tokenizer.decode(load_tokens(tmp_path / "a.jsonl", tokenizer, bos="once").tokens) == "one\u2028x\n\ntwo"


def test_parquet(tmp_path, tokenizer):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    assert tokenizer.decode(load_tokens(tmp_path / "a.parquet", tokenizer, bos="once").tokens) == "one\n\ntwo"
    pq.write_table(pa.table({"body": ["one"]}), tmp_path / "b.parquet")
    with fails("b.parquet", r"\['body'\]", "`text`"):
        load_tokens(tmp_path / "b.parquet", tokenizer)
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "c.parquet")
    with fails("c.parquet", "string column"):
        load_tokens(tmp_path / "c.parquet", tokenizer)
    (tmp_path / "d.parquet").write_bytes(b"not parquet")
    with fails("cannot read parquet", "d.parquet"):
        load_tokens(tmp_path / "d.parquet", tokenizer)


def test_parquet_without_pyarrow(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with fails("pyarrow", r"pip install 'planish\[data\]'"):
        load_tokens(tmp_path / "a.parquet", tokenizer)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64", "uint64"])
def test_npy_needs_no_tokenizer(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.arange(50).astype(dtype))
    got = load_tokens(str(tmp_path / "a.npy"), vocab_size=50)
    assert torch.equal(got.tokens, torch.arange(50))
    assert (got.bos, got.is_ids, got.sampling) == (False, True, "contiguous")


@pytest.mark.parametrize("ids", [np.arange(5, dtype=np.int32), torch.arange(5)])
def test_ids_in_memory(ids):
    assert load_tokens(ids).tokens.tolist() == [0, 1, 2, 3, 4]


def test_builtin_splits_share_no_file(tokenizer):
    train, heldout = (set(builtin_files(s)) for s in ("train", "heldout"))
    assert train and heldout and not train & heldout


def test_builtin_takes_the_part_asked_for(tokenizer, monkeypatch):
    monkeypatch.setattr(documents, "builtin_text", lambda split: split)
    assert tokenizer.decode(load_tokens("builtin", tokenizer).tokens) == "train"
    assert tokenizer.decode(load_tokens("builtin", tokenizer, split="evaluation").tokens) == "heldout"


@pytest.mark.parametrize(
    ("name", "split", "expected_call", "joined"),
    [
        ("wikitext2", "calibration", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", None), "a\n\nb"),
        ("wikitext2", "evaluation", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None), "a\n\nb"),
        ("c4", "calibration", ("allenai/c4", None, "train[:8192]", "en/c4-train.00000-of-01024.json.gz"), "a\n\nb"),
        ("c4", "evaluation", ("allenai/c4", None, "train[:1100]", "en/c4-validation.00000-of-00008.json.gz"), "a b"),
    ],
)
def test_data_sets(monkeypatch, tokenizer, name, split, expected_call, joined):
    calls = []

    def load_dataset(path, config=None, *, split, data_files=None):
        calls.append((path, config, split, data_files and data_files["train"]))
        return {"text": ["a", "b"]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    got = load_tokens(name, tokenizer, split=split, bos="once")
    assert calls == [expected_call] and tokenizer.decode(got.tokens) == joined and not got.is_ids


def test_data_sets_that_cannot_be_had(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with fails("wikitext2", r"planish\[data\]", "builtin"):
        load_tokens("wikitext2", tokenizer)

    def load_dataset(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with fails("c4", "ConnectionError: offline", "check the network"):
        load_tokens("c4", tokenizer)


def test_wikitext2_test_split(data_path, tokenizer):
    got = load_tokens(data_path("text", "wikitext2_test.txt"), tokenizer)
    assert len(got.tokens) == data_path("text", "wikitext2_test.txt").stat().st_size


# --- what users get wrong


def test_unknown_source(tokenizer, tmp_path):
    with fails("wikitext3", "builtin, wikitext2, c4", ".npy"):
        load_tokens("wikitext3", tokenizer)
    with fails("a.csv", ".parquet"):
        load_tokens(tmp_path / "a.csv", tokenizer)


def test_missing_file_and_folder(tokenizer, tmp_path):
    with fails("does not exist", "a.txt"):
        load_tokens(tmp_path / "a.txt", tokenizer)
    (tmp_path / "b.txt").mkdir()
    with fails("is not a file", "b.txt"):
        load_tokens(tmp_path / "b.txt", tokenizer)


def test_unreadable_file(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with fails("UTF-8", "a.txt, byte 3"):
        load_tokens(tmp_path / "a.txt", tokenizer)

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_text", denied)
    with fails("cannot read text", "a.txt", "Permission denied"):
        load_tokens(tmp_path / "a.txt", tokenizer)


@pytest.mark.parametrize(("name", "content"), [("a.txt", " \n"), ("a.jsonl", ""), ("b.jsonl", '{"text": ""}\n')])
def test_empty_text(tokenizer, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with fails("no text", name):
        load_tokens(tmp_path / name, tokenizer)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", ("broken JSON", "line 3", "column 2")),
        ('{"body": "x"}', ("no text", "line 3", r"\['body'\]", "`text`")),
        ('{"text": 5}', ("line 3", "got `text` of type int", "string field `text`")),
        ('["x"]', ("line 3", "list")),
    ],
)
def test_bad_jsonl_line(tokenizer, tmp_path, line, words):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "fine"}) + "\n\n" + line + "\n")
    with fails("a.jsonl", *words):
        load_tokens(tmp_path / "a.jsonl", tokenizer)


def test_text_without_tokenizer(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with fails("no tokenizer", ".npy", "tokenizer="):
        load_tokens(tmp_path / "a.txt", None)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (np.ones(5), ("float64", "1-D array of integers")),
        (np.ones((5, 2), dtype=np.int64), (r"\(5, 2\)", "1-D")),
        (np.array([True, False]), ("bool",)),
        (np.array([], dtype=np.int64), ("no tokens",)),
        (np.array([1, 2, -3, -4]), ("position 2", "got -3")),
        (np.array([1, 97, 98]), ("position 1", "got 97", "0 to 96")),
        (np.array([1, 2**63], dtype=np.uint64), ("position 1", str(2**63))),
    ],
)
def test_bad_ids(tmp_path, ids, words):
    np.save(tmp_path / "a.npy", ids)
    with fails("a.npy", *words):
        load_tokens(tmp_path / "a.npy", vocab_size=97)


def test_npy_that_is_no_array(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "b.npy").write_bytes(b"")
    for name in ("a.npy", "b.npy"):
        with fails("cannot read token ids", name):
            load_tokens(tmp_path / name)


def test_tokenizer_larger_than_the_model(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("az")
    with fails("a.txt, position 1", "this model's tokenizer"):
        load_tokens(tmp_path / "a.txt", tokenizer, vocab_size=int(tokenizer("a")["input_ids"][0]) + 1)


# --- windows


def test_random_windows_are_distinct_and_repeatable():
    tokens = torch.arange(100)
    a, b = (sample_windows(tokens, 20, 7, seed=3) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (20, 7) and a.dtype == torch.int64
    assert torch.equal(a, a[:, :1] + torch.arange(7))
    assert len(set(a[:, 0].tolist())) == 20
    assert not torch.equal(a, sample_windows(tokens, 20, 7, seed=4))


def test_contiguous_windows_start_at_the_start():
    got = sample_windows(torch.arange(100), 3, 10, seed=9, sampling="contiguous")
    assert torch.equal(got, torch.arange(30).view(3, 10))


@given(n=st.integers(2, 60), seq_len=st.integers(2, 20))
def test_every_window_that_fits_can_be_had_and_no_more(n, seq_len):
    tokens = torch.arange(n)
    if n < seq_len:
        for cut in (lambda: eval_windows(tokens, seq_len), lambda: sample_windows(tokens, 1, seq_len)):
            with fails(f"got {n} tokens", f"seq_len {seq_len}"):
                cut()
        return
    assert torch.equal(eval_windows(tokens, seq_len).flatten(), tokens[: n // seq_len * seq_len])
    for sampling, available in (("random", n - seq_len + 1), ("contiguous", n // seq_len)):
        assert len(sample_windows(tokens, available, seq_len, 0, sampling)) == available
        with fails(f"hold {available} {sampling} windows", f"--n-samples {available}"):
            sample_windows(tokens, available + 1, seq_len, 0, sampling)


def test_bad_window_arguments():
    tokens = torch.arange(10)
    with fails("n_samples 0"):
        sample_windows(tokens, 0, 5)
    with fails("seq_len 1", "2 or more"):
        eval_windows(tokens, 1)
    with fails("'sideways'", "contiguous or random"):
        sample_windows(tokens, 1, 5, sampling="sideways")


def test_fingerprint_depends_on_everything():
    tokens = torch.arange(12)
    prints = [
        fingerprint(tokens, seed=0), fingerprint(tokens, seed=1), fingerprint(tokens),
        fingerprint(tokens.flip(0), seed=0), fingerprint(tokens.view(3, 4), seed=0),
    ]  # fmt: skip
    assert len(set(prints)) == 5 and prints[0] == fingerprint(tokens.clone(), seed=0)
    assert fingerprint(torch.arange(3), seed=0).startswith("2938e7bc")  # the same on every machine


def test_text_says_how_to_sample():
    assert Text(torch.arange(3), "x", bos=False, is_ids=True).sampling == "contiguous"


# --- several texts


@given(shares=st.lists(st.floats(0.05, 5), min_size=1, max_size=5), n=st.integers(1, 200))
def test_windows_are_shared_out_by_weight(shares, n):
    exact = [s / sum(shares) * n for s in shares]
    try:
        found = share_out(shares, n)
    except InputError:
        assert min(exact) < 1  # some text would have got none
        return
    assert sum(found) == n and min(found) >= 1
    assert all(f <= max(1, e + 1) for f, e in zip(found, exact))
    if min(exact) >= 1:
        assert all(abs(f - e) < 1 for f, e in zip(found, exact))


def test_windows_of_several_texts_are_spread_evenly():
    parts = [torch.full((6, 2), 0), torch.full((3, 2), 1), torch.full((1, 2), 2)]
    found = interleave(parts)[:, 0].tolist()
    assert sorted(found) == [0] * 6 + [1] * 3 + [2] and found[:5].count(0) == 3
    assert torch.equal(interleave(parts[:1]), parts[0])


def test_mixtures_are_read():
    assert split_mixture("c4:0.5,code.jsonl:.3, b:2") == {"c4": 0.5, "code.jsonl": 0.3, "b": 2.0}
    assert split_mixture("builtin") == {"builtin": 1.0} and split_mixture("a:b.txt") == {"a:b.txt": 1.0}
    assert join_mixture(split_mixture("c4:0.5,code.jsonl:0.3")) == "c4:0.5,code.jsonl:0.3"
    for wrong in ("a:1,a:2", "a:0,b:1"):
        with fails("every source once"):
            split_mixture(wrong)


# --- shuffled windows


@given(n=st.integers(1, 70), length=st.integers(1, 9), share=st.floats(0, 1))
def test_shuffled_windows_keep_their_tokens_and_their_first(n, length, share):
    windows = torch.arange(n * length).view(n, length)
    before = windows.clone()
    found = shuffle_windows(windows, share)
    assert torch.equal(windows, before) and torch.equal(found, shuffle_windows(windows, share))
    assert torch.equal(found[:, 0], windows[:, 0])
    assert torch.equal(found.sort(1).values, windows)
    changed = (found != windows).any(1)
    assert int(changed.sum()) <= share * n + 2
    if length > 5:  # else the order drawn may be the one that was
        assert int(changed.sum()) >= share * n - 2


@pytest.mark.parametrize("step", [2, 4, 16])
def test_every_kth_window_holds_its_share_of_shuffled_ones(step):
    windows = torch.arange(8192 * 8).view(-1, 8)
    changed = (shuffle_windows(windows, 0.25) != windows).any(1)
    for first in range(step):
        assert float(changed[first::step].float().mean()) == pytest.approx(0.25, abs=0.02)
