"""A matrix rounded to a storage type, with the second moment of its inputs: to nearest, or with feedback of the errors.

The error E = W − Ŵ (out, in), always of what a reader makes of the stored numbers, costs tr(E R Eᵀ) of the output's energy, R the
second moment of the inputs, and in nats per token ½ tr(G E R Eᵀ), G the second moment of the gradient at the output. The naive
program of feedback, R + λI = V Vᵀ with V upper triangular:

    for j in columns: t = w[:, j] + Σ_{i<j} E[:, i] V[i, j] / V[j, j];  ŵ[:, j] = nearest(t);  E[:, j] = w[:, j] − ŵ[:, j]

since E R Eᵀ's trace is Σ_j V_jj² |t − ŵ|²: every column is rounded to where it undoes most of what the ones before it did. No
inverse of a Gram is taken. V comes from the Cholesky factor of R with rows and columns in reverse. Columns go as they are
stored, groups' scales being found for the targets at the group's beginning in the metric V_jj²; or, integers alone, by falling
energy of their input, with scales found before.

Reference: GPTQ (arXiv 2210.17323), Algorithm 1, in the form of LDLQ (QuIP, arXiv 2307.13304, §3), which is the same; act-order is
of GPTQ's code. Differs from them: relative damping; the better of it and plain rounding is kept, per row where G is unknown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from planish.errors import InputError
from planish.rounding import ggml, integers
from planish.rounding.types import StorageType
from planish.solvers.linalg import root

DAMPING = 0.01
ROWS = 4  # that say whether a matrix lies on a grid
LEAF = 64  # columns whose feedback is summed one by one
GGML = "weight_ggml"  # end of the name of a matrix in blocks of ggml


@dataclass
class Draft:
    """A rounding that is compared with others: what it makes of the matrix, and blocks of ggml or codes (bytes) and their grid.

    Rows stand for themselves: some of one and some of another are a draft again.
    """

    value: Tensor
    blocks: Tensor | None = None
    codes: Tensor | None = None
    grid: integers.Grid | None = None

    def store(self, kind: StorageType) -> dict[str, Tensor]:
        if self.blocks is not None:
            return {GGML: self.blocks}
        assert self.codes is not None and self.grid is not None
        return integers.pack(self.codes, self.grid, kind)


@dataclass
class Rounded:
    """A matrix in a type: `value` (out, in) is what a reader makes of it, `stored` its tensors by the ends of their names.

    `how`: "nearest" or "feedback"; `error`: share of the output's energy that is lost; `exact`: the matrix lay on
    the grid already; `nats`: lost per token, where G is known.
    """

    kind: StorageType
    draft: Draft
    how: str
    error: float
    exact: bool
    nats: float | None = None

    @property
    def value(self) -> Tensor:
        return self.draft.value

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        return self.draft.store(self.kind)

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in self.stored.values())


@dataclass(frozen=True)
class Metric:
    """What an error costs: `moment` R (in, in), `gradient` G (out, out) or its diagonal (out,), each None where not known."""

    moment: Tensor | None = None
    gradient: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """In which costs are computed."""
        known = self.moment if self.moment is not None else self.gradient
        return torch.float64 if known is None else known.dtype

    def narrow(self) -> Metric:
        """In fp32."""
        return Metric(*(None if t is None else t.float() for t in (self.moment, self.gradient)))

    def move(self, m: Tensor) -> Tensor:
        """M R (out, in)."""
        return m if self.moment is None else m @ self.moment

    def energy(self, m: Tensor) -> float:
        """tr(M R Mᵀ)."""
        m = m.to(self.dtype)
        return float((self.move(m) * m).sum().clamp(min=0))

    def cost(self, error: Tensor, moved: Tensor | None = None) -> float:
        """tr(G E R Eᵀ); `moved`: E R, where it is known."""
        error = error.to(self.dtype)
        moved = self.move(error) if moved is None else moved
        if self.gradient is None or self.gradient.ndim == 1:
            rows = (error * moved).sum(1).clamp(min=0)
            return float((rows if self.gradient is None else rows * self.gradient).sum())
        return float(((self.gradient @ error) * moved).sum().clamp(min=0))


def round_matrix(
    w: Tensor,
    kind: StorageType,
    metric: Metric = Metric(),
    *,
    feedback: bool = True,
    damping: float = DAMPING,
    where: str = "a matrix",
    dtype: torch.dtype | None = None,
) -> Rounded:
    """Round w (out, in) to a type, to be read in `dtype`, w's own unless told. Raises InputError where the type cannot hold it.

    Without second moments of the inputs only to nearest; `feedback`: try that too, and keep the better. `where` names the
    matrix in messages.
    """
    dtype = dtype or w.dtype
    if not kind.holds(w.shape[1]):
        raise InputError(
            f"{where}: rows of {w.shape[1]} weights do not divide into the groups of {kind.group} that {kind.name} has"
        )
    if not bool(torch.isfinite(w).all()):
        raise InputError(f"{where} holds NaN or infinity: nothing to round")
    plain = round_integers if kind.kind == "integer" else round_blocks
    drafts, w = [plain(w, kind, metric.moment, dtype)], w.double()
    exact = torch.equal(drafts[0].value.double(), w)
    if feedback and metric.moment is not None and not exact and float(metric.moment.trace()) > 0:
        drafts += round_with_feedback(w, kind, metric.moment, damping, dtype)
    best, lost, share, how = choose(w, drafts, metric)
    if not bool(torch.isfinite(best.value).all()):
        raise InputError(f"{where} in {kind.name} is not finite: the weights reach beyond what it can hold")
    return Rounded(kind, best, how, share, exact, None if metric.gradient is None else lost / 2)


def lies_on(w: Tensor, kind: StorageType, where: str, dtype: torch.dtype) -> bool:
    """Whether a matrix lies on a type's grid already, by its first rows."""
    return round_matrix(w[:ROWS], kind, feedback=False, where=where, dtype=dtype).exact


