"""The tokenizer of a GGUF file, rebuilt from its metadata so that it gives the ids that llama.cpp gives.

`tokenizer.ggml.model` "gpt2": byte-level BPE with stored merges, text split as `tokenizer.ggml.pre` says
(`planish.folder.splits`). "llama": SentencePiece BPE; a merge's rank follows from the score of the token that it makes,
characters without a token become bytes. Control and user-defined tokens are found in the text first, whole.

Differs from the tokenizers that models are published with where GGUF keeps less: no Unicode normalisation (qwen's NFC).
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import GenerationConfig, PreTrainedTokenizerFast

from planish.errors import InputError
from planish.folder.gguf_file import GGUF
from planish.folder.splits import ADDS_BOS, PHI3, PLAIN, SPLITS, WHOLE_WORDS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
SPACE = "▁"
ENDS = (  # tokens that end an answer, whatever their stored type, as llama.cpp finds them
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>",
)  # fmt: skip


def load_gguf_tokenizer(file: GGUF) -> PreTrainedTokenizerFast | None:
    """The tokenizer, or None where the file holds none."""
    meta = file.metadata
    kind = meta.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{file.path} holds a tokenizer of the kind {kind!r}; read are gpt2 and llama")
    tokens, types = list_tokens(file)
    ids = {t: i for i, (t, k) in enumerate(zip(tokens, types, strict=True)) if k != UNUSED or t != f"[PAD{i}]"}
    special = read_special(file, tokens)
    try:
        backend = (
            build_byte_level(file, ids) if kind == "gpt2" else build_sentencepiece(file, ids, types, special["unk"])
        )
        add_tokens(backend, tokens, types, rstrip=bool(PHI3.search(str(meta.get("general.name")))))
        set_frame(backend, file, tokens, special, kind)
    except InputError:
        raise
    except Exception as error:  # whatever the library says of vocabulary and merges that do not fit together
        raise InputError(f"{file.path}: cannot build its tokenizer: {' '.join(str(error).split())[:300]}") from None
    names = {f"{n}_token": tokens[i] for n, i in special.items() if i is not None}
    built = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, model_max_length=context_length(meta), **names
    )
    built.chat_template = read_template(meta)
    return built


def context_length(meta: dict[str, Any]) -> int:
    return int(meta.get(f"{meta.get('general.architecture')}.context_length", 1 << 30))


def list_tokens(file: GGUF) -> tuple[list[str], list[int]]:
    """Every id's text and type; ends of answers count as control tokens."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise InputError(f"{file.path} has no tokenizer.ggml.tokens in its metadata")
    types = file.metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise InputError(f"{file.path} lists {len(tokens)} tokens and {len(types)} token types")
    tokens = [t or f"[EMPTY_{i}]" for i, t in enumerate(tokens)]
    if len(set(tokens)) != len(tokens):
        twice = next(t for i, t in enumerate(tokens) if t in tokens[:i])
        raise InputError(f"{file.path} lists the token {twice!r} twice")
    rows = file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else len(tokens)
    if len(tokens) > rows:
        raise InputError(f"{file.path} lists {len(tokens)} tokens, its embedding has {rows} rows")
    return tokens, [CONTROL if t in ENDS and k == NORMAL else k for t, k in zip(tokens, types, strict=True)]


def read_special(file: GGUF, tokens: list[str]) -> dict[str, int | None]:
    """Ids of the beginning, the end, the unknown and the padding token."""
    defaults = {"bos": 1, "eos": 2, "unk": 0} if file.metadata["tokenizer.ggml.model"] == "llama" else {}
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {n: file.metadata.get(f"tokenizer.ggml.{k}_token_id", defaults.get(n)) for n, k in keys.items()}
    return {n: i if isinstance(i, int) and 0 <= i < len(tokens) else None for n, i in found.items()}


