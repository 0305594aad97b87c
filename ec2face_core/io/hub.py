"""A hub that does not answer is named in seconds; downloaded copies are used without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = 8.0  # seconds

REMEDY = (
    "Try again later, or name a mirror by HF_ENDPOINT. Without a network: download the repository "
    "elsewhere (`hf download {repo} --local-dir FOLDER`) and name that folder in the setting."
)


class HubError(FileNotFoundError):
    """The hub does not answer, and there is no downloaded copy; the message names the remedy."""


@contextmanager
def answering_hub(repo: str, file: str = "") -> Iterator[None]:
    """Within this context, a hub that does not answer is not asked again and again.

    The libraries wait ten seconds and retry for every file of a repository, which takes minutes.
    Here the hub is asked once. If it does not answer and `file` was downloaded before, the
    libraries work offline in the context. What the hub answers is left to them.

    Args:
        repo: `owner/model`.
        file: a file of the repository; "": no copy counts.

    Raises:
        HubError: no answer and no copy.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    offline = constants.HF_HUB_OFFLINE
    if not offline and not _answers(repo):
        if not file or not isinstance(try_to_load_from_cache(repo, file), str):
            raise HubError(
                f"{constants.ENDPOINT} does not answer within {PATIENCE:.0f} s, and {repo} was not "
                f"downloaded before. {REMEDY.format(repo=repo)}"
            )
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _answers(repo: str) -> bool:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().model_info(repo, timeout=PATIENCE)
    except (HfHubHTTPError, ValueError):  # gated, unknown, or no name at all: others say so
        return True
    except Exception:  # of the HTTP library, which changes with the hub's version
        return False
    return True
