"""Statistics of accuracies."""

import math

__all__ = ["wilson"]


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % score interval for successes out of n (Wilson 1927); (0, 1) when n = 0.

    Unlike the normal interval it is right at 0 and at 1, where robust accuracies often are.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in 0 .. n, got {successes} of {n}")
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
