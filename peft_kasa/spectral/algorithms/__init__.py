"""The ways to compute a cut of a spectrum, each with its cost, error and source."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .gram import gram
from .krylov import krylov
from .lapack import lapack
from .operator import Operator
from .rectangular import rectangular
from .square import square
from .triples import Triples, error, triples

__all__ = ["ALGORITHMS", "Operator", "Triples", "error"]

Algorithm = Callable[[Operator, int, str, float, torch.Generator], Triples]

# By name: operator, k, end, tolerance, generator -> triples.
ALGORITHMS: dict[str, Algorithm] = {
    "gram": lambda op, k, end, tol, rng: triples(op, gram(op, k, end, tol)),
    "krylov": lambda op, k, end, tol, rng: triples(op, krylov(op, k, tol, rng)),
    "square": lambda op, k, end, tol, rng: triples(op, square(op, k, tol, rng, torch.float32)),
    "square64": lambda op, k, end, tol, rng: triples(op, square(op, k, tol, rng, torch.float64)),
    "rectangular": lambda op, k, end, tol, rng: triples(op, rectangular(op, k, tol, rng)),
    "lapack": lambda op, k, end, tol, rng: lapack(op, k, end, torch.float32),
    "lapack64": lambda op, k, end, tol, rng: lapack(op, k, end, torch.float64),
}
