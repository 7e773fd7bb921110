"""The one error of the example: something that the user has to know, in a line."""


class ServingError(RuntimeError):
    """Why the example cannot go on, and what to do."""
