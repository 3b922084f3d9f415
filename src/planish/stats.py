"""What is measured while calibration text flows through a block: additive fp64 sums, one per tap.

Every kind is a function from the tapped tensors (tokens, channels) to a dict of sums. Sums add, so batches, processes
and interrupted runs merge by addition, and nothing depends on how the tokens were grouped (up to fp64 rounding; up to that of
`add_gram` where a run is summed in fp32).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from planish.shapes import Float, Shaped
from planish.slices import RUN, SLICED, Digits, Precision, cut_digits

Sums = dict[str, Tensor]
KINDS: dict[str, Callable[..., Sums]] = {}


@dataclass(frozen=True, order=True)
class Tap:
    """Measure `kind` at `site` (and `other`) of a block. Hashable, so that solvers share measurements.

    Sites: "q.in" (input of q, k and v), "o.in", "up.in" (of gate and up), "down.in", "<role>.out",
    "<role>.product" (output less the bias),
    "block.in", "block.out", "attention.raw" / "mlp.raw" (the residual stream that feeds the submodule's norm),
    "attention.add" / "mlp.add" (what the submodule adds to it), "attention.gap" / "mlp.gap" (what it would have to add
    for the sum to be the uncompressed model's); "experts.gates", "experts.norms" (one channel per expert: what its output is
    multiplied by, how long that output is; 0 for those that a token does not reach), "experts.shares" (see
    `planish.calibrate.taps.Seen.watch_shares`), "experts.out" (what all of them give a token together),
    "expert.17.down.gated" (the input of an expert's down times that gate).
    Prefix "dense:" = the same site in the uncompressed model; prefix "grad:" = gradient of the summed sampled NLL there;
    "grad:<role>.back": that at the role's output times its uncompressed weight, what reaches the input through this linear
    alone. `heads` splits channels into heads. `part`: "all" sequences, "fit" / "held" (every eighth is held out), or
    "aside", those that a pass back keeps out of "all".
    """

    site: str
    kind: str
    other: str = ""
    heads: int = 0
    part: str = "all"

    @property
    def sites(self) -> tuple[str, ...]:
        return (self.site, self.other) if self.other else (self.site,)

    @property
    def twin(self) -> Tap | None:
        """The uncompressed model's Gram that this moment of its site is, if the inputs are the uncompressed model's as well;
        of a cross moment with a linear's product, that of its input."""
        if self.kind == "gram" and ":" not in self.site:
            return Tap(f"dense:{self.site}", "gram")
        role = self.other.rpartition(".")[0]
        if self.kind == "cross" and self.site in (f"dense:{self.other}", f"dense:{role}.product"):
            return Tap(f"dense:{self.other}", "gram")
        return None


def kind(function: Callable[..., Sums]) -> Callable[..., Sums]:
    """Register a kind of measurement under the function's name."""
    KINDS[function.__name__] = function
    return function


@kind
def gram(x: Float[Tensor, "tokens in"]) -> Sums:
    """Σ x xᵀ (in, in)."""
    x = x.double()
    return {"sum": x.T @ x}


@kind
def cross(y: Float[Tensor, "tokens out"], x: Float[Tensor, "tokens in"]) -> Sums:
    """Σ y xᵀ (out, in)."""
    return {"sum": y.double().T @ x.double()}


@kind
def rows(x: Float[Tensor, "tokens in"]) -> Sums:
    """x itself (tokens, in), batch behind batch: of a few windows, for what no sum holds."""
    return {"rows": x}


@kind
def head_gram(x: Float[Tensor, "tokens channels"], heads: int) -> Sums:
    """Σ x_h x_hᵀ per head: (heads, d, d)."""
    x = x.double().unflatten(-1, (heads, -1)).transpose(0, 1)
    return {"sum": x.transpose(1, 2) @ x}


@kind
def squares(x: Float[Tensor, "tokens in"]) -> Sums:
    """Σ x² per channel (in,): the Gram's diagonal alone."""
    return {"sum": x.double().square().sum(0)}


@kind
def magnitudes(x: Float[Tensor, "tokens in"]) -> Sums:
    """Σ |x| per channel (in,)."""
    return {"sum": x.double().abs().sum(0)}


@kind
def angle(x: Float[Tensor, "tokens d"], y: Float[Tensor, "tokens d"]) -> Sums:
    """Σ over tokens of the cosine of x and y, and of their angle / π (the cosine clamped to [0, 1])."""
    cosine = torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1)
    return {"cosine": cosine.sum(), "angle": (cosine.clamp(0, 1).arccos() / torch.pi).sum()}


@kind
def moments(x: Float[Tensor, "tokens d"], f: Float[Tensor, "tokens e"]) -> Sums:
    """Everything a linear fit of f on x needs: n, Σx, Σf, Σ x xᵀ, Σ x fᵀ, Σ f²."""
    x, f = x.double(), f.double()
    n = torch.tensor(len(x), dtype=torch.float64)
    return {"n": n, "x": x.sum(0), "f": f.sum(0), "xx": x.T @ x, "xf": x.T @ f, "ff": f.square().sum(0)}


@kind
def calm_moments(x: Float[Tensor, "tokens d"], f: Float[Tensor, "tokens e"]) -> Sums:
    """`moments` without massive activations: tokens in which one channel of x exceeds 1000 times the median one."""
    size = x.abs()
    calm = size.amax(-1) <= 1000 * size.median(-1).values
    return moments(x[calm], f[calm])


@kind
def influence(x: Float[Tensor, "tokens d"], f: Float[Tensor, "tokens d"]) -> Sums:
    """How much adding f changes x: Σ over tokens of 1 − cos(x, x + f) ("rotation") and of |f| / |x| ("magnitude")."""
    x, f = x.double(), f.double()
    rotation = 1 - torch.nn.functional.cosine_similarity(x, x + f, dim=-1)
    size = x.norm(dim=-1).clamp(min=torch.finfo(x.dtype).tiny)
    return {"rotation": rotation.sum(), "magnitude": (f.norm(dim=-1) / size).sum()}


@kind
def weight_gradients(g: Float[Tensor, "*n seq out"], x: Float[Tensor, "*n seq in"]) -> Sums:
    """Σ over sequences of (∂L/∂W)² (out, in), entry by entry: g the gradient at a linear's output, x its input."""
    per_sequence = g.double().mT @ x.double()  # (*n, out, in)
    return {"sum": per_sequence.square().view(-1, *per_sequence.shape[-2:]).sum(0)}


EDGE = 0.125  # of a window, at either end, that `clamped_gram` leaves out
CLAMP = (0.1, 10.0)  # times the mean length of a window's tokens


@kind
def clamped_gram(x: Float[Tensor, "*n seq in"], g: Float[Tensor, "*n seq out"]) -> Sums:
    """Σ w² x xᵀ (in, in), Σ w² |g|² ("energy") and how many tokens these are ("count"), of sequences without their edges.

    w = |g| clamped to `CLAMP` × the mean |g| of the sequence's tokens that are left, over |g|; 0 where g is 0. With x = g, or
    x = Wᵀ g, it is how a gradient's second moment is formed where a few tokens must not decide all of it.
    Reference: KFAC-SVD (arXiv 2610.32878) for the edges and the clamp.
    """
    n = g.shape[-2]
    x, g = (t[..., int(EDGE * n) : n - int(EDGE * n), :].double() for t in (x, g))
    size = g.norm(dim=-1)
    mean = size.mean(-1, keepdim=True)
    wanted = torch.minimum(torch.maximum(size, CLAMP[0] * mean), CLAMP[1] * mean) * (size > 0)
    x = (x * (wanted / size.clamp(min=torch.finfo(size.dtype).tiny))[..., None]).flatten(0, -2)
    return {"sum": x.T @ x, "energy": wanted.square().sum(), "count": wanted.new_tensor(wanted.numel())}


WHOLE = {
    "weight_gradients",
    "clamped_gram",
}  # kinds of whole sequences (n, seq, channels); the others see tokens (n · seq, channels)


class Stats:
    """Sums and token counts behind a set of taps. `run`: what Grams and cross moments of a run of tokens are summed in."""

    def __init__(self, taps: Iterable[Tap] = (), run: Precision = torch.float64):
        self.run = run
        self.sums: dict[Tap, Sums] = {}
        self.origin = ""  # the pass over the uncompressed model that all of it comes from, if it does
        self.tokens: dict[Tap, int] = dict.fromkeys(sorted(set(taps)), 0)

    def update(self, values: dict[str, Tensor], taps: Iterable[Tap] | None = None, whole: bool = True) -> None:
        """Add one batch to `taps` (all known ones by default). `values`: site → (…, channels).

        Without `whole` what lies below the diagonal of Grams is undefined until `complete`.
        """
        for tap in sorted(set(self.tokens if taps is None else taps)):
            tensors = [values[s] if tap.kind in WHOLE else values[s].flatten(0, -2) for s in tap.sites]
            sums = self.sums.setdefault(tap, {})
            if tap.kind in IN_PLACE and not tap.heads:
                IN_PLACE[tap.kind](sums, *tensors, self.run)
            else:
                add(sums, KINDS[tap.kind](*tensors, **({"heads": tap.heads} if tap.heads else {})))
            self.tokens[tap] = self.tokens.get(tap, 0) + tensors[0].shape[:-1].numel()
            if whole:
                self.complete([tap])

    def complete(self, taps: Iterable[Tap]) -> None:
        """Grams of these taps: what lies above the diagonal → below it."""
        for tap in taps:
            if tap.kind == "gram" and not tap.heads and tap in self.sums:
                mirror(self.sums[tap]["sum"])

    def merge(self, other: Stats) -> None:
        """Add the other's sums, which this one takes over: the other is not to be used afterwards."""
        for tap, sums in other.sums.items():
            add(self.sums.setdefault(tap, {}), sums)
            self.tokens[tap] = self.tokens.get(tap, 0) + other.tokens[tap]

    def replace(self, other: Stats) -> None:
        """Take over the other's taps in place of this one's."""
        self.sums |= other.sums
        self.tokens |= other.tokens
        self.origin = self.origin if self.origin == other.origin else ""

    def only(self, taps: Iterable[Tap]) -> Stats:
        """The same sums of these taps, as far as there are any."""
        few = Stats()
        few.sums = {t: self.sums[t] for t in sorted(set(taps)) if t in self.sums}
        few.tokens = {t: self.tokens[t] for t in few.sums}
        few.origin = self.origin
        return few

    def mean(self, tap: Tap, name: str = "sum") -> Float[Tensor, "..."]:
        """A sum divided by its number of tokens."""
        return self.sums[tap][name] / max(self.tokens[tap], 1)

    def take(self, tap: Tap, name: str = "sum") -> tuple[Float[Tensor, "..."], int]:
        """A sum, to be changed by the caller, and its number of tokens: a copy, or where it is wide (`WIDE` bytes) the
        sum itself, which is then gone from here."""
        total = self.sums[tap][name]
        own = self.sums[tap].pop(name) if total.nbytes >= WIDE else total.clone()
        return own, max(self.tokens[tap], 1)

    def state(self) -> dict[str, Tensor]:
        """Tensors to save: names encode the tap."""
        out = {}
        for tap, sums in self.sums.items():
            stem = "|".join([tap.site, tap.kind, tap.other, str(tap.heads), tap.part])
            out[f"{stem}|tokens"] = torch.tensor(self.tokens[tap])
            out |= {f"{stem}|{name}": t.contiguous() for name, t in sums.items()}
        return out

    @classmethod
    def load(cls, state: dict[str, Tensor]) -> Stats:
        stats = cls()
        for key, tensor in state.items():
            site, kind_name, other, heads, part, name = key.split("|")
            tap = Tap(site, kind_name, other, int(heads), part)
            if name == "tokens":
                stats.tokens[tap] = int(tensor)
            else:
                stats.sums.setdefault(tap, {})[name] = tensor
        return stats


def add(into: Sums, more: Sums) -> None:
    """Adds sums up, and puts rows one behind the other."""
    for name, tensor in more.items():
        if name == "rows" and name in into:
            into[name] = torch.cat([into[name], tensor])
        elif name in into:
            into[name] += tensor
        else:
            into[name] = tensor


WIDE = 1 << 30  # bytes of a Gram of which there should not be two in memory
TILE, CHUNK = 512, 1024  # channels (about) and tokens at a time; fixed, because they fix the order of the additions
LEAF = 128  # channels of a square that need not be halved further
COARSE = 2048  # all of these on an accelerator, which few large products fill better


def list_rows(n: int, tile: int) -> Iterator[slice]:
    """Rows of tiles that n channels are added in: equal ones, for a narrow last one would take nearly as long as the others."""
    size = max(1, -(-n // max(1, round(n / tile))))
    for i in range(0, n, size):
        yield slice(i, min(i + size, n))


def add_gram(into: Sums, x: Float[Tensor, "tokens n"], run: Precision = torch.float64) -> None:
    """`gram` added in place, on and above the diagonal only (see `mirror`): half the products, no second Gram.

    `run`: what the products of `CHUNK` tokens are summed in, before these sums are added in fp64. With fp32 an entry is off by less
    than 3e-6 · √(Σ x_i² Σ x_j²), however large some channels are, in half the time. "sliced": by `planish.slices`, an entry off by
    less than 2^−38 · tokens · max |x_i| max |x_j|, without a product in fp64.
    """
    n = x.shape[-1]
    if "sum" not in into:
        into["sum"] = torch.zeros(n, n, dtype=torch.float64, device=x.device)
    total = into["sum"]
    for chunk in list_chunks(x, run):
        numbers = cut_digits(chunk) if run == SLICED else chunk.to(run)
        for rows in list_rows(n, TILE if x.is_cpu else COARSE):
            add_row(total[rows, rows.start :], columns(numbers, rows.start))


def list_chunks(x: Float[Tensor, "tokens n"], run: Precision) -> tuple[Float[Tensor, "_ n"], ...]:
    """Runs of tokens whose products are summed before they are added."""
    return x.split(RUN if run == SLICED else CHUNK if x.is_cpu else COARSE)


def columns(x: Float[Tensor, "tokens n"] | Digits, first: int) -> Float[Tensor, "tokens m"] | Digits:
    """The channels of a run of tokens from `first` on."""
    return x.columns(first) if isinstance(x, Digits) else x[:, first:]


def add_row(row: Float[Tensor, "t m"], x: Float[Tensor, "tokens m"] | Digits) -> None:
    """Add x[:, :t]ᵀ x, x (tokens, m), to a row of tiles (t, m); below the diagonal of its first tile not all of it.

    Products are summed in x's dtype.
    """
    t = len(row)
    if isinstance(x, Digits):
        return x.columns(0, t).add_product(x, row)
    same = x.dtype == row.dtype
    into = row if same else torch.zeros(row.shape, dtype=x.dtype, device=x.device)
    add_square(into[:, :t], x[:, :t])
    if t < row.shape[1]:
        into[:, t:].addmm_(x[:, :t].T, x[:, t:])
    if not same:
        row += into


def add_square(square: Float[Tensor, "n n"], x: Float[Tensor, "tokens n"]) -> None:
    """Add xᵀ x (n, n), but below the diagonal only in squares of `LEAF` channels and less (on an accelerator all of it)."""
    n = len(square)
    if n <= LEAF or not x.is_cpu:
        square.addmm_(x.T, x)
        return
    h = n // 2
    add_square(square[:h, :h], x[:, :h])
    square[:h, h:].addmm_(x[:, :h].T, x[:, h:])
    add_square(square[h:, h:], x[:, h:])


def mirror(total: Float[Tensor, "n n"]) -> None:
    """What lies above the diagonal → below it."""
    n = len(total)
    for i in range(0, n, TILE):
        tile = total[i : i + TILE, i : i + TILE]
        tile.copy_(tile.triu() + tile.triu(1).T)
        total[i + TILE :, i : i + TILE] = total[i : i + TILE, i + TILE :].T


def add_lane(
    total: Float[Tensor, "n n"],
    read: Callable[[int], Tensor],
    count: int,
    exchange: Callable[[Tensor], Iterable[Tensor]],
    run: Precision = torch.float64,
) -> None:
    """Add the Gram of a lane's `count` inputs, `read(k)` (batch, seq, n) on the total's device, to `total`
    (n, n), a row of tiles at a time: it never exists.

    `exchange`: this process's row of tiles → those of all lanes that have been run beside it, in their order. The
    additions are those of `add_gram` and `Stats.merge`, in their order.
    """
    n = len(total)
    for rows in list_rows(n, TILE if total.is_cpu else COARSE):
        i = rows.start
        row = torch.zeros(rows.stop - i, n - i, dtype=torch.float64, device=total.device)
        for k in range(count):
            for chunk in list_chunks(read(k).flatten(0, -2), run):
                add_row(row, cut_digits(chunk[:, i:]) if run == SLICED else chunk[:, i:].to(run))
        for part in exchange(row):
            total[rows, i:] += part
    mirror(total)


def add_cross(
    into: Sums, y: Float[Tensor, "tokens out"], x: Float[Tensor, "tokens in"], run: Precision = torch.float64
) -> None:
    """`cross` added in place; `run` as in `add_gram`."""
    if "sum" not in into:
        into["sum"] = torch.zeros(y.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
    total = into["sum"]
    for a, b in zip(list_chunks(y, run), list_chunks(x, run), strict=True):
        if run == SLICED:
            cut_digits(a).add_product(cut_digits(b), total)
        elif run == total.dtype:
            total.addmm_(a.to(run).T, b.to(run))
        else:
            total += a.to(run).T @ b.to(run)


IN_PLACE: dict[str, Callable[..., None]] = {"gram": add_gram, "cross": add_cross}


def is_finite(t: Shaped[Tensor, "..."]) -> bool:
    """Whether no entry is NaN or infinite, without a copy (extremes propagate NaN)."""
    if not t.is_floating_point() or not t.numel():
        return True
    low, high = torch.aminmax(t)
    return bool(torch.isfinite(low) & torch.isfinite(high))
