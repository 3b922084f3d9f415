"""The best model of a size: cuts and rounding compete, by measured divergence on calibration windows that none of them saw.

    for bits in the target's types:                       (16, 8, 4, 3, 2 and so on)
        all weights, if they fit in these bits            (plain rounding: the finest that fits, always among the plans)
        else the share of the blocks' weights that fits   (the next finer types, cut by the method and then rounded)
    types that differ among matrices, as many bits on average as fit: all weights; a share between the last two plans'
    each made from three quarters of the windows · KL(dense ‖ plan) on the rest · the least one is made from all of them

So the result is never worse, in that measure, than the finest plain rounding of the size or than cutting alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import ceil, inf

from planish.dry_run import look_ahead
from planish.errors import InputError
from planish.export.vocabulary import count_vocabulary
from planish.folder.source import Source
from planish.methods.method import Method
from planish.plan.footprint import count_headers, footprint
from planish.request import LIMITS, Request, label
from planish.rounding.types import DENSE_NAMES, choose
from planish.sizes.trials import STEPS, Choice, settle, trim
from planish.walks.bits import HEAD, find_heads, list_rounded, read_asked, refuse_head

LEAST = 0.35  # share of the blocks' weights below which no cut is tried
NEAR = 0.002  # of the smallest share that a method can cut to
CLOSE = 1.15  # times the weights: of types between two whose plans keep no more apart none is tried
FINER = 2  # so many types finer than the one that holds all weights are tried with cuts
CONTEXT = 4096  # tokens of the cache unless told, or as many as the model has positions
UBATCH = 512  # tokens that llama.cpp runs at a time
PARTS = 2  # tensors of a packed linear beside one, but for zero points
ENTRY = 112  # bytes of a tensor's entry in a header, but for its name
GGUF_ENTRY = 96  # bytes of a tensor's entry in llama.cpp's file, and of what aligns it
OWN = 4096  # bytes of that file's metadata beside the tokenizer
SUFFIX = 8  # bytes that its name is longer, where it is but one
LADDERS = {"gguf": ("16", "8", "6", "5", "4", "3", "2"), "vllm": ("16", "8", "4")}
LADDER = ("16", "8", "4", "3", "2")
Floor = Callable[[str], float]  # bits → the least share of the blocks' weights that is tried there
HEADS = {"gguf": ("6", "5", "4", "3"), "hf": ("8", "4")}  # bits of embedding and head that compete with the default


def find_size(request: Request, source: Source) -> int:
    """Bytes that the written model may have."""
    if request.fit is None and request.max_bytes is None:
        raise InputError("--bits auto chooses among types by a size: give --max-bytes or --fit")
    if request.fit is not None and request.bits not in (None, "auto", *DENSE_NAMES):
        raise InputError(f"--fit chooses the bits itself: --bits {request.bits} cannot hold beside it")
    asked = [n for n in LIMITS if getattr(request, n) is not None]
    if beside := [n for n in asked if n != "max_bytes" or request.fit is not None]:
        raise InputError(
            f"the keep follows from the size: --{label(beside[0])} cannot hold beside --fit or --bits auto"
        )
    if request.fit is None:
        return int(request.max_bytes or 0)
    context = find_context(request, source)
    if (left := request.fit - reserve(source, context) - count_file(request, source)) > 0:
        return left
    spared = reserve(source, context) - reserve(source, 1)
    hint = "; a smaller --context takes less" if spared + left > 0 else ", nearly all of it with any --context"
    raise InputError(
        f"--fit {request.fit:,}: the 16-bit cache of {context} tokens, running and the file's own metadata take "
        f"{request.fit - left:,} bytes" + hint
    )


def count_file(request: Request, source: Source) -> int:
    """Bytes that llama.cpp's file has beside those of the folder it is made from: the tokenizer, other metadata, and numbers of
    no matrix in fp32. 0 for other targets, which run the folder."""
    if request.target != "gguf":
        return 0
    heads = len(find_heads(source)) * source.shape(0).hidden * source.config.get_text_config().vocab_size
    numbers = [n for n, dtype in source.sizes().values() if dtype.is_floating_point]
    try:
        vocabulary = count_vocabulary(source.folder, source.config) if source.folder else 0
    except InputError:  # nor can the file hold it
        vocabulary = 0
    return vocabulary + OWN + GGUF_ENTRY * len(numbers) + 2 * max(0, sum(numbers) - heads - count_rounded(source))


def find_context(request: Request, source: Source) -> int:
    """Tokens of the cache: those that are asked for, else `CONTEXT`, or as many as the model has positions."""
    positions = getattr(source.config.get_text_config(), "max_position_embeddings", None) or CONTEXT
    return request.context or min(CONTEXT, positions)


def find_floor(request: Request, method: Method, source: Source, windows: tuple[int, int]) -> Floor:
    """The smallest shares, `LEAST` or more, that the method can cut to on so many windows (n_samples, seq_len), told by plans from
    shapes; 1 where it cannot cut at all."""

    def reaches(bits: str, keep: float) -> bool:
        try:
            look_ahead(settle(request, Choice(bits, keep)), method, source, windows)
        except InputError:
            return False
        return True

    @cache
    def floor(bits: str) -> float:
        if reaches(bits, LEAST):
            return LEAST
        low, high = LEAST, 1.0
        while high - low > NEAR:
            middle = (low + high) / 2
            low, high = (low, middle) if reaches(bits, middle) else (middle, high)
        return ceil(high * STEPS) / STEPS

    return floor


class TooSmallError(InputError):
    """Nothing of a size can be made; `least`: bytes of the smallest that can be."""

    def __init__(self, request: Request, size: int, least: float):
        self.least = least
        given, beside = f"--max-bytes {size:,}", ""
        if request.fit is not None:
            given, beside = (
                f"--fit {request.fit:,}",
                f", for which --fit {int(request.fit - size + least) + 1:,} is needed",
            )
        head = "" if request.head_bits is None else f", embedding and head in {request.head_bits} bits,"
        super().__init__(
            f"{given}: {size:,} bytes are left for weights, and the smallest that can be made for --target {request.target}{head} "
            f"by {request.method} has about {least:,.0f}{beside}"
        )


def list_choices(request: Request, source: Source, size: int, floor: Floor = lambda bits: LEAST) -> list[Choice]:
    """The finest types that hold all weights, and cuts of finer ones, finest first."""
    found: list[Choice] = []
    smallest: list[float] = []
    slack = count_slack(source)
    for bits in LADDERS.get(request.target, LADDER):
        try:
            outside, blocks = predict(request, source, bits)
        except InputError:  # no type of these bits holds the model's widths
            continue
        smallest.append(outside + min(1.0, floor(bits) + 1 / STEPS) * blocks)
        if outside + blocks <= size:
            finer = list(dict.fromkeys(c.bits for c in found))[-FINER:]
            found = [c for c in found if c.bits in finer] + [Choice(bits, 1.0)]
            break
        if outside + blocks <= size + slack:
            found.append(Choice(bits, 1.0))
        if (keep := (size - outside) / blocks) >= LEAST:
            found.append(Choice(bits, trim(keep)))
    if not smallest:
        raise InputError(
            f"--target {request.target} --head-bits {request.head_bits}: no type holds this model's widths"
        )
    found = mix(thin(found), request, source, size) if found else []
    if reached := [c for c in found if c.keep == 1 or c.keep >= floor(c.bits)]:
        return reached
    raise TooSmallError(request, size, min(smallest))


def count_slack(source: Source) -> int:
    """Bytes that `predict` may say too much, at most: those of all headers' entries."""
    matrices = sum(len(list_rounded(source.shape(i))) for i in range(source.n_blocks))
    return (PARTS + 1) * matrices * (ENTRY + max(map(len, source.sizes())))


