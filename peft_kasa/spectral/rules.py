"""Which algorithm for which weight: measured on two CPU cores, see docs/decomposition.md."""

from __future__ import annotations

from .algorithms.krylov import block_of
from .threads import cores

TINY = 256  # smaller dimension up to which one eigendecomposition beats everything
TOLERANCE = {"top": 3e-6, "bottom": 1e-5}  # the default gates: the values are right to about their square
SMALL = 768  # and up to which it beats inverse iteration on a rectangular weight
THREADED = 1 << 21  # entries from which a second thread pays


def chain(m: int, n: int, k: int, end: str) -> tuple[str, ...]:
    """The algorithms to try in turn for k triples of an (m, n) weight: the fastest first, the surest last."""
    small = min(m, n)
    if k == small:
        return ("lapack64",) if small <= TINY else ("lapack", "lapack64")
    if small <= TINY or 10 * k > small:
        return "gram", "lapack64"
    if end == "top" and not misfit("krylov", m, n, k, end):
        return "krylov", "gram", "lapack64"
    if m == n:
        return "square", "square64", "lapack64"
    return ("gram", "lapack64") if small <= SMALL else ("rectangular", "gram", "lapack64")


def misfit(algorithm: str, m: int, n: int, k: int, end: str) -> str:
    """Why an algorithm cannot be used here, or an empty string."""
    if algorithm == "krylov" and end != "top":
        return "'krylov' finds the top only"
    if algorithm == "krylov" and k + 5 * block_of(k, min(m, n)) > min(m, n):
        return "'krylov' needs room for some blocks of vectors beyond k"
    if algorithm in ("square", "square64", "rectangular") and end != "bottom":
        return f"{algorithm!r} finds the bottom only"
    if algorithm in ("square", "square64") and m != n:
        return f"{algorithm!r} needs a square weight"
    return ""


def threads(m: int, n: int) -> int:
    """How many threads one decomposition takes: fixed by the size, because LAPACK's bits depend on it."""
    return 1 if m * n <= THREADED else min(2, cores())


def cost(m: int, n: int) -> float:
    """What one decomposition takes, in units that are comparable between shapes."""
    return float(max(m, n)) * min(m, n) ** 2
