"""The front of the `peft-kasa` command: arguments, errors and output. It imports no torch, so that help comes at once.

What a command does stands in `peft_kasa.cli`, which is imported when the command runs: importing `peft_kasa` alone
takes seconds.
"""

from .main import main

__all__ = ["main"]
