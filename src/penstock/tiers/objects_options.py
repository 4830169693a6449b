"""What the addresses and clients of all object stores have in common."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from penstock.errors import ConfigError

__all__ = ["bucket_and_prefix", "check_parallel", "client_options", "open_store", "remedies", "retries"]


def bucket_and_prefix(location: str, scheme: str) -> tuple[str, str | None]:
    """`//bucket/a/b` -> (`bucket`, `a/b`). Raises ConfigError without a bucket."""
    bucket, _, prefix = location.removeprefix("//").partition("/")
    if not location.startswith("//") or not bucket:
        raise ConfigError(f"a {scheme} tier's address is {scheme}://bucket or {scheme}://bucket/prefix")
    return bucket, prefix.strip("/") or None


def client_options(endpoint: str, insecure: bool, scheme: str) -> dict[str, Any]:
    """How to speak HTTP; `endpoint` is empty for the provider's own.

    Raises ConfigError for one without TLS that was not allowed.
    """
    if endpoint and not endpoint.startswith(("https://", "http://")):
        raise ConfigError(f"endpoint={endpoint!r} of the {scheme} tier is not an http or https URL")
    plain = endpoint.startswith("http://")
    if plain and not insecure:
        raise ConfigError(f"the {scheme} tier's endpoint has no TLS: use https, or allow it with insecure=true")
    return {
        "allow_http": plain,
        "connect_timeout": "3s",
        # Bounds a request that was left behind at a deadline, so that it gives its thread back.
        "timeout": "30s",
        # Shorter than servers keep idle connections, so that none is used that the other side is closing.
        "pool_idle_timeout": "15s",
    }


def retries() -> dict[str, Any]:
    """One retry, soon: a connection that broke while idle says nothing of the server. The deadline bounds both."""
    soon = timedelta(milliseconds=20)
    return {
        "max_retries": 1,
        "retry_timeout": timedelta(seconds=5),
        "backoff": {"init_backoff": soon, "max_backoff": soon, "base": 2},
    }


def remedies(access: str) -> dict[str, str]:
    """What to do by kind of trouble."""
    return {
        "access": access,
        "bucket": "the bucket does not exist: create it, or correct its name",
        "reach": "check the endpoint, that the server runs, and that its certificate is trusted (SSL_CERT_FILE)",
        "request": "check the bucket's name, region and endpoint",
    }


def open_store(store: Any, bucket: str, prefix: str | None, settings: dict[str, Any], hint: str) -> Any:
    """obstore's client, of the class `store`. Raises ConfigError with the hint; the library's own text may quote a file
    of secrets, so it is not handed on."""
    import obstore

    try:
        return store(bucket, prefix=prefix, **settings)
    except (obstore.exceptions.BaseError, OSError, TypeError, ValueError):
        raise ConfigError(hint) from None


def check_parallel(wanted: int, scheme: str) -> int:
    """How many requests may run at once. Raises ConfigError."""
    if not 1 <= wanted <= 256:
        raise ConfigError(f"parallel={wanted} of the {scheme} tier: 1 to 256 requests at once")
    return wanted
