"""The folder's tokenizer as GGUF metadata."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from planish.errors import InputError
from planish.folder.gguf_reader import is_gguf
from planish.folder.splits import PHI3, PLAIN, SPLITS, name_split
from planish.folder.tokenizer import copy_files, load_tokenizer
from planish.rounding.ggml import load_gguf

# gguf.TokenType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def write_vocabulary(
    writer: Any, folder: Path, config: Any, wanted: bool = True, name: str = ""
) -> tuple[str, list[str]]:
    """Add the tokenizer and the model's name to a GGUF writer; returns what was written ("gpt2 (pre-tokenizer)", "llama" or
    "none"), and notes.

    Ids that the embedding has no row for are left out, as are merges that would make them.
    """
    if wanted and is_gguf(folder):
        with tempfile.TemporaryDirectory() as scratch:
            copy_files(folder, Path(scratch))
            return write_vocabulary(writer, Path(scratch), config, name=name)
    file = folder / "tokenizer.json"
    if not wanted or not file.is_file():
        if wanted and (folder / "tokenizer.model").is_file():
            raise InputError(
                f"{folder} has a tokenizer.model but no tokenizer.json; write one with "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder), or pass --no-vocabulary"
            )
        writer.add_name(name)
        writer.add_tokenizer_model("none")
        return "none", []
    tokenizer = load_tokenizer(folder)  # which refuses damaged files
    data = json.loads(file.read_text(encoding="utf-8"))
    model = data.get("model", {})
    if model.get("type", "BPE") != "BPE":
        raise InputError(
            f"{file} holds a {model['type']} tokenizer; GGUF export writes BPE (pass --no-vocabulary to leave it out)"
        )
    tokens, types, beyond = list_tokens(data, config.vocab_size)
    notes: list[str] = []
    writer.add_name(fit_name(name, data, tokens))
    if model.get("byte_fallback"):
        notes += check_bytes(tokens, file)
        kind = "llama"
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(merge_scores(model, tokens))
        writer.add_add_space_prefix(adds_space(data))
    else:
        pre = find_split(data, file)
        kind = f"gpt2 ({pre})"
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        writer.add_token_merges([" ".join(p) for p in pairs if "".join(p) not in beyond])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if beyond:
        named = ", ".join(map(repr, list(beyond)[:3])) + (" …" if len(beyond) > 3 else "")
        notes.append(f"{len(beyond)} tokens beyond the embedding's {config.vocab_size} rows are left out: {named}")
    return kind, notes + write_special(writer, tokenizer, config.vocab_size)


def count_vocabulary(folder: Path, config: Any) -> int:
    """Bytes of a GGUF file that hold the folder's tokenizer. Raises InputError where it cannot."""
    gguf = load_gguf()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "vocabulary.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        try:
            write_vocabulary(writer, folder, config)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
        finally:
            writer.close()
        return path.stat().st_size


def fit_name(name: str, data: dict[str, Any], tokens: list[str]) -> str:
    """The name, made to say Phi-3 where the tokenizer is like Phi-3's and only there: llama.cpp goes by it (see `PHI3`)."""
    alike = {"</s>", *PLAIN} <= {*tokens} and any(t.get("rstrip") for t in data.get("added_tokens", []))
    if alike:
        return name if PHI3.search(name) else f"phi-3 {name}"
    return PHI3.sub("phi", name)


def check_bytes(tokens: list[str], file: Path) -> list[str]:
    """Refuses what llama.cpp ends the whole process at: a vocabulary that falls back to bytes, and no token for a line's end,
    which it looks up when it loads the file. Notes about other bytes, which it looks up where a text needs them."""
    known = set(tokens)
    missing = [b for b in range(256) if f"<0x{b:02X}>" not in known and chr(b) not in known]
    if 10 in missing:
        raise InputError(
            f"{file} falls back to bytes and has no token <0x0A>; llama.cpp aborts on such a file. Take the model's own "
            "tokenizer, or pass --no-vocabulary to leave it out"
        )
    return [f"the tokenizer has no token for {len(missing)} of 256 bytes: llama.cpp ends where it needs one"] * bool(
        missing
    )


