"""Finding the coefficients at which a dial has given costs, from few measurements."""

import math
from collections.abc import Callable, Sequence

from repeng.eval.eval_report import EvalReport

REACHED = 0.25  # a cost is found when a measured one is within this share of it: the curve is read in between
TRIES = 3  # measurements for each cost
STEP = 4.0  # the most by which a coefficient grows at a time
EDGE_TRIES = 3
EDGE = 0.1  # share of the budget that may be left over


def find_costs(
    cost: Callable[[float], float], targets: Sequence[float], *, start: float, largest: float
) -> dict[float, float]:
    """Coefficients, all positive, whose costs are near to `targets`, with their costs.

    A secant on the logarithms of cost and coefficient, from `start`: for a small coefficient c the KL divergence grows
    as c². A cost that the largest coefficient does not reach is left out, and so is one that the dial jumps over.

    Args:
        cost: measures one coefficient; NaN counts as infinite.
        targets: costs above 0.
        start: the first coefficient.
        largest: no larger coefficient is tried.
    """
    known: dict[float, float] = {}

    def measure(c: float) -> float:
        value = cost(c)
        known[c] = math.inf if math.isnan(value) else value
        return known[c]

    measure(min(start, largest))
    for target in sorted(targets):
        for _ in range(TRIES):
            if any(abs(math.log(value / target)) < REACHED for value in known.values() if 0 < value < math.inf):
                break
            c = _guess(known, target, largest)
            if c is None or any(math.isclose(c, other, rel_tol=1e-3) for other in known):
                break
            measure(c)
    return known


def _guess(known: dict[float, float], target: float, largest: float) -> float | None:
    """Where the target should be, from what is known; None where it cannot be."""
    below = [c for c, value in known.items() if value < target]
    above = [c for c, value in known.items() if value >= target and all(c > other for other in below)]
    low, high = max(below, default=None), min(above, default=None)
    if low == largest:
        return None
    if low is not None and high is not None and known[low] > 0 and known[high] < math.inf:
        share = math.log(target / known[low]) / math.log(known[high] / known[low])
        return low * (high / low) ** min(max(share, 0.1), 0.9)
    usable = sorted(
        (c for c, value in known.items() if 0 < value < math.inf), key=lambda c: abs(math.log(known[c] / target))
    )
    if not usable:
        guess = largest if low is not None and high is None else (high or largest) / STEP
    else:
        first = usable[0]
        slope = 2.0
        if len(usable) > 1 and usable[1] != first:
            slope = math.log(known[usable[1]] / known[first]) / math.log(usable[1] / first)
            slope = min(max(slope, 0.5), 6.0)
        guess = first * (target / known[first]) ** (1 / slope)
    if low is not None and high is not None and not low < guess < high:
        guess = math.sqrt(low * high)
    if high is None and low is not None:
        guess = min(guess, STEP * low)
    if low is None and high is not None:
        guess = max(min(guess, 0.9 * high), high / STEP**2)
    return min(guess, largest)


def find_edge(report: Callable[[], EvalReport], measure: Callable[[float], object], sign: int) -> None:
    """Measure some coefficients between the last one inside the budget and the first one outside.

    Args:
        report: of what has been measured so far.
        measure: measures one coefficient.
        sign: of the arm.
    """
    for _ in range(EDGE_TRIES):
        now = report()
        spent = now.spent()
        sizes = sorted((abs(c), spent[now.at(c)].item()) for c in now.coefficients if c * sign >= 0)
        outside = next((index for index, (_, share) in enumerate(sizes) if share > 1), None)
        if not outside:
            return
        (low, inside), (high, beyond) = sizes[outside - 1], sizes[outside]
        if 1 - inside < EDGE or high - low < 0.02 * high:
            return
        share = min(max((1 - inside) / (beyond - inside), 0.1), 0.9) if math.isfinite(beyond) else 0.5
        measure(sign * (low + share * 0.97 * (high - low)))
