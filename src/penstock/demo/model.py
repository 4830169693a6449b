"""The demo's model and text: what ships with Penstock, or any causal language model that transformers can load."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

__all__ = ["SHIPPED_MODEL", "Conversations", "load_conversations", "load_model", "load_tokenizer"]

SHIPPED_MODEL = str(files("penstock") / "assets" / "model")
_TEXTS = files("penstock") / "assets" / "texts" / "conversations.json"


def load_model(model_id: str) -> Any:
    """A causal language model in evaluation mode, in the dtype of its checkpoint."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(model_id, dtype="auto")
    return model.eval()


def load_tokenizer(model_id: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_id)


@dataclass(frozen=True, slots=True)
class Conversations:
    """A system prompt and, for each conversation, its user's turns."""

    system: str
    turns: dict[str, list[str]]


def load_conversations(path: Path | None = None) -> Conversations:
    """The shipped conversations, or others in a file of the same shape."""
    text = path.read_text() if path is not None else _TEXTS.read_text()
    data = json.loads(text)
    return Conversations(data["system"], {str(one["id"]): one["turns"] for one in data["conversations"]})