def thin(found: list[Choice]) -> list[Choice]:
    """Without plans between two neighbours that keep nearly as much as each other: types that hold a model's widths may differ in
    few of its matrices."""
    cut = [c for c in found if c.keep < 1]
    for before, choice, behind in zip(cut, cut[1:], cut[2:], strict=False):
        if before in found and behind.keep < CLOSE * before.keep:
            found = [c for c in found if c is not choice]
    return found


def list_plans(request: Request, source: Source, size: int, floor: Floor) -> list[Choice]:
    """`list_choices` with embedding and head as they are by default, or with larger ones of the next smaller types where else
    nothing of this size can be reached."""
    refusals = []
    for head in ("", *list_heads(request, source)):
        like = request.model_copy(update={"head_bits": head}) if head else request
        try:
            found = list_choices(like, source, size, floor)
        except InputError as error:
            refusals.append(error)
            continue
        for choice in found:
            choice.head = head
        return found
    raise min(refusals, key=lambda e: e.least if isinstance(e, TooSmallError) else inf)


def list_heads(request: Request, source: Source) -> list[str]:
    """Bits of embedding and head, most first, that are another type than the default; none where the user has chosen."""
    target = request.target
    if request.head_bits is not None or target not in HEADS or refuse_head(target, source):
        return []
    hidden, found = source.shape(0).hidden, dict[str, str]()
    for bits in (*([HEAD] if target == "gguf" else []), *HEADS[target]):
        try:
            kind = choose(bits, target)
            found.setdefault(kind.pick(hidden, "the head").name if kind else bits, bits)
        except InputError:
            continue
    return [b for b in found.values() if not (target == "gguf" and b == HEAD)]


