"""Tell somebody: a JSON document, posted to an address of theirs.

Servers fail, hang and refuse; so each try has a time-out, errors that may pass (no connection, codes 429 and 5xx) are
tried again after growing pauses, and the whole ends after a time that is known before. A redirect is not followed: the
document would go to an address that nobody gave. Addresses often have a secret in their path: no message shows more
than the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

RETRIED = (429, 500, 502, 503, 504)


class WebhookError(Exception):
    """Nobody could be told; the message says why."""


def post(
    url: str,
    document: Mapping[str, Any],
    *,
    timeout: float = 10.0,
    retries: int = 3,
    backoff: float = 1.0,
) -> None:
    """Post a document.

    Parameters
    ----------
    url : str
        ``http://`` or ``https://``.
    document : mapping
        Plain JSON.
    timeout : float, default=10.0
        Seconds that a server may take to connect, and between two signs of life.
    retries : int, default=3
        Tries after the first.
    backoff : float, default=1.0
        Seconds of the second pause; there is none before the first retry, and each later one is twice as long.

    Raises
    ------
    WebhookError
        If no try was answered with a code below 300.
    """
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.exceptions import HTTPError
    from urllib3.util import Retry

    place = where(url)
    retry = Retry(
        total=retries,
        redirect=0,
        backoff_factor=backoff,
        status_forcelist=RETRIED,
        allowed_methods={"POST"},
        # A server may ask for a pause of a day.
        respect_retry_after_header=False,
        raise_on_status=False,
    )
    try:
        with requests.Session() as session:
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=retry))
            # (Of the answer nothing but the code is read.)
            answer = session.post(url, json=document, timeout=timeout, stream=True, allow_redirects=False)
            code = answer.status_code
            answer.close()
    except (requests.RequestException, HTTPError) as error:  # not all of the latter come as the former
        raise WebhookError(f"{place} {_reason(error)} ({retries + 1} tries).") from None
    if code >= 300:
        raise WebhookError(f"{place} answered with the code {code}.")


def where(url: str) -> str:
    """Scheme and host of an address, without what may be secret.

    Raises
    ------
    WebhookError
        If it is no address of the web.
    """
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname:
            port = f":{parts.port}" if parts.port else ""
            return f"{parts.scheme}://{parts.hostname}{port}"
    except ValueError:
        pass
    raise WebhookError(
        "The address of the webhook is none of the form http://host/path or https://host/path."
    )


def _reason(error: Exception) -> str:
    """What went wrong, without the address that requests' own messages show."""
    import requests

    inner = repr(error)
    if isinstance(error, requests.exceptions.SSLError):
        return "has no certificate that is trusted here"
    if isinstance(error, requests.exceptions.Timeout) or "Timeout" in inner:
        return "did not answer in time"
    if isinstance(error, requests.exceptions.ConnectionError):
        return "cannot be reached, or broke off"
    return f"failed with {type(error).__name__}"
