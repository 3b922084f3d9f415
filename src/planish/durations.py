"""Times in words."""


def tell(seconds: float) -> str:
    """As exactly as a prediction is worth: 40 s, 12 min, 3.4 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"
