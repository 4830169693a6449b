"""Where the training text comes from: Debian packages of manuals, books and stories, with their licences.

Covers the list only; `readers.py` turns files into paragraphs and `prepare_text.py` downloads, cleans and
splits. Every package is in Debian main, so its text is free under the Debian Free Software Guidelines; the
licence named here is the one its `copyright` file gives for the text.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Source:
    """One Debian package: glob patterns of its text files, the reader for them, the licence of the text."""

    package: str
    globs: tuple[str, ...]
    reader: str
    licence: str


_DOC = "usr/share/doc"
_RUST = "usr/share/doc/rust-doc/html"
# fmt: off
_CAMPAIGNS = (
    "did", "dm", "dw", "ei", "httt", "l", "low", "nr",
    "sof", "sota", "sotbe", "thot", "trow", "tsg", "ttb", "utbs",
)
# fmt: on

SOURCES: tuple[Source, ...] = (
    Source("sword-text-web", ("usr/share/sword/modules/texts/ztext/*/*.bzz",), "sword", "public domain"),
    Source("jargon-text", (f"{_DOC}/jargon-text/jargon.txt.gz",), "text", "public domain"),
    Source("cfi-en", (f"{_DOC}/cfi-en/html/ch*.htm", f"{_DOC}/cfi-en/html/preface.htm"), "html", "public domain"),
    Source("sqlite3-doc", (f"{_DOC}/sqlite3/**/*.html",), "html", "public domain"),
    Source("python3.11-doc", (f"{_DOC}/python3.11/html/**/*.html",), "html", "PSF-2.0"),
    Source("postgresql-doc-15", (f"{_DOC}/postgresql-doc-15/html/**/*.html",), "html", "PostgreSQL"),
    Source("apache2-doc", (f"{_DOC}/apache2-doc/manual/en/**/*.html",), "html", "Apache-2.0"),
    Source(
        "rust-doc",
        tuple(f"{_RUST}/{b}/**/*.html" for b in ("book", "cargo", "edition-guide", "embedded-book", "nomicon"))
        + tuple(f"{_RUST}/{b}/**/*.html" for b in ("reference", "rust-by-example", "rustc", "rustdoc")),
        "html",
        "MIT OR Apache-2.0",
    ),
    Source("perl-doc", ("usr/share/perl/*/pod/*.pod",), "pod", "Artistic-1.0 OR GPL-1.0-or-later"),
    Source("libreoffice-help-en-us", ("usr/share/libreoffice/help/en-US/text/**/*.html",), "html", "MPL-2.0"),
    Source("gnome-user-docs", ("usr/share/help/C/**/*.page",), "html", "CC-BY-SA-3.0"),
    Source("debian-handbook", (f"{_DOC}/debian-handbook/html/en-US/*.html",), "html", "GPL-2.0+ OR CC-BY-SA-3.0"),
    Source("debian-reference-en", ("usr/share/debian-reference/*.html",), "html", "GPL-2.0-or-later"),
    Source("debian-policy", (f"{_DOC}/debian-policy/policy.html/*.html",), "html", "GPL-2.0-or-later"),
    Source("developers-reference", ("usr/share/developers-reference/*.html",), "html", "GPL-2.0"),
    Source("debian-faq", (f"{_DOC}/debian/FAQ/**/*.html",), "html", "copyleft notice (free to copy and modify)"),
    Source("maint-guide", (f"{_DOC}/maint-guide/**/*.html",), "html", "GPL-2.0-or-later"),
    Source("harden-doc", (f"{_DOC}/harden-doc/html/en-US/*.html",), "html", "GPL-2.0"),
    Source("aptitude-doc-en", (f"{_DOC}/aptitude/html/en/*.html",), "html", "GPL-2.0-or-later"),
    Source("installation-guide-amd64", (f"{_DOC}/installation-guide-amd64/en/*.html",), "html", "GPL-2.0"),
    Source("git-doc", (f"{_DOC}/git/**/*.html", f"{_DOC}/git-doc/**/*.html"), "html", "GPL-2.0"),
    Source("exim4-doc-html", (f"{_DOC}/exim4*/**/*.html",), "html", "GPL-2.0-or-later"),
    Source("endless-sky-data", ("usr/share/games/endless-sky/data/*.txt",), "quoted", "GPL-3.0-or-later"),
    *(
        Source(f"wesnoth-1.16-{c}", ("usr/share/games/wesnoth/**/*.cfg",), "wml", "GPL-2.0-or-later")
        for c in _CAMPAIGNS
    ),
)