def build_byte_level(file: GGUF, ids: dict[str, int]) -> Tokenizer:
    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in SPLITS:
        raise InputError(
            f"{file.path} splits text in the way {pre!r}, which planish does not know (known: {', '.join(sorted(SPLITS))}); "
            "another one would change the tokens"
        )
    stored = file.metadata.get("tokenizer.ggml.merges")
    if not isinstance(stored, list):
        raise InputError(f"{file.path} has no tokenizer.ggml.merges in its metadata")
    merges = [(m[:at], m[at + 1 :]) for m in stored if (at := m.find(" ", 1)) > 0]
    merges = [(a, b) for a, b in merges if a in ids and b in ids and a + b in ids]
    backend = Tokenizer(BPE(ids, merges, ignore_merges=pre in WHOLE_WORDS))
    splits = [pre_tokenizers.Split(Regex(r), "isolated") for r in SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def build_sentencepiece(file: GGUF, ids: dict[str, int], types: list[int], unknown: int | None) -> Tokenizer:
    tokens, scores = file.metadata["tokenizer.ggml.tokens"], file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise InputError(f"{file.path} has no tokenizer.ggml.scores for its {len(tokens)} tokens in its metadata")
    merges = rank_merges({t: scores[i] for t, i in ids.items() if types[i] == NORMAL}, ids)
    name = None if unknown is None else tokens[unknown]
    backend = Tokenizer(BPE(ids, merges, unk_token=name, fuse_unk=True, byte_fallback=BYTE in types))
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = [normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", SPACE)])
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return backend


def rank_merges(scores: dict[str, float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, best score first; the longest left part first where scores are equal.

    SentencePiece merges whichever neighbours make the token of the highest score, the leftmost of equals. Ranks say the
    same where all scores differ, as SentencePiece's BPE trainer makes them.
    """
    found = [
        (-score, -at, (text[:at], text[at:]))
        for text, score in scores.items()
        for at in range(1, len(text))
        if text[:at] in ids and text[at:] in ids
    ]
    return [pair for _, _, pair in sorted(found, key=lambda m: m[:2])]


def add_tokens(backend: Tokenizer, tokens: list[str], types: list[int], rstrip: bool) -> None:
    """Tokens that are found in the text as a whole. `rstrip`: phi-3's control tokens take the white space behind them."""
    for text, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, UNKNOWN):
            strip = rstrip and text not in PLAIN
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False, rstrip=strip)])
        elif kind == USER_DEFINED:
            backend.add_tokens([AddedToken(text, special=False, normalized=False, rstrip=rstrip)])


def set_frame(backend: Tokenizer, file: GGUF, tokens: list[str], special: dict[str, int | None], kind: str) -> None:
    """What is put around a text: BOS before it, EOS behind it."""
    first = kind == "llama" or file.metadata.get("tokenizer.ggml.pre") in ADDS_BOS
    wanted = {"bos": file.metadata.get("tokenizer.ggml.add_bos_token", first)}
    wanted["eos"] = file.metadata.get("tokenizer.ggml.add_eos_token", False)
    used = {n: i for n, i in special.items() if wanted.get(n) and i is not None}
    if not used:
        return
    around = [f"{tokens[used['bos']]}"] if "bos" in used else []
    behind = [f"{tokens[used['eos']]}"] if "eos" in used else []
    pair = [*around, "$A", *behind, *(f"{t}:1" for t in around), "$B:1", *(f"{t}:1" for t in behind)]
    backend.post_processor = processors.TemplateProcessing(
        single=[*around, "$A", *behind], pair=pair, special_tokens=[(tokens[i], i) for i in used.values()]
    )


def read_template(meta: dict[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or all of them by name."""
    default = meta.get("tokenizer.chat_template")
    others = {n: meta.get(f"tokenizer.chat_template.{n}") for n in meta.get("tokenizer.chat_templates", [])}
    named = {n: t for n, t in others.items() if isinstance(t, str)}
    return {"default": default, **named} if named and isinstance(default, str) else default


def read_generation_config(file: GGUF) -> GenerationConfig:
    """Beginning, padding and all tokens that end an answer."""
    if not file.metadata.get("tokenizer.ggml.tokens"):
        return GenerationConfig()
    tokens, types = list_tokens(file)
    special = read_special(file, tokens)
    named = (file.metadata.get(f"tokenizer.ggml.{n}_token_id") for n in ("eot", "eom"))
    ends = [special["eos"], *(i for i in named if isinstance(i, int) and i < len(tokens))]
    ends += [i for i, (t, k) in enumerate(zip(tokens, types, strict=True)) if t in ENDS and k == CONTROL]
    unique = list(dict.fromkeys(i for i in ends if i is not None))
    return GenerationConfig(
        bos_token_id=special["bos"],
        pad_token_id=special["pad"],
        eos_token_id=unique[0] if len(unique) == 1 else unique or None,
    )
