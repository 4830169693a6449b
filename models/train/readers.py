"""Turn one file of a source package into a list of paragraphs; prepare_text.py cleans and filters them.

Each reader takes a path and returns paragraphs in reading order; unreadable markup yields fewer paragraphs,
never an error, because a lost paragraph does no harm to a training text.
"""

from __future__ import annotations

import gzip
import html
import re
import struct
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

_BLOCK = {
    "p",
    "li",
    "dd",
    "dt",
    "td",
    "h1",
    "h2",
    "h3",
    "h4",
    "div",
    "br",
    "section",
    "title",
    "desc",
    "item",
    "note",
}
_SKIP = {"script", "style", "pre", "nav", "head", "footer", "info", "code-block", "screen", "form", "svg"}


class _Text(HTMLParser):
    """Collects the text between block tags; ignores everything inside code and navigation."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._now: list[str] = []
        self._skipping: list[str] = []

    def flush(self) -> None:
        self.paragraphs.append("".join(self._now))
        self._now = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCK | _SKIP:
            self.flush()
        if tag in _SKIP:
            self._skipping.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCK | _SKIP:
            self.flush()
        if tag in self._skipping:
            while self._skipping.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._now.append(data)


def _decode(path: Path) -> str:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def read_html(path: Path) -> list[str]:
    """HTML and Mallard pages."""
    parser = _Text()
    parser.feed(_decode(path))
    parser.close()
    parser.flush()
    return parser.paragraphs


def read_text(path: Path) -> list[str]:
    """Plain text, paragraphs parted by empty lines."""
    return re.split(r"\n\s*\n", _decode(path))


def read_pod(path: Path) -> list[str]:
    """Perl's pod: verbatim paragraphs and directives go, inline codes like `C<x>` keep their content."""
    kept = [p for p in read_text(path) if p and not p[0].isspace() and not p.startswith("=")]
    for _ in range(3):  # codes nest; three levels cover the manual
        kept = [re.sub(r"[BCFILSX]<+ ?([^<>]*?) ?>+", lambda m: m[1].split("|")[0], p) for p in kept]
    return [p.replace("E<gt>", ">").replace("E<lt>", "<") for p in kept]


def read_wml(path: Path) -> list[str]:
    """Wesnoth campaigns: the translatable strings, which are what characters say and the narrator tells."""
    strings = re.findall(r'_\s*"((?:[^"]|"")*)"', _decode(path))
    return [re.sub(r"<[^>]+>", " ", s.replace('""', '"')) for s in strings]


def read_quoted(path: Path) -> list[str]:
    """Endless Sky: strings between back quotes; placeholders like `<planet>` become plain words."""
    strings = re.findall(r"`([^`\n]*)`", _decode(path)) + re.findall(r'description "([^"\n]{60,})"', _decode(path))
    return [re.sub(r"<(\w+)>", r"\1", s) for s in strings]


def read_sword(path: Path) -> list[str]:
    """A Sword zText module: an index (.bzs) of zlib streams in a .bzz file, OSIS markup inside."""
    data, index = path.read_bytes(), path.with_suffix(".bzs").read_bytes()
    books = [zlib.decompress(data[o : o + n]) for o, n, _ in struct.iter_unpack("<III", index) if n]
    text = "\n".join(b.decode("utf-8", "ignore") for b in books)
    text = re.sub(r"<note.*?</note>|<title.*?</title>", "", text, flags=re.S)
    text = re.sub(r'<div [^>]*type="(?:x-p|paragraph)"[^>]*/?>|<chapter[^>]*>|<p/?>', "\n\n", text)
    return re.split(r"\n\s*\n", html.unescape(re.sub(r"<[^>]+>", "", text)))


READERS: dict[str, Callable[[Path], list[str]]] = {
    "html": read_html,
    "text": read_text,
    "pod": read_pod,
    "wml": read_wml,
    "quoted": read_quoted,
    "sword": read_sword,
}