def vary_head(best: Choice, request: Request, source: Source, size: int, floor: Floor) -> list[Choice]:
    """The best plan again with embedding and head in other types: what that leaves goes to the blocks, as types mixed to fill the
    size, or as more weights where some were cut."""
    weights = count_rounded(source)
    found = []
    heads = list_heads(request, source) if best.bits not in ("8", "16") else []
    for head in (h for h in heads if h != best.head):
        outside, blocks = predict(request.model_copy(update={"head_bits": head}), source, best.bits)
        if best.keep < 1 and (keep := min(1.0, (size - outside) / blocks)) >= floor(best.bits):
            found.append(Choice(best.bits, trim(keep), head=head))
        elif best.keep == 1 and source.shape(source.n_blocks - 1).experts and request.target != "gguf":
            found.append(Choice(best.bits, 1.0, head=head))
        elif best.keep == 1 and outside < size:
            found.append(Choice(f"{min(8.0, int(8e3 * (size - outside) / weights) / 1e3):.3f}", 1.0, head=head))
    return found


def count_rounded(source: Source) -> int:
    """Weights of the blocks that rounding rounds."""
    shapes = map(source.shape, range(source.n_blocks))
    return sum(out * n for s in shapes for out, n in map(s.linear, list_rounded(s)))


def mix(found: list[Choice], request: Request, source: Source, size: int) -> list[Choice]:
    """Plans, and those whose types differ: of all weights where the last plan leaves room for finer ones, and of a share
    between the last two plans'."""
    last = found[-1]
    asked = read_asked(settle(request, last), source)
    if asked is None or asked.experts is not None:  # all experts of a packed folder have one type
        return found
    outside, blocks = predict(request, source, last.bits)
    weights = count_rounded(source)
    keeps = [1.0] if last.keep == 1 and last.bits != "8" else []
    if len(found) > 1 and found[-2].bits not in ("16", last.bits):
        keeps.append(trim((found[-2].keep + last.keep) / 2))
    means = {keep: int(8e3 * (size - outside) / weights / keep) / 1e3 for keep in keeps}
    least = 8 * blocks / weights  # of the coarsest types
    return found + [Choice(f"{m:.3f}", k) for k, m in means.items() if m > (1.01 if k == 1 else 1) * least]


def predict(request: Request, source: Source, bits: str) -> tuple[float, float]:
    """Bytes of the written model outside its blocks' linears, and of all these, in so many bits: at least what it is, and
    hardly more."""
    shapes = [source.shape(i) for i in range(source.n_blocks)]
    sizes = {n: count for n, (count, dtype) in source.sizes().items() if dtype.is_floating_point}
    asked = read_asked(settle(request, Choice(bits, 1.0)), source)
    if asked is None:
        rest = sum(sizes.values()) - sum(s.count() for s in shapes)
        itemsize = next(d.itemsize for _, d in source.sizes().values() if d.is_floating_point)
        return itemsize * rest + count_headers(source), float(
            sum(footprint({}, s, itemsize=itemsize).bytes for s in shapes)
        )
    linears = [(role, *shape.linear(role)) for shape in shapes for role in list_rounded(shape)]
    weights = sum(out * n for _, out, n in linears)
    rest = sum(sizes.values()) - weights
    kinds = [asked.pick(role, n, "") for role, _, n in linears]
    blocks = sum(kind.count(out, n) for kind, (_, out, n) in zip(kinds, linears, strict=True))
    if asked.blocks.mean is not None:
        blocks = int(asked.blocks.mean * weights / 8)
    outside = 2.0 * rest
    if asked.head is not None:
        hidden, words = shapes[0].hidden, source.config.get_text_config().vocab_size
        heads = find_heads(source)[: 1 if asked.packed else 2]
        size = asked.head.pick(hidden, "", words).count(words, hidden)
        outside = (2.0 if asked.packed else 4.0) * (rest - len(heads) * hidden * words) + len(heads) * size
    tensors = sum(PARTS + kind.zero for kind in kinds) * (ENTRY + max(map(len, sizes)))
    parts = tensors if asked.packed else len(linears) * SUFFIX
    return outside + count_headers(source) + parts, float(blocks)


def reserve(source: Source, context: int) -> int:
    """Bytes that running the model takes beside its weights: a 16-bit KV cache of `context` tokens, and for one batch of llama.cpp
    the widest activations and one token's logits."""
    shapes = [source.shape(i) for i in range(source.n_blocks)]
    cache = 2 * context * sum(footprint({}, s).cache for s in shapes)
    widest = max(2 * s.intermediate + 4 * s.hidden for s in shapes)
    return cache + 4 * (UBATCH * widest + source.config.get_text_config().vocab_size)
