"""Running a model for its base alone, and leaving it as it was."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..adapter.base.base_weight import BaseWeight

logger = logging.getLogger(__name__)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, adapters off, no parameter that asks for gradients; all as it was afterwards.

    4-bit layers alone are in training mode: in evaluation, bitsandbytes repacks them on some CPUs, which rounds their
    weights and products and stops gradients.

    Raises:
        ValueError: an adapter is merged into the base.
    """
    modules = list(model.modules())
    switched: list[Any] = [m for m in modules if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    if merged := {name for module in switched for name in module.merged_adapters}:
        raise ValueError(f"The base has to be as it was loaded. Found {sorted(merged)} merged into it: unmerge first.")
    training = [(module, module.training) for module in modules]
    disabled = [(module, module._disable_adapters) for module in switched]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    quantised = [module for module in modules if hasattr(getattr(module, "weight", None), "quant_state")]
    try:
        model.eval()
        for module in quantised:
            BaseWeight(module).unpack()
            module.training = True
        for module in switched:
            module._disable_adapters = True
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, was in training:
            module.training = was
        for module, was in disabled:
            module._disable_adapters = was
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits until it is asked for; a second one does not wait. Yields whether one has come.

    It is raised at the end in any case. In threads other than the main one, and where the program has a handler of its
    own that is not Python's, Ctrl-C acts as ever.
    """
    before = signal.getsignal(signal.SIGINT)
    come = False

    def handle(number: int, frame: Any) -> None:
        nonlocal come
        if come:
            raise KeyboardInterrupt
        come = True
        logger.warning("stopping after this batch; interrupt again to stop at once")

    try:
        if before is not signal.default_int_handler:
            raise ValueError
        signal.signal(signal.SIGINT, handle)
    except ValueError:
        yield lambda: False
        return
    try:
        yield lambda: come
    finally:
        signal.signal(signal.SIGINT, before)
    if come:
        raise KeyboardInterrupt
