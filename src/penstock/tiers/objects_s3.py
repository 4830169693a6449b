"""`s3://bucket/prefix`: Amazon S3, and stores that speak its protocol (MinIO, Ceph, SeaweedFS, R2).

    s3://bucket/prefix?region=eu-central-1
    s3://bucket/prefix?endpoint=https://minio.internal:9000
    s3://bucket?endpoint=http://127.0.0.1:9000&insecure=true&credentials=/etc/penstock/s3.ini

Credentials come from the file that `credentials` names (`[default]` with `aws_access_key_id`, `aws_secret_access_key`
and, if need be, `aws_session_token`), else from AWS's environment variables or the machine's role. They need
s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket: without the last one S3 answers 403 for an object that
is not there, and an absent block cannot be told from one that may not be read.
"""

from __future__ import annotations

import os
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

__all__ = ["DEFAULT_WRITE", "S3Options", "open_tier"]

DEFAULT_WRITE = WriteRule.SECOND_USE
_SECRETS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")


class S3Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of an `s3:` address."""

    endpoint: str = ""
    """URL of the server; Amazon's by default."""
    region: str = ""
    insecure: bool = False
    """Whether an endpoint without TLS may be used."""
    credentials: str = ""
    """A file that only its owner may read."""
    parallel: int = 16
    """Requests at once."""


def open_tier(location: str, options: dict[str, str], name: str) -> Tier:
    """The tier of a bucket. Asks nothing of it. Raises ConfigError."""
    chosen = options_of(S3Options, options, "s3")
    import_obstore()
    from obstore.store import S3Store

    bucket, prefix = bucket_and_prefix(location, "s3")
    secrets = read_secrets(chosen.credentials, "s3", _SECRETS) if chosen.credentials else {}
    settings: dict[str, Any] = {each.removeprefix("aws_"): value for each, value in secrets.items()}
    settings["region"] = chosen.region or _usual_region()
    settings["client_options"] = client_options(chosen.endpoint, chosen.insecure, "s3")
    settings["retry_config"] = retries()
    # Single deletions: they are one request each anyway, and not every server knows the other kind.
    settings["disable_bulk_delete"] = True
    if chosen.endpoint:
        # The one setting that AWS_ENDPOINT_URL_S3 does not override.
        settings["aws_endpoint_url_s3"] = chosen.endpoint
    hint = "the s3 tier's settings are not accepted: check its options and AWS's environment variables"
    store = open_store(S3Store, bucket, prefix, settings, hint)
    where = f"bucket {bucket}" + (f" at {chosen.endpoint}" if chosen.endpoint else "")
    access = "check the credentials and that they allow s3:GetObject, PutObject, DeleteObject and ListBucket there"
    judge = Judge(where, True, remedies(access))
    return ObjectTier(name, Place("s3", store, judge), check_parallel(chosen.parallel, "s3"))


def _usual_region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
