"""What a config may ask for stacked experts (`target_parameters`)."""

from __future__ import annotations

from typing import Any


def refusal(config: Any) -> tuple[str, object] | None:
    """The rule that a config breaks which names stacked experts, and what was found; None if it breaks none."""
    names = config.target_parameters
    if not names:
        return None
    if not isinstance(names, list | set | tuple) or not all(isinstance(name, str) for name in names):
        return "target_parameters has to be a list of names, such as 'experts.down_proj'", names
    if config.needs:
        rule = (
            f"target_parameters has to be None for {config.name}: {config.needs} are gathered module by module, and "
            "stacked experts are none. Take a method that starts from the weight, such as PiSSA, for the experts"
        )
        return rule, names
    if config.dropout:
        return "dropout has to be 0 with target_parameters: experts' own code multiplies by W", config.dropout
    if config.rank_budget is not None:
        rule = "rank_budget has to be None with target_parameters: the experts of a stack have one rank (rank_pattern)"
        return rule, config.rank_budget
    return None
