"""What a user may set in `kv_connector_extra_config`: few keys, typed, unknown ones refused."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from penstock.connectors.below import FetchMode
from penstock.errors import ConfigError

__all__ = ["ConnectorConfig", "read_config"]

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]


class ConnectorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The connector's settings."""

    pool: str = "default"
    """Name of the pool (`penstock serve --name`)."""
    min_hit_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    """A shorter hit is recomputed. A request may ask for more (`min_hit_tokens` in its parameters)."""
    sync_load_ms: Annotated[float, msgspec.Meta(ge=0, le=60000)] = 50.0
    """Loads estimated to take no longer than this run before the step that needs them; longer ones beside other
    requests' steps. 0: always beside."""
    load_deadline_s: Seconds = 10.0
    """A load that has not ended by then counts as failed, and its tokens are computed."""
    save_wait_s: Annotated[float, msgspec.Meta(ge=0, le=60)] = 1.0
    """How long storing a batch of blocks may wait for room in the pool, off the engine's thread."""
    fetch: FetchMode = FetchMode.AUTO
    """What to do about blocks that lie in a tier below the pool: "auto" fetches what is expected to be faster to fetch
    than to compute, "always", "never"."""
    fetch_deadline_s: Seconds = 10.0
    """A request waits no longer than this for blocks from below."""
    lease_age_s: Seconds = 30.0
    """A lookup that was not used is let go after this long."""
    trust_item_hashes: bool = False
    """Share requests with images and sounds, by the hash that vLLM has of each. vLLM takes a client's own name for such
    an item in its place, so that a client may call one image by another one's hash: for clients that are trusted."""
    weights: str = ""
    """Digest of the weights ("algorithm:hex"), for checkpoints that are not files on this machine."""


def read_config(extra: Mapping[str, Any]) -> ConnectorConfig:
    """The settings in `extra`; ConfigError names what is wrong, and the nearest key for one that is unknown."""
    known = [field.name for field in msgspec.structs.fields(ConnectorConfig)]
    for key in extra:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"kv_connector_extra_config has no key {key!r}; {hint}")
    try:
        config = msgspec.convert(dict(extra), ConnectorConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"kv_connector_extra_config: {error}") from error
    for name in ("sync_load_ms", "load_deadline_s", "fetch_deadline_s", "save_wait_s", "lease_age_s"):
        if not math.isfinite(getattr(config, name)):
            raise ConfigError(f"kv_connector_extra_config: {name} must be a finite number")
    return config
