"""What the text of a row is: a column, or a chat, which a tokenizer's chat template makes text of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

from fasp_lightning.errors import FaspError, as_refusal, one_line

TEXT = "text"
"""The column that is read where none is asked for; rows without it may hold a chat instead."""

CHATS = ("messages", "conversations", "conversation")
"""Columns that hold a chat."""

PAIRS = tuple(
    product(
        ("prompt", "instruction", "question", "query", "problem", "input", "inputs", "user"),
        ("completion", "chosen", "response", "output", "answer", "solution", "targets", "assistant"),
    )
)
"""Columns that hold what a user says, and the answer."""

SYSTEM, INPUT = ("system", "system_prompt"), ("input", "context")
"""Columns beside them: what the chat begins with, and what the user's turn ends with."""

TOOLS = "tools"
"""Column beside them: the functions that the assistant may call, which the chat template writes down."""

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
"""Other names of roles."""

CONVERSION = (
    'datasets.load_dataset("json", data_files="chats.jsonl", split="train").map(lambda row: {"text": '
    '"\\n".join(one["content"] for one in row["messages"])}).to_json("text.jsonl")'
)
"""The line that makes plain text of chats."""


class Chat(str):
    """The messages of a chat, as JSON: a document that becomes text only where the tokenizer is known.

    With tools, it is a mapping of ``messages`` and ``tools``.
    It is hashed and divided among splits and roles as it is, whatever the tokenizer's template makes of it.
    """

    __slots__ = ()


def rendered(document: str, tokenizer: Any) -> str:
    """The text of a document: of a chat, what the tokenizer's chat template makes of it.

    Args:
        document: The document.
        tokenizer: A tokenizer of transformers; ``None`` has no template.

    Raises:
        FaspError: If the tokenizer has no chat template, or it refuses the chat.
    """
    if not isinstance(document, Chat):
        return document
    if not getattr(tokenizer, "chat_template", None):
        raise FaspError(
            "a text of chats needs a tokenizer with a chat template, got one without; take the tokenizer of the chat "
            f"model, set its chat_template, or make plain text of the chats, as by {CONVERSION}"
        )
    chat = json.loads(document)
    messages, tools = (chat, None) if isinstance(chat, list) else (chat["messages"], chat[TOOLS])

    def refusal(error: Exception) -> FaspError:
        roles = ", ".join(str(message["role"]) for message in messages[:8])
        return FaspError(
            f"a chat must fit the tokenizer's chat template, which says: {one_line(error)}; its roles are {roles}: "
            "leave such chats out, or set another chat_template"
        )

    with as_refusal(refusal):
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)


def columns_of(names: Iterable[str], column: str) -> list[str]:
    """The columns that hold a row's text: the one asked for, or those of a chat; none if there are neither.

    Args:
        names: Names of the row's columns.
        column: The one asked for.
    """
    names = list(names)
    tools = [TOOLS] if TOOLS in names else []
    if column in names:
        return [column, *(tools if column in CHATS else [])]
    if column != TEXT:
        return []
    beside = [name for name in (*SYSTEM, *INPUT) if name in names]
    for found in ((name,) for name in CHATS if name in names):
        return [*found, *(name for name in beside if name in SYSTEM), *tools]
    for pair in PAIRS:
        if set(pair) <= set(names):
            return [*pair, *(name for name in beside if name not in pair), *tools]
    return []


def document_of(row: Mapping[str, Any], column: str) -> str | None:
    """The document of a row; ``None`` if it has none.

    Args:
        row: The row.
        column: The column asked for, where there is one; see :func:`columns_of`.

    Raises:
        FaspError: If a column holds neither text nor the messages of a chat.
    """
    if column in row and not isinstance(row[column], (list, dict)):
        return _text(row[column], column)
    columns = columns_of(row, column)
    if not columns:
        return None
    first, *others = columns
    pair = next((pair for pair in PAIRS if tuple(columns[:2]) == pair), None)
    messages = _turns(row, *pair) if pair else _messages(row[first], first)
    system = next((text for name in SYSTEM if name in others and (text := _text(row[name], name))), None)
    if system and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    tools = _tools(row[TOOLS]) if TOOLS in others else []
    chat = {"messages": messages, TOOLS: tools} if tools else messages
    return Chat(json.dumps(chat, sort_keys=True, default=str)) if messages else None