def choose(w: Tensor, drafts: Sequence[Draft], metric: Metric) -> tuple[Draft, float, float, str]:
    """The first draft, or of every row the one with the least E R Eᵀ, whichever costs less: it, its cost, the share of the
    output's energy that it loses, and its name.

    Without G, or with its diagonal alone, rows cost apart, and nothing made of these drafts costs less.
    """
    whole = metric.energy(w)
    error = w - drafts[0].value
    moved = metric.move(error)
    rows, at = (error * moved).sum(1), torch.zeros(len(w), dtype=torch.long)
    best, lost, left, how = drafts[0], metric.cost(error, moved), rows, "nearest"
    for n, draft in enumerate(drafts[1:], 1):  # of every row the best so far: of all drafts they would take much memory
        other = w - draft.value
        far = metric.move(other)
        own = (other * far).sum(1)
        better = own.nan_to_num(torch.inf) < rows.nan_to_num(torch.inf)
        at, rows = at.masked_fill(better, n), torch.where(better, own, rows)
        torch.where(better[:, None], other, error, out=error)
        torch.where(better[:, None], far, moved, out=moved)
        del other, far
    if len(drafts) > 1 and (mixed := metric.cost(error, moved)) < lost:
        best, lost, left, how = pick_drafts(drafts, at), mixed, rows, "feedback"
    return best, lost, float(left.sum().clamp(min=0)) / whole if whole > 0 else 0.0, how


def pick_rows(matrices: Sequence[Tensor], at: Tensor) -> Tensor:
    """Row i of matrix at[i] (out, …)."""
    found = matrices[0].clone()
    for n, m in enumerate(matrices[1:], 1):
        found[at == n] = m[at == n]
    return found


def pick_drafts(drafts: Sequence[Draft], at: Tensor) -> Draft:
    """Row i of draft at[i]."""

    def pick(parts: Sequence[Tensor | None]) -> Tensor | None:
        return None if parts[0] is None else pick_rows([p for p in parts if p is not None], at)

    grids = [d.grid for d in drafts if d.grid is not None]
    grid = integers.Grid(*(pick_rows(parts, at) for parts in zip(*grids, strict=True))) if grids else None
    value = pick_rows([d.value for d in drafts], at)
    return Draft(value, pick([d.blocks for d in drafts]), pick([d.codes for d in drafts]), grid)


def join_rows(parts: Sequence[Rounded], order: Tensor) -> Rounded:
    """Matrices of one type and width as one: their rows one after the other, those numbered `order` (out,). Nats add up."""
    kind, drafts = parts[0].kind, [p.draft for p in parts]

    def join(tensors: Sequence[Tensor | None]) -> Tensor | None:
        return None if tensors[0] is None else torch.cat([t for t in tensors if t is not None])[order]

    grids = [d.grid for d in drafts if d.grid is not None]
    grid = integers.Grid(*(torch.cat(g)[order] for g in zip(*grids, strict=True))) if grids else None
    value = torch.cat([d.value for d in drafts])[order]
    draft = Draft(value, join([d.blocks for d in drafts]), join([d.codes for d in drafts]), grid)
    how = "feedback" if any(p.how == "feedback" for p in parts) else "nearest"
    nats = None if any(p.nats is None for p in parts) else sum(p.nats or 0.0 for p in parts)
    error = sum(p.error * len(p.value) for p in parts) / len(value)
    return Rounded(kind, draft, how, error, all(p.exact for p in parts), nats)


