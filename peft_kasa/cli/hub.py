"""Whether a name is a model of the Hub, asked once: loading asks for many files, and each of them several times."""

from __future__ import annotations

from huggingface_hub import model_info, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

SECONDS = 10.0  # to wait for an answer
MODEL, ADAPTER = "a folder or a .gguf file", "a folder"  # what may be given besides a Hub id


def check_on_hub(name: str, config: str, revision: str | None = None, local: str = MODEL) -> None:
    """Makes sure that a repository of models is there, or its files are here.

    Args:
        name: of the repository.
        config: a file that it has to have.
        revision: of its; None: the main branch.
        local: MODEL or ADAPTER.

    Raises:
        ValueError: there is none of this name, or the Hub cannot be reached.
    """
    if isinstance(try_to_load_from_cache(name, config, revision=revision), str):
        return
    try:
        model_info(name, revision=revision, timeout=SECONDS)
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name} is neither a folder here nor on the Hub. Give {local}, or a Hub id (owner/name; `hf auth "
            "login` for private ones)."
        ) from error
    except HfHubHTTPError:
        return  # an answer: loading says more
    except Exception as error:  # offline, or one of those of the library that the Hub's client connects with
        raise ValueError(
            f"{name} is no folder here, its files are not in the cache, and the Hub cannot be reached. Give {local}, "
            "or connect."
        ) from error
