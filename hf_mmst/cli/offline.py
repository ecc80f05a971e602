"""Whether the Hugging Face Hub can be reached, and a box on stderr that says what is used in its place."""

import os
import socket
import sys
from urllib.parse import urlsplit


def hub_is_reachable(seconds: float = 3.0) -> bool:
    """Whether a connection to the Hub (`HF_ENDPOINT`) can be opened; `HF_HUB_OFFLINE=1` says no at once."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    proxy = os.environ.get("https_proxy") or os.environ.get("HTTPS_PROXY")
    url = urlsplit(proxy or constants.ENDPOINT)
    try:
        with socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), seconds):
            return True
    except OSError:
        return False


def announce_fallback(missing: str, instead: str, remedy: str) -> None:
    """Print to stderr, in a box, what could not be had, what is used instead, and how to name what is wanted."""
    lines = [
        "THE HUGGING FACE HUB CANNOT BE REACHED",
        f"Wanted:  {missing}",
        f"Instead: {instead}",
        f"To choose: {remedy}",
    ]
    width = max(map(len, lines))
    box = ["!" * (width + 4), *(f"! {line:<{width}} !" for line in lines), "!" * (width + 4)]
    print("\n" + "\n".join(box) + "\n", file=sys.stderr, flush=True)
