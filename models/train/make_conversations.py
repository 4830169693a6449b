"""Make the demo's conversations from held-out, public-domain text (the SQLite documentation).

    python make_conversations.py --work DIR --model MODEL_DIR --out conversations.json

The system prompt is one long chapter (about 2,200 tokens); five conversations of four turns follow, each turn
a passage and a question about it. None of these passages was trained on: only documents of the held-out split
are used. Reads the unpacked packages of DIR (see prepare_text.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from prepare_text import documents, is_heldout
from sources import SOURCES
from transformers import AutoTokenizer, PreTrainedTokenizerBase

PACKAGE = "sqlite3-doc"
CHAPTER = "SQLite Test Harness #3"
SYSTEM_TOKENS = 2300
TURN_TOKENS = (60, 300)
OPENING = "You answer questions about a database library. Here is the chapter that the questions are about."
CONVERSATIONS = ("statements", "extensions", "snapshots", "harness", "mutations")
QUESTIONS = (
    "What does this mean for an application?",
    "Which part of it matters most?",
    "When would you use it?",
    "What happens if an error occurs?",
)


def held_out_paragraphs(work: Path) -> tuple[list[str], list[str]]:
    """The chapter's paragraphs, and those of every other held-out document, in reading order."""
    source = next(s for s in SOURCES if s.package == PACKAGE)
    seen: set[bytes] = set()
    kept = [d for d in documents(source, work / "unpacked" / PACKAGE, seen) if is_heldout(d)]
    chapter = next(d for d in kept if d.startswith(CHAPTER))
    others = [p for d in kept if d is not chapter for p in d.split("\n")]
    return chapter.split("\n"), others


def count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Tokens of `text`."""
    return len(tokenizer(text)["input_ids"])


def split_system(tokenizer: PreTrainedTokenizerBase, chapter: list[str]) -> tuple[str, list[str]]:
    """As many paragraphs as fit SYSTEM_TOKENS behind the opening line, and the rest."""
    system, used = OPENING, 0
    while used < len(chapter) and count(tokenizer, f"{system}\n{chapter[used]}") <= SYSTEM_TOKENS:
        system, used = f"{system}\n{chapter[used]}", used + 1
    return system, chapter[used:]


def turns_of(tokenizer: PreTrainedTokenizerBase, paragraphs: list[str]) -> list[str]:
    """Turns of TURN_TOKENS from paragraphs in order: short ones are joined, a too long one is passed over."""
    low, high = TURN_TOKENS
    turns: list[str] = []
    passage = ""
    for paragraph in paragraphs:
        passage = f"{passage}\n{paragraph}".strip()
        turn = f"{passage}\n{QUESTIONS[len(turns) % len(QUESTIONS)]}"
        size = count(tokenizer, turn)
        if size >= low:
            turns += [turn] if size <= high else []
            passage = ""
    return turns


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--work", type=Path, required=True)
    args.add_argument("--model", type=Path, required=True)
    args.add_argument("--out", type=Path, required=True)
    options = args.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    chapter, others = held_out_paragraphs(options.work)
    system, rest = split_system(tokenizer, chapter)
    turns = turns_of(tokenizer, [*others, *rest])
    if len(turns) < 20:
        raise SystemExit(f"only {len(turns)} turns; hold out more documents (prepare_text.HELDOUT_PERCENT)")
    text = {
        "system": system,
        "conversations": [{"id": n, "turns": turns[4 * i : 4 * i + 4]} for i, n in enumerate(CONVERSATIONS)],
        "source": "SQLite documentation (Debian package sqlite3-doc), passages held out of training; the "
        "questions and the opening line were written for this demo",
        "licence": "public domain (SQLite documentation); questions: Apache-2.0",
    }
    options.out.write_text(json.dumps(text, indent=1) + "\n")
    print(count(tokenizer, system), [count(tokenizer, t) for t in turns], "turns available:", len(turns))


if __name__ == "__main__":
    main()
