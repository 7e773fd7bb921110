"""The exit codes of `peft-kasa`."""

OK = 0
INPUT = 1  # a file, a name or a value that cannot be used
USAGE = 2  # the command line itself: argparse's own
ENVIRONMENT = 3  # a package is missing, or something here does not work
BUG = 4  # none of these was foreseen
INTERRUPTED = 130  # Ctrl-C
TERMINATED = 143  # SIGTERM


class UsageError(Exception):
    """The command line is wrong, in a way that argparse does not see."""


HELP = """exit codes: 0 done; 1 an input cannot be used; 2 the command line is wrong; 3 a package is missing or
something here does not work; 4 an error nobody foresaw; 130 Ctrl-C; 143 SIGTERM"""
