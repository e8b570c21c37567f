"""Chat records in one form, whatever the names in their data set: a conversation, as the text of a document."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

CHAT_COLUMNS = ("messages", "conversations", "prompt", "completion", "tools")
"""Columns that chats are read from."""
_ROLES = {"human": "user", "gpt": "assistant"}
"""Names of roles in data sets of `from` and `value`."""


def chat_columns(columns: Collection[str]) -> list[str]:
    """The `CHAT_COLUMNS` from which a record's chat is read, given its columns; none, if it holds no chat."""
    for names in (["messages"], ["conversations"], ["prompt", "completion"]):
        if {*names} <= {*columns}:
            return [*names, *(["tools"] if "tools" in columns else [])]
    return []


def conversation_text(record: Mapping[str, Any]) -> str:
    """The conversation of a record with `chat_columns`, as JSON.

    For texts (`prompt` and `completion`) it holds both; else `messages`, of which the first `given` are the prompt,
    whose answers are context, and `tools`, if there are any. Nulls, which tables fill in, are left out.

    Raises:
        ValueError: for what is not a conversation, or has no answer or an empty one, with the number of the message.
    """
    if isinstance(record.get("completion"), str) and isinstance(record.get("prompt"), str):
        if not record["completion"].strip():
            raise ValueError("completion is empty: expected a text, which is predicted")
        if _tools(record.get("tools")):
            raise ValueError("tools: beside a prompt and a completion that are texts: expected messages, or no tools")
        return _json({"prompt": record["prompt"], "completion": record["completion"]})
    if "completion" in record:
        given, answers = (_messages(record[name], name) for name in ("prompt", "completion"))
    else:
        name = "messages" if "messages" in record else "conversations"
        given, answers = [], _messages(record[name], name)
    if not any(message["role"] == "assistant" for message in answers):
        raise ValueError("no message of the assistant: expected an answer, which is predicted")
    tools = _tools(record.get("tools"))
    return _json({"messages": given + answers, "given": len(given), **({"tools": tools} if tools else {})})


def _json(conversation: dict[str, Any]) -> str:
    text = json.dumps(conversation, ensure_ascii=False, default=str)  # a table may note times beside a message
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair at character {error.start}, which is no text") from None
    return text


def _messages(found: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(found, list) or not found:
        raise ValueError(f"{name} holds {'no message' if found == [] else type(found).__name__}: expected messages")
    return [_message(message, f"{name}, message {number}") for number, message in enumerate(found, 1)]


def _message(found: Any, where: str) -> dict[str, Any]:
    """A message with a role and, as one text, its content."""
    if not isinstance(found, dict):
        raise ValueError(f"{where}: found {type(found).__name__}: expected an object with role and content")
    message = _without_nulls(found)
    if "from" in message and "role" not in message:
        role = message.pop("from")
        message = {"role": _ROLES.get(str(role), role), "content": message.pop("value", ""), **message}
    role = message.get("role")
    if not isinstance(role, str):
        raise ValueError(f"{where}: no role: found {', '.join(message) or 'nothing'}: expected role and content")
    content = message.get("content", "")
    if isinstance(content, list):
        other = [part for part in content if not isinstance(part, dict) or not isinstance(part.get("text"), str)]
        if other:
            kind = other[0].get("type") if isinstance(other[0], dict) else type(other[0]).__name__
            raise ValueError(f"{where}: content has a part {kind!r}: expected texts only")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{where}: content holds {type(content).__name__}: expected a text")
    if role == "assistant" and not (content.strip() or message.get("tool_calls")):
        raise ValueError(f"{where}: the answer is empty: expected a text or tool_calls, which are predicted")
    return {**message, "content": content}


def _tools(found: Any) -> Sequence[Any]:
    try:
        tools = json.loads(found) if isinstance(found, str) and found else found
    except ValueError as error:
        raise ValueError(f"tools: not JSON ({error})") from None
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"tools holds {type(tools).__name__}: expected a list of JSON schemas")
    return _without_nulls(tools)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
