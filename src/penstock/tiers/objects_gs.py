"""`gs://bucket/prefix`: Google Cloud Storage.

    gs://bucket/prefix
    gs://bucket/prefix?credentials=/etc/penstock/service-account.json

Credentials come from the service account's JSON file that `credentials` names, else from Google's environment
variables, the application default credentials or the machine's service account. They need storage.objects.get, create,
delete and list.
"""

from __future__ import annotations

from typing import Any

import msgspec

from penstock.tiers.base import Tier
from penstock.tiers.objects import ObjectTier, Place, import_obstore
from penstock.tiers.objects_errors import Judge
from penstock.tiers.objects_options import (
    bucket_and_prefix,
    check_parallel,
    client_options,
    open_store,
    remedies,
    retries,
)
from penstock.tiers.objects_secrets import private_file
from penstock.tiers.registry import options_of
from penstock.types import WriteRule

__all__ = ["DEFAULT_WRITE", "GoogleOptions", "open_tier"]

DEFAULT_WRITE = WriteRule.SECOND_USE


class GoogleOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a `gs:` address."""

    credentials: str = ""
    """A service account's JSON file that only its owner may read."""
    parallel: int = 16
    """Requests at once."""


def open_tier(location: str, options: dict[str, str], name: str) -> Tier:
    """The tier of a bucket. Asks nothing of it. Raises ConfigError."""
    chosen = options_of(GoogleOptions, options, "gs")
    import_obstore()
    from obstore.store import GCSStore

    bucket, prefix = bucket_and_prefix(location, "gs")
    settings: dict[str, Any] = {"client_options": client_options("", False, "gs"), "retry_config": retries()}
    if chosen.credentials:
        settings["service_account"] = str(private_file(chosen.credentials, "gs"))
    hint = "the gs tier's settings are not accepted: check that credentials is a service account's JSON file"
    store = open_store(GCSStore, bucket, prefix, settings, hint)
    access = "check the credentials and that they allow storage.objects.get, create, delete and list there"
    judge = Judge(f"bucket {bucket}", True, remedies(access))
    return ObjectTier(name, Place("gs", store, judge), check_parallel(chosen.parallel, "gs"))
