"""Conversations -> tokens, by the tokenizer's chat template, and which of them are the answers."""

import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from tokenweight.data.tokenize import control_tokens, text_tokens
from tokenweight.models import special_tokens

# Processes that tokenize import this file, too.

_CUT = "\ue0f7"
"""Inserted in names of control tokens in messages while they are rendered: a private-use character."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Segments = list[tuple[str, bool]]
"""Consecutive parts of a text, and whether they are predicted."""


def chat_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> Int32[np.ndarray, "tokens 2"]:
    """The tokens of a conversation (`conversation_text`), and their labels: -100 but in answers.

    An answer is what the model has to write: what the template marks by `{% generation %}`; else all that follows the
    generation prompt up to the end of the turn. For this the conversation up to a message, rendered alone, must be a
    prefix of it, with and without the generation prompt: templates that render earlier turns differently fail. A
    completion that is a text ends with EOS. The name of a control token in a message is spelled out in tokens of text.

    Raises:
        ValueError: if the template leaves something of the conversation out, cannot tell which tokens are answers, or
            there is none.
    """
    conversation = json.loads(text)
    if "completion" in conversation:
        return _of_texts(tokenizer, conversation["prompt"], conversation["completion"])
    segments = _rendered(tokenizer, conversation["messages"], conversation["given"], conversation.get("tools"))
    return _labelled(*_spelled(tokenizer, segments, lambda part: _tokens(tokenizer, part)))


def _of_texts(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Int32[np.ndarray, "tokens 2"]:
    before, after = special_tokens(tokenizer)
    if not after and tokenizer.eos_token_id is not None:  # or nothing would teach the model to stop
        after = [tokenizer.eos_token_id]
    segments = [(prompt, False), (completion, True)]
    parts, predicted = _spelled(tokenizer, segments, lambda part: text_tokens(tokenizer, [part])[0])
    return _labelled([before, *parts, after], [False, *predicted, True])


def _labelled(parts: Sequence[Sequence[int]], predicted: Sequence[bool]) -> Int32[np.ndarray, "tokens 2"]:
    tokens = [token for part in parts for token in part]
    labels = [token if chosen else -100 for part, chosen in zip(parts, predicted) for token in part]
    return np.array([tokens, labels], dtype=np.int32).T


def _tokens(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
    """The tokens of a rendered text, whose control tokens are the template's; those of messages are cut in two."""
    parts = [part for part in rendered.split(_CUT) if part]
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    found = tokenizer(parts, verbose=False, **options)["input_ids"] if parts else []
    return [token for part in found for token in part]


def _spelled(
    tokenizer: PreTrainedTokenizerBase, segments: Segments, tokenize: Callable[[str], list[int]]
) -> tuple[list[list[int]], list[bool]]:
    """The tokens of each part of a text: those of the whole, if none crosses a border of parts.

    Otherwise each part is tokenized alone, as at inference, where the prompt is tokenized before there is an answer.
    """
    texts, predicted = [text for text, _ in segments], [chosen for _, chosen in segments]
    whole, parts, start = tokenize("".join(texts)), [], 0
    for number in range(1, len(texts) + 1):
        read = whole if number == len(texts) else tokenize("".join(texts[:number]))
        if read != whole[: len(read)]:
            break
        parts.append(read[start:])
        start = len(read)
    else:
        return parts, predicted
    parts = [tokenize(text) for text in texts]
    joined = [token for part in parts for token in part]
    options = {"clean_up_tokenization_spaces": False}
    if tokenizer.decode(joined, **options) != tokenizer.decode(whole, **options):
        raise ValueError(
            f"a token lies across the border after {texts[number - 1][-20:]!r}, and apart its parts are spelled "
            "otherwise: expected a space or a new line at the border"
        )
    return parts, predicted


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], given: int, tools: list[Any] | None
) -> Segments:
    """The rendered conversation in parts, the answers apart."""
    template = tokenizer.get_chat_template(None, tools)  # raises, if there is none
    marked = bool(_GENERATION.search(template))
    messages = [_guarded(tokenizer, message) for message in messages]
    tools = tools and _guarded(tokenizer, {"tools": tools})["tools"]
    named = {"tools": tools, "chat_template": template, **tokenizer.special_tokens_map}

    def render(messages: list[dict[str, Any]], *, prompt: bool = False, **other: Any) -> tuple[str, list[Any]]:
        found, spans = render_jinja_template(
            conversations=[messages],
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=marked,
            **{**named, **other},
        )
        return found[0], spans[0] if spans else []

    whole, spans = render(messages)
    if marked:
        spans = [span for span in spans if span[0] < span[1]]
        if given:
            before = _prefix(render(messages[:given], prompt=messages[given]["role"] == "assistant")[0], whole, given)
            spans = [span for span in spans if span[0] >= before]
    else:
        spans = _spans(tokenizer, lambda *args, **kwargs: render(*args, **kwargs)[0], messages, given, whole)
    without = whole if tools is None else render(messages, tools=None)[0]
    _check_nothing_is_lost(messages, given, whole, spans, tools is not None and without == whole)
    edges = [0, *(edge for span in spans for edge in span), len(whole)]
    return [(whole[a:b], bool(n % 2)) for n, (a, b) in enumerate(itertools.pairwise(edges)) if a < b]


