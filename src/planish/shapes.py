"""Shapes in signatures: `Float[Tensor, "out in"]` is a tensor of floating-point numbers (out, in), `*batch` any leading ones;
`Int` holds whole numbers, `Inexact` real or complex ones, `Shaped` any.

The names are jaxtyping's, which planish does not need to run: nothing evaluates these annotations but the tests, which put
jaxtyping's own in place of the stand-ins below and let beartype check every call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Float as Float
    from jaxtyping import Inexact as Inexact
    from jaxtyping import Int as Int
    from jaxtyping import Shaped as Shaped
else:
    Float = Inexact = Int = Shaped = Any
