"""`peft-kasa doctor`: what is installed, and what works here, tried on tiny layers."""

from __future__ import annotations

import platform
import sys
from argparse import Namespace

from rich.text import Text

from peft_kasa_cli import exits
from peft_kasa_cli.output import Output, table

from .checks import CHECKS, Check
from .versions import versions

COLOURS = {"ok": "green", "absent": "yellow"}


def run(args: Namespace, out: Output) -> int:
    """Shows versions, devices and checks; 3 where something that is needed is missing or broken."""
    found, results = versions(), [(check, *_tried(check, out)) for check in CHECKS]
    broken = [row["package"] for row in found if row["needed"] and row["state"] != "ok"]
    broken += [check.name for check, state, _ in results if check.needed and state == "broken"]
    data = {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": found,
        "checks": [{"check": c.name, "needed": c.needed, "state": state, "what": what} for c, state, what in results],
        "broken": broken,
    }
    packages = [(row["package"], row["version"] or "-", row["required"] or "-", _mark(row["state"])) for row in found]
    out.result(
        data,
        f"Python {data['python']} on {data['platform']}",
        table(["package", "version", "needed", "state"], packages),
        table(["check", "state", "what was found"], [(c.name, _mark(state), what) for c, state, what in results]),
        f"Broken: {', '.join(broken)}" if broken else "All that is needed works here.",
    )
    return exits.ENVIRONMENT if broken else exits.OK


def _tried(check: Check, out: Output) -> tuple[str, str]:
    """ "ok", "absent" or "broken", and what was found."""
    out.note(check.name)
    try:
        return "ok", check.run()
    except ImportError as error:
        return ("broken" if check.needed else "absent"), f"{error}"
    except Exception as error:  # whatever a broken installation raises
        return "broken", f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _mark(state: str) -> Text:
    return Text({"absent": "not installed"}.get(state, state), COLOURS.get(state, "red"))
