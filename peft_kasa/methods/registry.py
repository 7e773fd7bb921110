"""Which config class each name of a method stands for."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .method import SpectralConfig

_METHODS: dict[str, type[SpectralConfig]] = {}


def methods() -> dict[str, type[SpectralConfig]]:
    """The config class of each method, by the `method` field that its adapter_config.json carries."""
    return dict(_METHODS)


def register(config: type[SpectralConfig]) -> None:
    """Makes a config class the one of its `name`. Of classes outside of this package, the last of a name wins.

    Raises:
        TypeError: the name is one of this package's.
    """
    known = _METHODS.get(config.name)
    shipped = known is not None and known.__module__.startswith(f"{__package__}.")
    if known and shipped and _place(known) != _place(config):  # the same place: its module is loaded again
        raise TypeError(
            f"{config.__qualname__}: name has to be none of this package's methods. Found {config.name!r}, which is "
            f"{known.__name__}'s: give it a name of your own, or leave it out to be read back as a {known.__name__}."
        )
    _METHODS[config.name] = config


def warn_of_reader(config: SpectralConfig) -> None:
    """Warns where a file is read back by a class that computes the update in another way: the name's, not its own."""
    own, reader = type(config), _METHODS[config.name]
    differing = [name for name in ("core", "scale", "default_scale") if getattr(own, name) != getattr(reader, name)]
    if differing and not own.__dict__.get("name"):
        warnings.warn(
            f"{own.__qualname__}: adapter_config.json names the method {config.name!r}, so the adapter will be read "
            f"back as a {reader.__name__}, whose {', '.join(differing)} is another: its outputs will differ. Give "
            f"{own.__name__} a `name` of its own.",
            stacklevel=2,
        )


def _place(config: type[SpectralConfig]) -> tuple[str, str]:
    return config.__module__, config.__qualname__