def read(stored: dict[str, Tensor], kind: StorageType, dtype: torch.dtype = torch.float32) -> Tensor:
    """What stored tensors stand for, (out, in) in `dtype`."""
    if kind.kind == "integer":
        return integers.read(stored, kind, dtype)
    return ggml.dequantise(stored[GGML], kind).to(dtype)


# ------------------------------------------------------------------ to nearest


def draft_integers(codes: Tensor, grid: integers.Grid, kind: StorageType, dtype: torch.dtype) -> Draft:
    groups = codes.unflatten(1, (-1, kind.group))
    value = integers.multiply(groups, grid.zero[..., None], grid.scale[..., None], dtype).flatten(1)
    return Draft(value, codes=codes.to(torch.int8), grid=grid)


def round_integers(w: Tensor, kind: StorageType, moment: Tensor | None, dtype: torch.dtype) -> Draft:
    """To nearest, every group's grid the best in its own block of R."""
    groups = w.float().unflatten(1, (-1, kind.group))
    grid = integers.search(groups, blocks_of(moment, kind, w.shape[1]), kind, dtype, exact=True)
    codes = integers.nearest(groups, grid.zero[..., None], grid.scale[..., None], kind).flatten(1)
    return draft_integers(codes, grid, kind, dtype)


def blocks_of(moment: Tensor | None, kind: StorageType, n: int) -> Tensor:
    """Metrics of the groups of a row: blocks of R on its diagonal (groups, group, group), or ones (groups, group)."""
    if moment is None:
        return torch.ones(n // kind.group, kind.group)
    starts = range(0, n, kind.group)
    return torch.stack([moment[i : i + kind.group, i : i + kind.group] for i in starts])


def draft_blocks(blocks: Tensor, kind: StorageType, dtype: torch.dtype) -> Draft:
    return Draft(ggml.dequantise(blocks, kind).to(dtype), blocks=blocks)


def round_blocks(w: Tensor, kind: StorageType, moment: Tensor | None, dtype: torch.dtype) -> Draft:
    """By llama.cpp, with the mean squares of the inputs as its importance matrix; without where that changes nothing, which its
    own rounding of a matrix on the grid of a simple type does not."""
    plain = draft_blocks(ggml.quantise(w, kind), kind, dtype)
    if moment is None or torch.equal(plain.value.double(), w.double()):
        return plain
    return draft_blocks(ggml.quantise(w, kind, moment.diagonal()), kind, dtype)


# ------------------------------------------------------------------ with feedback


def upper_root(moment: Tensor, damping: float, order: Tensor | None = None) -> Tensor:
    """Upper triangular V (in, in) with V Vᵀ = R + λI, rows and columns of R in this order (in,)."""
    at = torch.arange(len(moment)) if order is None else order
    back = at.flip(0)  # at once: every copy of R is one more of the largest matrices that there are
    return root(moment.double()[back[:, None], back], damping).flip(0, 1)


def round_with_feedback(
    w: Tensor, kind: StorageType, moment: Tensor, damping: float, dtype: torch.dtype
) -> Iterator[Draft]:
    """The roundings that feed errors on: columns as they are stored, and (integers) by falling energy."""
    if kind.kind == "ggml":
        yield feed_blocks(w, kind, upper_root(moment, damping), dtype)
        return
    yield feed_groups(w, kind, upper_root(moment, damping), dtype)
    yield feed_falling(w, kind, moment, damping, dtype)


class Feed:
    """Columns of w (out, in) rounded one after the other, errors going on to those that come. Columns lie in memory as rows."""

    def __init__(self, w: Tensor, root: Tensor):
        self.w, self.root, self.steps = w.double().T.contiguous(), root, root.diagonal()
        self.error, self.shares = torch.zeros_like(self.w), (1 / self.steps).tolist()
        self.first, self.pull = 0, self.w.new_zeros(0)

    def begin(self, at: int, count: int) -> None:
        """The next `count` columns: add up what those before `at` feed to them."""
        self.first, self.pull = at, self.root[:at, at : at + count].T @ self.error[:at]

    def target(self, j: int) -> Tensor:
        """What column j should be, (out,)."""
        near = slice(self.first, j)
        fed = torch.addmv(self.pull[j - self.first], self.error[near].T, self.root[near, j])
        return torch.add(self.w[j], fed, alpha=self.shares[j])

    def aim(self, at: int, count: int) -> Tensor:
        """What the next columns (out, count) should be for errors before them to cost nothing: w + E V[before, part] V[part]⁻¹."""
        part = slice(at, at + count)
        if at == 0:
            return self.w[part].T
        return self.w[part].T + torch.linalg.solve_triangular(
            self.root[part, part], self.pull.T, upper=True, left=False
        )

    def note(self, j: int, value: Tensor) -> None:
        """Column j became `value` (out,)."""
        torch.sub(self.w[j], value, out=self.error[j])

    def put(self, at: int, values: Tensor) -> None:
        """The columns from `at` on became `values` (out, count)."""
        part = slice(at, at + values.shape[1])
        self.error[part] = self.w[part] - values.T


def feed_groups(w: Tensor, kind: StorageType, root: Tensor, dtype: torch.dtype) -> Draft:
    """Group by group, each on the best grid for its targets."""
    feed, codes, grids = Feed(w, root), torch.zeros(w.shape[::-1]), []
    for at in range(0, w.shape[1], kind.group):
        feed.begin(at, kind.group)
        weights = feed.steps[at : at + kind.group].square()[None]
        grid = integers.search(feed.aim(at, kind.group)[:, None], weights, kind, dtype)
        grids.append(grid)
        lines = integers.Lines(grid.scale[:, 0], grid.zero[:, 0], kind, dtype)
        for j in range(at, at + kind.group):
            codes[j], value = lines.round(feed.target(j))
            feed.note(j, value)
    scale, zero = (torch.cat(parts, 1) for parts in zip(*grids, strict=True))
    return draft_integers(codes.T.contiguous(), integers.Grid(scale, zero), kind, dtype)


def feed_falling(w: Tensor, kind: StorageType, moment: Tensor, damping: float, dtype: torch.dtype) -> Draft:
    """Column by column by falling energy of their input, on grids found before."""
    groups = w.unflatten(1, (-1, kind.group))
    fixed = integers.search(groups, blocks_of(moment, kind, w.shape[1]), kind, dtype)
    order = moment.diagonal().argsort(descending=True, stable=True)
    return feed_ordered(w, kind, upper_root(moment, damping, order), fixed, order, dtype)


def feed_ordered(
    w: Tensor, kind: StorageType, root: Tensor, grid: integers.Grid, order: Tensor, dtype: torch.dtype
) -> Draft:
    """Column by column in an order, on fixed grids."""
    feed, codes = Feed(w[:, order], root), torch.zeros(w.shape[::-1])
    lines = [integers.Lines(s, z, kind, dtype) for s, z in zip(grid.scale.T, grid.zero.T, strict=True)]
    groups = (order // kind.group).tolist()
    for at in range(0, w.shape[1], LEAF):
        feed.begin(at, LEAF)
        for j in range(at, min(at + LEAF, w.shape[1])):
            codes[j], value = lines[groups[j]].round(feed.target(j))
            feed.note(j, value)
    back = torch.empty(w.shape)
    back[:, order] = codes.T
    return draft_integers(back, grid, kind, dtype)


def feed_blocks(w: Tensor, kind: StorageType, root: Tensor, dtype: torch.dtype) -> Draft:
    """Block by block: scales by llama.cpp for the block's targets; inside it column by column where codes are known."""
    feed, found = Feed(w, root), []
    for at in range(0, w.shape[1], kind.group):
        feed.begin(at, kind.group)
        weights = feed.steps[at : at + kind.group].square()
        block = ggml.quantise(feed.aim(at, kind.group), kind, weights)
        if kind.name in ggml.FIELDS:
            levels, codes = ggml.Levels(block, kind), torch.zeros(len(w), kind.group, dtype=torch.long)
            for j in range(kind.group):
                codes[:, j], value = levels.pick(feed.target(at + j), j)
                feed.note(at + j, value)
            block = ggml.put_codes(block, kind, codes)
        feed.put(at, ggml.dequantise(block, kind).double())
        found.append(block)
    return draft_blocks(torch.cat(found, 1), kind, dtype)
