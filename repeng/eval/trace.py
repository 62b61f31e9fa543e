"""Find the coefficients at which a dial has given costs, with few measurements."""

import math
from collections.abc import Callable, Sequence

from repeng.eval.eval_report import EvalReport

REACHED = 0.25  # tolerance of log cost at which a target counts as found: the curve is interpolated later
TRIES = 3  # largest number of measurements per cost
STEP = 4.0  # largest factor between one coefficient and the next
EDGE_TRIES = 3
EDGE = 0.1  # share of the budget that may stay unspent at the edge


def find_costs(
    cost: Callable[[float], float], targets: Sequence[float], *, start: float, largest: float
) -> dict[float, float]:
    """Measure positive coefficients whose costs are near `targets`; return all measured coefficients with their costs.

    A secant search on the logarithms of cost and coefficient begins at `start`: for a small coefficient c, the KL
    divergence grows as c². Some targets may stay without a near cost: those that even the largest coefficient does not
    reach, and those that the dial jumps over.

    Args:
        cost: function that measures the cost at one coefficient; NaN counts as infinite.
        targets: costs above 0.
        start: the first coefficient.
        largest: the largest coefficient to try.
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
    """Guess the coefficient of a target cost from the known costs; None if even the largest one is too small."""
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
    """Measure some coefficients between the last one inside the budget and the first one outside it.

    Args:
        report: function that returns the report on all measurements so far.
        measure: function that measures one coefficient.
        sign: sign of the arm.
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
