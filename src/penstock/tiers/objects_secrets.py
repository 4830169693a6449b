"""The file that holds a store's credentials: INI, one section, readable by its owner only."""

from __future__ import annotations

import configparser
import os
import stat
from pathlib import Path

from penstock.errors import ConfigError

__all__ = ["private_file", "read_secrets"]


def private_file(path: str, scheme: str) -> Path:
    """The path, if only its owner may read what is there. Raises ConfigError otherwise."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise ConfigError(f"the {scheme} tier's credentials: {path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"the {scheme} tier's credentials: {path} is not a file")
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"the {scheme} tier's credentials: others may read {path}: chmod 600 {path}")
    return Path(path)


def read_secrets(path: str, scheme: str, names: tuple[str, ...]) -> dict[str, str]:
    """The settings of the section `[default]`, of which `names` are known; without those that are not set.

    Raises ConfigError naming what is wrong, never what is in the file.
    """
    parser = configparser.ConfigParser(interpolation=None, default_section="-")
    try:
        parser.read_string(private_file(path, scheme).read_text("utf-8"))
        found = dict(parser["default"])
    except (configparser.Error, KeyError, UnicodeDecodeError):
        raise ConfigError(
            f"the {scheme} tier's credentials: {path} is not a section [default] with name = value lines"
        ) from None
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise ConfigError(f"the {scheme} tier's credentials: {path} may set {', '.join(names)}")
    return found
