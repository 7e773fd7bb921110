"""`python -m peft_kasa_cli` is `peft-kasa`."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
