"""`python -m peft_kasa.cli` is `peft-kasa`, seconds slower to begin: arguments are read after importing the package."""

import sys

from peft_kasa_cli import main

if __name__ == "__main__":
    sys.exit(main())
