"""What the commands of `peft-kasa` do, one a file. Their arguments, and what turns errors into exit codes, stand in
`peft_kasa_cli`: that starts at once, while importing this package takes seconds.
"""

from peft_kasa_cli import main

__all__ = ["main"]