def list_tokens(data: dict[str, Any], size: int) -> tuple[list[str], list[int], dict[str, int]]:
    """Text and llama.cpp token type of every id below `size`; ids that the tokenizer lacks are unused. And text → id of the
    tokenizer's others."""
    model = data["model"]
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    beyond: dict[str, int] = {}
    for text, i in model["vocab"].items():
        if i >= size:
            beyond[text] = i
            continue
        is_byte = model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x")
        tokens[i], types[i] = text, BYTE if is_byte else UNKNOWN if text == model.get("unk_token") else NORMAL
    for added in data.get("added_tokens", []):
        i, text = added["id"], added["content"]
        if i >= size:
            beyond[text] = i
            continue
        special = UNKNOWN if text == model.get("unk_token") and model.get("byte_fallback") else CONTROL
        tokens[i], types[i] = text, special if added.get("special") else USER_DEFINED
    return tokens, types, beyond


def merge_scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """Scores under which llama.cpp's bigram merging follows the merge ranks: −rank of the first merge that gives a token."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    last = len(model["merges"])
    return [-float(ranks.get(t, last)) for t in tokens]


def adds_space(data: dict[str, Any]) -> bool:
    """Does the tokenizer put a space before the text?"""
    normalizer = data.get("normalizer") or {}
    parts = normalizer.get("normalizers", [normalizer])
    pre = data.get("pre_tokenizer") or {}
    return any(p.get("type") == "Prepend" for p in parts) or (
        pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") != "never"
    )


def find_split(data: dict[str, Any], file: Path) -> str:
    """llama.cpp's name of a byte-level tokenizer's splitting."""
    pre = data.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", [pre])
    steps = [read_split(p) for p in parts]
    name = name_split(tuple(filter(None, steps)), bool(data["model"].get("ignore_merges")))
    if name is not None and None not in steps:
        return name
    raise InputError(
        f"{file} splits text in a way that GGUF export does not know (pre-tokenizer {json.dumps(pre)[:200]}); a wrong one "
        "would change the tokens. Pass --no-vocabulary to leave the tokenizer out"
    )


def read_split(part: dict[str, Any]) -> str | None:
    """The regular expression that one step of a pre-tokenizer splits by, empty if it does not split, None if it is unlike
    any of llama.cpp's."""
    if part.get("type") == "Digits":
        return r"\p{N}" if part.get("individual_digits") else r"\p{N}+"
    if part.get("type") == "ByteLevel" and not part.get("add_prefix_space"):
        return SPLITS["gpt-2"][0] if part.get("use_regex", True) else ""
    if part.get("type") == "Split" and part.get("behavior", "Isolated") == "Isolated" and not part.get("invert"):
        return part["pattern"].get("Regex")
    return None


def write_special(writer: Any, tokenizer: Any, size: int) -> list[str]:
    """Special ids, what is added around a text, and the chat template; ids of `size` and more are left out, with a note."""
    found = {n: i for n in ("bos", "eos", "unk", "pad") if (i := getattr(tokenizer, f"{n}_token_id")) is not None}
    known = {n: i for n, i in found.items() if i < size}
    for name, value in known.items():
        getattr(writer, f"add_{name}_token_id")(value)
    ids = tokenizer("a").input_ids
    plain = tokenizer("a", add_special_tokens=False).input_ids
    writer.add_add_bos_token(len(ids) > len(plain) and ids[0] == known.get("bos"))
    writer.add_add_eos_token(len(ids) > len(plain) and ids[-1] == known.get("eos"))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    return [
        f"the tokenizer's {n} token {i} has no row in the embedding: left out"
        for n, i in found.items()
        if n not in known
    ]