def _turns(row: Mapping[str, Any], asked: str, answered: str) -> list[dict[str, Any]]:
    """Messages of a row whose prompt and answer stand in columns of their own, as text or as messages."""
    if row[asked] is None or row[answered] is None:
        return []
    answer = _said(row[answered], answered, "assistant")
    if answer and answer[0]["role"] in ("system", "user"):  # all of the chat, and not the answer alone
        return answer
    prompt = _said(row[asked], asked, "user")
    for name in INPUT:
        if name != asked and prompt and (more := _text(row.get(name), name)):
            prompt[-1]["content"] += f"\n\n{more}"
    return [*prompt, *answer]


def _tools(value: Any) -> list[dict[str, Any]]:
    """The tools in a column, each as its JSON schema has it; fields that are null are left out, as tables fill them."""
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value or []
    except json.JSONDecodeError:
        tools = None
    if not isinstance(tools, list) or not all(isinstance(one, dict) for one in tools):
        raise FaspError(
            f"column {TOOLS!r} must hold a list of the chat's tools, each a mapping, or that list as JSON, got "
            f"{_kind(value)}; rename or drop the column"
        )
    return [_filled(one) for one in tools]


def _filled(value: Any) -> Any:
    """Plain data without the fields that are null."""
    if isinstance(value, dict):
        return {name: _filled(one) for name, one in value.items() if one is not None}
    return [_filled(one) for one in value] if isinstance(value, list) else value


def _said(value: Any, column: str, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": _text(value, column)}] if isinstance(value, str) else _messages(value, column)


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    """The messages in a column, each with role and content; fields that are null are left out."""
    if isinstance(value, dict) and value and all(isinstance(one, list) for one in value.values()):
        value = [dict(zip(value, fields, strict=False)) for fields in zip(*value.values(), strict=False)]
    if value is None:
        return []
    found = [_message(one) for one in value] if isinstance(value, list) else [None]
    messages = [one for one in found if one is not None]
    if len(messages) < len(found):
        raise FaspError(
            f"column {column!r} must hold text, or the messages of a chat (each with role and content), got "
            f"{_kind(value)}"
        )
    return messages


def _message(entry: Any) -> dict[str, Any] | None:
    """One message; ``None`` if it is none. ShareGPT's have ``from`` and ``value``."""
    if not isinstance(entry, dict):
        return None
    role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
    if not isinstance(role, str) or not {"content", "value", "tool_calls"} & set(entry):
        return None
    more = {
        name: one for name, one in entry.items() if name not in ("role", "from", "content", "value") and one is not None
    }
    return {**more, "role": ROLES.get(role, role), "content": _content(content)}


def _content(content: Any) -> str:
    """What a message says: text, or parts of text."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts if part is not None]
    wrong = [part for part, text in zip(parts, texts, strict=False) if not isinstance(text, str)]
    if wrong:
        kind = wrong[0].get("type", "no text") if isinstance(wrong[0], dict) else type(wrong[0]).__name__
        raise FaspError(f"the content of a message must be text, got {kind}; leave such chats out")
    return "".join(_clean(str(text)) for text in texts)


def _text(value: Any, column: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise FaspError(f"column {column!r} must hold text, got {_kind(value)}")
    return _clean(value)


def _clean(text: str) -> str:
    """Text without halves of characters, which JSON can write as escapes and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _kind(value: Any) -> str:
    inner = f" of {type(value[0]).__name__}" if isinstance(value, list) and value else ""
    return f"{type(value).__name__}{inner}"