def _prefix(part: str, whole: str, number: int) -> int:
    """The length of a part that is rendered alone. ValueError if the whole does not begin with it."""
    if not whole.startswith(part):
        raise ValueError(
            f"the chat template renders the first {number} messages differently when more follow, so that it is "
            "unknown which tokens are answers: expected a template with {% generation %}, or one that only appends"
        )
    return len(part)


def _spans(
    tokenizer: PreTrainedTokenizerBase,
    render: Callable[..., str],
    messages: list[dict[str, Any]],
    given: int,
    whole: str,
) -> list[tuple[int, int]]:
    """Spans of the answers: from the generation prompt to the end of the turn, without the space after it."""
    ends = re.compile(rf"(?:{'|'.join(map(re.escape, control_tokens(tokenizer).values())) or '(?!)'})(\s+)\Z")
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number < given:
            continue
        start = _prefix(render(messages[:number], prompt=True), whole, number)
        stop = _prefix(render(messages[: number + 1]), whole, number + 1)
        space = ends.search(whole, start, stop)
        spans.append((start, stop if space is None else space.start(1)))
    return spans


def _guarded(tokenizer: PreTrainedTokenizerBase, message: dict[str, Any]) -> dict[str, Any]:
    """A message in which names of control tokens are cut, so that none is made of them. In answers, marks that are not
    special, such as those of thoughts and calls, are the model's own to write."""
    names = [*control_tokens(tokenizer).values()]
    if message.get("role") == "assistant":
        names = [name for name in names if name in tokenizer.all_special_tokens]
    pattern = re.compile("|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names) or "(?!)")

    def guard(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda found: found[0] + _CUT, value.replace(_CUT, ""))
        if isinstance(value, dict):
            return {key: guard(inner) for key, inner in value.items()}
        return [guard(inner) for inner in value] if isinstance(value, list) else value

    return {key: value if key == "role" else guard(value) for key, value in message.items()}


def _check_nothing_is_lost(
    messages: list[dict[str, Any]], given: int, whole: str, spans: Sequence[tuple[int, int]], without_tools: bool
) -> None:
    """Raise a ValueError if a template has silently left something out, or answers are not where it marks them."""
    if without_tools:
        raise ValueError(
            "the chat template does not render tools: expected a conversation without, or another template"
        )
    place = 0
    for number, message in enumerate(messages, 1):
        names = [str(call.get("function", call).get("name", "")) for call in message.get("tool_calls", ())]
        texts = names if message["role"] == "tool" else [message["content"].strip(), *names]
        for text in texts:
            if text not in whole:
                raise ValueError(f"the chat template leaves out or changes {text[:40]!r} of message {number}")
        if message["role"] == "assistant" and number > given:
            answer = next(filter(None, texts), "")  # a call without a text has its name
            found = [whole.find(answer, max(place, start), stop) for start, stop in spans]
            if max(found, default=-1) < 0:
                raise ValueError(f"the chat template does not mark message {number} as an answer")
            place = min(at for at in found if at >= 0) + len(answer)
