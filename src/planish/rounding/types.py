"""Types that a matrix of weights can be stored in, as data: bits, groups, bytes, and which target holds which.

| kind | what is stored | a width must be divisible by |
|---|---|---|
| integer: `int4-64`, `int3-64-asym`, … | 2, 3, 4 or 8 bits; per group a 16-bit scale and (`-asym`) a zero point | the group |
| ggml: `q8_0`, `q4_K`, `iq3_s`, … | blocks of llama.cpp | the block: 32, or 256 of K- and i-quants |

Integers are what compressed-tensors packs (transformers, vLLM), blocks of ggml what GGUF files hold. Widths are widths of the
input, along which weights share a scale.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import gcd

from planish.errors import InputError

WORD = 32  # bits that integers are packed into
SCALE = 2  # bytes of an integer group's scale
HEADER = 16  # bytes that say the shape of a packed matrix
DENSE = 16  # --bits that round nothing
DENSE_NAMES = (str(DENSE), "f16", "bf16")
GROUP = 64  # of integers, unless a type's name says another
LEAST = 8  # of a group that is chosen to divide a width
MEAN = re.compile(r"\d+(\.\d+)?$")
INTEGER = re.compile(r"int([2348])(?:-(\d+))?(-asym)?$")


@dataclass(frozen=True)
class StorageType:
    """`bits` of a code; `group`: weights of a row that share a scale; `size`: bytes of a group's codes and scales.

    `zero`: an integer's group has a zero point (`size` counts it). `kind`: "integer" or "ggml".
    """

    name: str
    bits: int
    group: int
    size: float
    kind: str = "ggml"
    zero: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Of a large matrix, scales included."""
        return 8 * self.size / self.group

    def holds(self, n: int) -> bool:
        """Whether rows of n weights can be stored."""
        return n > 0 and n % self.group == 0

    def count(self, out: int, n: int) -> int:
        """Bytes of a matrix (out, in) in its file: codes, scales, zero points, shape; a last group that is not full counts as
        one."""
        groups = -(-n // self.group)
        if self.kind == "ggml":
            return out * groups * int(self.size)
        words = out * -(-n * self.bits // WORD) + self.zero * groups * -(-out * self.bits // WORD)
        return words * WORD // 8 + out * groups * SCALE + HEADER


def integer(bits: int, group: int = GROUP, zero: bool = False) -> StorageType:
    """Codes of so many bits in groups of so many weights of a row."""
    size = (group * bits + 8 * SCALE + bits * zero) / 8
    return StorageType(f"int{bits}-{group}{'-asym' * zero}", bits, group, size, "integer", zero)


INTEGERS = {t.name: t for b in (8, 4, 3, 2) for g in (32, 64, 128) for z in (False, True) for t in [integer(b, g, z)]}
GGML = {
    name: StorageType(name, bits, group, size)
    for name, bits, group, size in (
        ("q8_0", 8, 32, 34), ("q6_K", 6, 256, 210), ("q5_K", 5, 256, 176), ("q5_0", 5, 32, 22), ("q4_1", 4, 32, 20),
        ("q4_K", 4, 256, 144), ("q4_0", 4, 32, 18), ("iq4_nl", 4, 32, 18), ("iq4_xs", 4, 256, 136), ("q3_K", 3, 256, 110),
        ("iq3_s", 3, 256, 110), ("iq3_xxs", 3, 256, 98), ("q2_K", 2, 256, 84), ("iq2_s", 2, 256, 82), ("iq2_xs", 2, 256, 74),
    )
}  # fmt: skip
TYPES: dict[str, StorageType] = {**INTEGERS, **GGML}
HELD = {  # target → kinds that its files hold; groups of integers that it multiplies
    "any": "integer", "hf": "integer", "vllm": "integer", "gguf": "ggml",
}  # fmt: skip
VLLM: dict[str, tuple[int, ...]] = {"bits": (8, 4), "groups": (32, 64, 128)}  # its kernels for integer weights
STEPS = {  # --bits → types of ggml, the first whose blocks divide the width; the last are of a step more
    8: ("q8_0",), 6: ("q6_K", "q8_0"), 5: ("q5_K", "q5_0"), 4: ("q4_K", "iq4_nl"), 3: ("q3_K", "iq4_nl"), 2: ("q2_K", "iq4_nl"),
}  # fmt: skip


def find_type(name: str) -> StorageType:
    """The type of this name; `int4` is `int4-64`, and an integer's group may be any number of weights."""
    if name in TYPES:
        return TYPES[name]
    lower = {n.lower(): t for n, t in TYPES.items()}
    if name.lower() in lower:
        return lower[name.lower()]
    if (found := INTEGER.match(name)) and int(found[2] or GROUP) > 0:
        return integer(int(found[1]), int(found[2] or GROUP), bool(found[3]))
    raise InputError(
        f"unknown type {name!r}; expected int8, int4, int3 or int2 (as they are, or like int4-128-asym), or one of "
        f"{', '.join(GGML)}"
    )


def list_bits(target: str) -> tuple[int, ...]:
    """Numbers of bits that a target has types of, most first."""
    return tuple(STEPS) if HELD[target] == "ggml" else VLLM["bits"] if target == "vllm" else (8, 4, 3, 2)


@dataclass(frozen=True)
class Choice:
    """What `--bits` asks for: a number of `bits`, for which every width gets a type that holds it, or one `type`; for a target.

    `mean`: bits per weight that all matrices together may have, each a type of its own; `bits` is the next number below.
    """

    bits: int
    type: StorageType | None
    target: str
    mean: float | None = None

    @property
    def name(self) -> str:
        return self.type.name if self.type else f"{self.mean or self.bits:g}"

    def ladder(self, n: int, where: str, out: int = WORD) -> list[StorageType]:
        """The types that a matrix of `out` rows of n weights may have, smallest first."""
        held = {Choice(b, None, self.target).pick(n, where, out) for b in list_bits(self.target)}
        return sorted(held, key=lambda t: t.count(out, n))

    def pick(self, n: int, where: str, out: int = WORD) -> StorageType:
        """The type of a matrix of `out` rows of n weights. Raises InputError where none holds them."""
        if self.type is not None:
            if self.type.holds(n):
                return self.type
            raise InputError(
                f"{where}: its rows of {n} weights do not divide into the groups of {self.type.group} that {self.type.name} "
                f"has; ask for --bits {self.bits}, which takes another type there, or another type"
            )
        if self.target == "gguf":
            held = [GGML[name] for name in STEPS[self.bits] if GGML[name].holds(n)]
            if held:
                return held[0]
            raise InputError(f"{where}: no type of llama.cpp holds rows of {n} weights, which are no multiple of 32")
        groups = [g for g in (VLLM["groups"] if self.target == "vllm" else range(LEAST, GROUP + 1)) if n % g == 0]
        if groups:
            best = max((g for g in groups if g <= GROUP), default=groups[0])
            return integer(
                self.bits, best, zero=out * self.bits > WORD
            )  # the library does not read zeros of a single word
        raise InputError(
            f"{where}: rows of {n} weights do not divide into groups for --target {self.target}; cut to other widths with "
            "--round-to 32"
        )

    def pick_experts(self, n: int, where: str) -> StorageType | None:
        """The one integer type of all experts' linears, whose widths are multiples of n: transformers reads no others, and none
        with zero points. None where each has its own, in llama.cpp's types."""
        if self.target == "gguf":
            return None
        if self.mean is not None or (self.type is not None and self.type.zero):
            raise InputError(
                f"{where}: transformers reads packed experts of one type without zero points, not --bits {self.name}; ask for "
                f"--bits {self.bits} or int{self.bits}-{GROUP}"
            )
        return integer(self.bits, self.pick(n, where).group)

    def step(self, n: int) -> int:
        """What the width of a linear with rows of n weights is to be a multiple of once it is cut."""
        if self.type is not None:
            return self.type.group
        if self.target == "gguf":
            groups = [GGML[name].group for name in STEPS[self.bits] if GGML[name].holds(n)]
            return next((g for g in groups if g < n), 32)  # in one group of n weights there would be nothing to cut
        return VLLM["groups"][0] if self.target == "vllm" else LEAST


def choose(asked: str | int, target: str, option: str = "--bits") -> Choice | None:
    """What `--bits` or another `option`, which has no means, asks for, or None where it rounds nothing (16). Raises InputError
    where the target cannot hold it."""
    text = str(asked).strip()
    if text in DENSE_NAMES:
        return None
    kind = HELD.get(target)
    if kind is None:
        raise InputError(f"--target {target} has no rounded weights: leave --bits out, or choose {', '.join(HELD)}")
    if MEAN.match(text):
        known, whole = list_bits(target), float(text) == int(float(text)) and "." not in text
        below = [b for b in known if b <= float(text)]
        mean = f", a mean like {known[-1]}.5" if option == "--bits" else ""
        if (int(text) not in known if whole else not mean) or not below or float(text) > DENSE:
            raise InputError(
                f"{option} {text} --target {target}: expected {DENSE}, {', '.join(map(str, known))}{mean} or a type's name"
            )
        return Choice(below[0], None, target, None if whole else float(text))
    found = find_type(text)
    if found.kind != kind:
        other = "gguf" if found.kind == "ggml" else "any, hf or vllm"
        raise InputError(f"--target {target} cannot hold {found.name}: ask for it with --target {other}")
    if target == "vllm" and not (found.bits in VLLM["bits"] and found.group in VLLM["groups"]):
        raise InputError(f"--target vllm cannot multiply {found.name}: it has int8 and int4 in groups of 32, 64 or 128")
    return Choice(found.bits, found, target)


def head_step(heads: int, step: int) -> int:
    """Dimensions per head are to be a multiple of it so that all heads together are one of `step`."""
    return step // gcd(heads, step)
