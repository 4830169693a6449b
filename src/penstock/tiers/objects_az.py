"""`az://container/prefix?account=...`: Azure Blob Storage, and the Azurite emulator.

    az://container/prefix?account=name
    az://container?account=name&credentials=/etc/penstock/az.ini
    az://container?account=devstoreaccount1&endpoint=http://127.0.0.1:10000/devstoreaccount1&insecure=true

Credentials come from the file that `credentials` names (`[default]` with `account_key` or `sas_key`), else from Azure's
environment variables or the machine's identity.
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
from penstock.tiers.objects_secrets import read_secrets
from penstock.tiers.registry import options_of
from penstock.types import WriteRule

__all__ = ["DEFAULT_WRITE", "AzureOptions", "open_tier"]

DEFAULT_WRITE = WriteRule.SECOND_USE
_SECRETS = ("account_key", "sas_key")


class AzureOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of an `az:` address."""

    account: str = ""
    """The storage account's name; AZURE_STORAGE_ACCOUNT_NAME by default."""
    endpoint: str = ""
    """URL of the account's blob service; Azure's by default."""
    insecure: bool = False
    """Whether an endpoint without TLS may be used."""
    credentials: str = ""
    """A file that only its owner may read."""
    parallel: int = 16
    """Requests at once."""


def open_tier(location: str, options: dict[str, str], name: str) -> Tier:
    """The tier of a container. Asks nothing of it. Raises ConfigError."""
    chosen = options_of(AzureOptions, options, "az")
    import_obstore()
    from obstore.store import AzureStore

    container, prefix = bucket_and_prefix(location, "az")
    settings: dict[str, Any] = {
        "client_options": client_options(chosen.endpoint, chosen.insecure, "az"),
        "retry_config": retries(),
    }
    if chosen.credentials:
        settings.update(read_secrets(chosen.credentials, "az", _SECRETS))
    if chosen.account:
        settings["account_name"] = chosen.account
    if chosen.endpoint:
        settings["endpoint"] = chosen.endpoint
    hint = "the az tier's settings are not accepted: name the account (account=...), check the credentials"
    store = open_store(AzureStore, container, prefix, settings, hint)
    where = f"container {container}" + (f" at {chosen.endpoint}" if chosen.endpoint else "")
    access = "check the credentials and that they allow reading, writing, deleting and listing blobs there"
    judge = Judge(where, True, remedies(access))
    return ObjectTier(name, Place("az", store, judge), check_parallel(chosen.parallel, "az"))
