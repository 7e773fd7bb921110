"""Which of a model's adapters act: PEFT passes over unknown names, and lets layers choose for themselves."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from peft.tuners.tuners_utils import BaseTuner

from ..methods.method import require


class Choosing(BaseTuner):
    """The part of a `SpectralModel` that sets and deletes adapters."""

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT.

        Raises:
            ValueError: an unknown name.
        """
        check_known(self, [adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT; where none is active any more, one and the same adapter is in all layers: the next by name.

        PEFT lets each layer take the first that it has.
        """
        before = list(self.active_adapters)
        super().delete_adapter(adapter_name)
        if adapter_name in before:
            left = [name for name in before if name != adapter_name]
            self.set_adapter(left or sorted(self.peft_config)[:1])


def check_known(tuner: Any, adapters: Collection[str] | None) -> None:
    """Raises ValueError for a name that is no adapter's."""
    known = sorted(tuner.peft_config)
    unknown = sorted(set(adapters or ()) - set(known))
    require(not unknown, f"adapter_names have to be of {known}", unknown)
