"""`python -m peft_kasa.cli` is `peft-kasa`, seconds slower to begin: the package is imported before any argument is read."""

import sys

from peft_kasa_cli import main

if __name__ == "__main__":
    sys.exit(main())
