"""KaSA: knowledge-aware singular-value adaptation (arXiv:2412.06071)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..spectral import LowRank
from .method import SpectralConfig, require
from .orthogonality import from_orthonormal
from .site import Site, Start


@dataclass(repr=False)
class KaSAConfig(SpectralConfig):
    """W loses its smallest singular triples and gains `s left diag(core) right`, all three learnt (arXiv:2412.06071;
    regularisers: eq. 9-12).

    y = (W - U_t S_t V_t^T) x + s L diag(d) R x, with L = 0, d ~ N(0, 1) and R ~ Kaiming uniform at the start:
    r (m + n + 1) parameters a module. Exported as LoRA it has rank r + t. The start is *not* the base model: the t
    smallest triples are gone from step 0. The base weight itself stays whole (PEFT's KaSA rewrites it), also in 4-bit.

    Args:
        alpha: None is 2r, so s = 2, as in all the paper's runs.
        truncation: t, how many triples leave, 0 <= t < min(m, n). None is r, as in the paper.
        reference_truncation: count as the reference code does: it keeps the n - t largest, so nothing leaves a module
            with m <= n - t (LLaMA's down_proj, grouped k_proj and v_proj). Off: t leave everywhere, as the paper says.
        beta: weight of `|d|^2` (eq. 9-10). Default 1e-4, in most of the reference GLUE scripts.
        gamma: weight of the orthogonality of L and R (eq. 11). Default 1e-3, likewise.
        form: "reference" is `|R^T R - I_n|_F + |L L^T - I_m|_F`, which the reference code trains with and for which
            its beta and gamma were chosen; "paper" is `|L^T L - I_r|_F + |R R^T - I_r|_F`, as eq. 11 has it (and PEFT):
            its gradient at the start is about 15 times larger. The norms are not squared in either.
        reduction: "mean" over modules, as the reference code; PEFT's helper sums.

    Raises:
        ValueError: for a negative weight, or a truncation that leaves nothing of a module, which it names.

    Examples:
        >>> from peft_kasa import KaSAConfig
        >>> KaSAConfig(r=16, truncation=8, target_modules=["q_proj", "v_proj"], form="paper").scale(16, None)
        2.0
    """

    name = "kasa"
    paper = "2412.06071"
    source = "nothing, and W's smallest triples leave"
    default_scale = 2.0

    truncation: int | None = None
    reference_truncation: bool = False
    beta: float = 1e-4
    gamma: float = 1e-3
    form: Literal["reference", "paper"] = "reference"

    def start(self, site: Site) -> Start:
        m, n = site.weight.shape
        trained = LowRank(site.zeros(m, site.rank), site.normal(site.rank), site.kaiming_uniform(site.rank, n))
        count = self.leaving(m, n, site.rank)
        cut = site.svd(count, "bottom").split() if count else None
        return Start(trained, ("left", "core", "right"), cut)

    def caution(self, m: int, n: int, rank: int) -> str:
        count = self.leaving(m, n, rank)
        if self.truncation is not None or self.reference_truncation or m >= n:
            return ""
        return (
            f"KaSA takes {count} triples out of weights with fewer rows than columns too (v_proj of grouped-query "
            "models), which can raise the loss at the start several times over. reference_truncation=True leaves those "
            f"weights whole, truncation=0 leaves all; truncation={count} keeps the paper's cut, without this warning."
        )

    def penalty(self, trained: LowRank) -> Tensor:
        (m, r), n = trained.left.shape, trained.right.shape[1]
        full = self.form == "reference"
        left = from_orthonormal(trained.left.T @ trained.left, m - r if full else 0)
        right = from_orthonormal(trained.right @ trained.right.T, n - r if full else 0)
        return self.beta * trained.core.square().sum() + self.gamma * (left + right)

    def leaving(self, m: int, n: int, rank: int) -> int:
        """t: how many triples leave a weight (m, n) of this rank."""
        count = rank if self.truncation is None else self.truncation
        if self.reference_truncation:
            count = max(min(m, n) - max(n - count, 0), 0)
        require(
            count < min(m, n),
            f"truncation has to leave something of min(m, n) = {min(m, n)} triples (set it, or r)",
            count,
        )
        return count

    def _check(self) -> None:
        super()._check()
        whole = self.truncation is None or (type(self.truncation) is int and self.truncation >= 0)
        require(whole, "truncation has to be a whole number of at least 0", self.truncation)
        require(self.beta >= 0 and self.gamma >= 0, "beta and gamma have to be at least 0", (self.beta, self.gamma))
        require(self.form in ("reference", "paper"), "form has to be 'reference' or 'paper'", self.form)
