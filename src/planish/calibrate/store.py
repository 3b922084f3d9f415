"""Statistics of many blocks, stored for later: in memory up to a limit, beyond it in unnamed files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

from torch import Tensor

from planish.calibrate.activations import Activations, MemoryLimits
from planish.stats import Stats, Tap


class Store(MutableMapping[int, Stats]):
    """Block → its statistics; what is read is not to be changed.

    Shares the memory that `limits` allow what is stored of all blocks with the stream's block inputs. The same bits come
    back from memory and from the file.
    """

    def __init__(self, limits: MemoryLimits):
        self.tensors = Activations(limits.stored)
        self.places: dict[int, tuple[dict[Tap, dict[str, int]], dict[Tap, int], str]] = {}

    def __setitem__(self, i: int, stats: Stats) -> None:
        places: dict[Tap, dict[str, int]] = {}
        for tap, sums in stats.sums.items():
            places[tap] = {}
            for name, tensor in sums.items():
                places[tap][name] = len(self.tensors)
                self.tensors.append(tensor)
        self.places[i] = (places, dict(stats.tokens), stats.origin)

    def __getitem__(self, i: int) -> Stats:
        places, tokens, origin = self.places[i]
        stats = Stats()
        stats.sums = {tap: {name: self.tensors[n] for name, n in sums.items()} for tap, sums in places.items()}
        stats.tokens, stats.origin = dict(tokens), origin
        return stats

    def taps(self, i: int) -> set[Tap]:
        """Which taps of a block are stored; nothing is read."""
        return set(self.places[i][0]) if i in self.places else set()

    def origin(self, i: int) -> str:
        """The pass that what is stored of a block comes from (see `planish.stats.Stats`); nothing is read."""
        return self.places[i][2] if i in self.places else ""

    def __delitem__(self, i: int) -> None:
        del self.places[i]  # what the file holds of it stays until the end

    def __iter__(self) -> Iterator[int]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class Named(Mapping[str, Tensor]):
    """Tensors by name; what is read is not to be changed. The same bits come back from memory and from the file."""

    def __init__(self, limits: MemoryLimits, tensors: Mapping[str, Tensor] | None = None):
        self.places: dict[str, int] = {}
        self.tensors = Activations(limits)
        for name, tensor in (tensors or {}).items():
            self.put(name, tensor)

    def put(self, name: str, tensor: Tensor) -> None:
        self.places[name] = len(self.tensors)
        self.tensors.append(tensor)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.places[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
