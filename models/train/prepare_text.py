"""Download the source packages, extract and clean their prose, and split it into training and held-out text.

    python prepare_text.py --work DIR

Needs `apt-get` and `dpkg` (nothing is installed, no root). Writes into DIR: `train.txt`, `heldout.txt`
(documents parted by a form feed) and `sources.json` (package, version, licence, bytes). What the sources
are: `sources.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
from pathlib import Path

from readers import READERS
from sources import SOURCES, Source

HELDOUT_PERCENT = 2
_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\u00a0": " "})
_COMMON = re.compile(r"\b(the|of|and|to|is|in|that|you|a|for|it|was|with|i)\b", re.I)
_PROSE = re.compile(r"[A-Za-z ,.;:'\"?!()\-]")
_DOCUMENT_CHARS = 60_000  # long files are cut into documents of this size, so that held-out text is spread


def fetch(source: Source, work: Path) -> tuple[Path, str]:
    """Download and unpack one package; return its root and its version. Kept between runs."""
    root, debs = work / "unpacked" / source.package, work / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    found = sorted(debs.glob(f"{source.package}_*.deb"))
    if not found:
        subprocess.run(["apt-get", "download", "-q", source.package], cwd=debs, check=True, capture_output=True)
        found = sorted(debs.glob(f"{source.package}_*.deb"))
    if not root.exists():
        root.mkdir(parents=True)
        subprocess.run(["dpkg", "-x", str(found[-1].resolve()), str(root)], check=True)
    return root, found[-1].name.split("_")[1].replace("%3a", ":")


def clean(paragraph: str) -> str | None:
    """One line of plain prose, or None where the paragraph is code, a fragment or a table row."""
    line = re.sub(r"\s+", " ", paragraph.translate(_ASCII)).strip(" \u00b6*#|-")
    line = line.replace("\u00b6", "").replace("{", "").replace("}", "")
    if len(line) < 50 or not line.endswith((".", "!", "?", ":", '"', ")", "'")):
        return None
    words = line.split()
    if len(_COMMON.findall(line)) < max(2, len(words) // 12) or sum(map(len, words)) > 8 * len(words):
        return None
    return line if len(_PROSE.findall(line)) >= 0.94 * len(line) else None


def documents(source: Source, root: Path, seen: set[bytes]) -> list[str]:
    """The package's documents of at least 400 chars; paragraphs in `seen` are dropped, the others join it."""
    out: list[str] = []
    files = sorted({f for pattern in source.globs for f in root.glob(pattern)})
    for file in (f for f in files if f.is_file() and f.name != "print.html"):
        kept: list[str] = []
        for line in filter(None, map(clean, READERS[source.reader](file))):
            digest = hashlib.blake2b(line.encode(), digest_size=8).digest()
            if digest not in seen:
                seen.add(digest)
                kept.append(line)
            if sum(map(len, kept[-400:])) > _DOCUMENT_CHARS and len(kept) > 20:
                out.append("\n".join(kept))
                kept = []
        out.append("\n".join(kept))
    return [d for d in out if len(d) >= 400]


def is_heldout(document: str) -> bool:
    """A stable choice by content, so that the split does not depend on order."""
    return hashlib.blake2b(document[:200].encode(), digest_size=4).digest()[0] * 100 < HELDOUT_PERCENT * 256


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--work", type=Path, required=True)
    work: Path = args.parse_args().work
    seen: set[bytes] = set()
    train: list[str] = []
    heldout: list[str] = []
    rows = []
    for source in SOURCES:
        root, version = fetch(source, work)
        docs = documents(source, root, seen)
        held = [is_heldout(d) for d in docs]
        train += [d for d, h in zip(docs, held, strict=True) if not h]
        heldout += [d for d, h in zip(docs, held, strict=True) if h]
        size = sum(len(d.encode()) for d in docs)
        rows.append(
            {
                "package": source.package,
                "version": version,
                "licence": source.licence,
                "bytes": size,
                "documents": len(docs),
            }
        )
        print(f"{source.package:28s} {version:28s} {len(docs):6d} documents {size / 1e6:7.2f} MB", flush=True)
    (work / "train.txt").write_text("\f".join(train))
    (work / "heldout.txt").write_text("\f".join(heldout))
    (work / "sources.json").write_text(json.dumps(rows, indent=1))
    print(f"train {sum(map(len, train)) / 1e6:.2f} MB, held out {sum(map(len, heldout)) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
