"""Texts -> tokens: all of a text is read as text, and the tokens that the tokenizer puts around one are known."""

import collections
import contextlib
import functools
import itertools
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

# Processes that tokenize import this file, and nothing here that would make them load torch or `datasets`.

Text = tuple[str, str]
"""The name of a document, and its text: a `Document` is one."""
Batches = Iterable[tuple[Sequence[Text], Any]]
Tokenize = Callable[[Batches], Iterator[tuple[list[str], list[Any], Any]]]
"""Maps batches of documents, each with whatever belongs to it, to their names, their tokens (for chats, beside their
labels, or the error that says why there are none), and what belongs to it."""
START_METHOD = "spawn"
"""For processes that tokenize: a fork of this one would have its locks, but not the threads that hold them."""


def text_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, without those that the tokenizer puts around it.

    The name of a control token in a text, such as the `<s>` of a web page or `<|im_start|>`, is spelled out in tokens
    of text: no text can end a document or begin a turn of a chat.

    Raises:
        ValueError: if the tokenizer makes a control token of text in a way that cannot be taken apart.
    """
    control = control_tokens(tokenizer)
    # Tokenizers of mistral-common know no control tokens in texts, nor the option.
    spelled = {} if "MistralCommon" in type(tokenizer).__name__ else {"split_special_tokens": True}

    def plain(parts: Sequence[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        return tokenizer(list(parts), verbose=False, **options, **spelled)["input_ids"] if parts else []

    return [
        ids if control.keys().isdisjoint(ids) else _taken_apart(text, ids, tokenizer, control, plain)
        for text, ids in zip(texts, plain(texts))
    ]


@contextlib.contextmanager
def tokenizing(tokenizer: PreTrainedTokenizerBase, num_proc: int, *, chat: bool = False) -> Iterator[Tokenize]:
    """Yields a function that tokenizes batches, in their order: in this process, or in that many others.

    With `chat`, the documents are conversations (`conversation_text`).

    Each of the others works a batch ahead, so that memory holds two batches for each. They end with this process,
    however it ends.

    Raises:
        ValueError: naming a document that cannot be tokenized, or the last one before a process was killed.
    """
    if num_proc == 1:
        yield functools.partial(_tokenized_here, tokenizer, chat)
        return
    context = multiprocessing.get_context(START_METHOD)
    others = {process.pid for process in multiprocessing.active_children()}
    pool = ProcessPoolExecutor(num_proc, context, initializer=_begin, initargs=(tokenizer, chat))
    try:
        yield functools.partial(_tokenized_there, pool, num_proc)
    except BaseException:  # without waiting for what nobody will read
        for process in multiprocessing.active_children():
            if process.pid not in others:
                process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interruptions_blocked() -> Iterator[None]:
    """Block Ctrl-C in processes that are started here: it is for the main process, which receives it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _tokenized_here(tokenizer: PreTrainedTokenizerBase, chat: bool, batches: Batches) -> Iterator[Any]:
    for documents, extra in batches:
        yield [name for name, _ in documents], _arrays(tokenizer, chat, documents), extra


def _tokenized_there(pool: ProcessPoolExecutor, num_proc: int, batches: Batches) -> Iterator[Any]:
    ahead: collections.deque[tuple[list[str], Future[Any], Any]] = collections.deque()
    unread, failure = iter(batches), None
    while True:
        try:
            for documents, extra in itertools.islice(unread, 2 * num_proc - len(ahead)):
                plain = [(name, text) for name, text in documents]
                with _interruptions_blocked():  # it may start a process
                    ahead.append(([name for name, _ in plain], pool.submit(_arrays_there, plain), extra))
        except ValueError as error:  # of a text that cannot be read: those before it come first, as with one process
            unread, failure = iter(()), error
        if not ahead and failure is not None:
            raise failure
        if not ahead:
            return
        names, future, extra = ahead.popleft()
        try:
            arrays = future.result()
        except BrokenProcessPool:
            raise ValueError(
                f"num_proc {num_proc}: a process was killed at {names[0]} or later: too little memory?"
            ) from None
        yield names, arrays, extra


def _begin(tokenizer: PreTrainedTokenizerBase, chat: bool) -> None:
    """In a process of the pool: keep the tokenizer, and end when the main process does."""
    global _tokenizer, _chat
    _tokenizer, _chat = tokenizer, chat
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process for each core is there already
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


_tokenizer: PreTrainedTokenizerBase | None = None
_chat = False


def _arrays_there(documents: Sequence[Text]) -> list[Any]:
    assert _tokenizer is not None
    return _arrays(_tokenizer, _chat, documents)


def _arrays(tokenizer: PreTrainedTokenizerBase, chat: bool, documents: Sequence[Text]) -> list[Any]:
    """The tokens of each document. ValueError that names one that cannot be tokenized; for a chat, which may be
    left out, it takes the place of the tokens."""

    def arrays(texts: Sequence[str]) -> list[np.ndarray]:
        if not chat:
            return [np.array(ids, dtype=np.int32) for ids in text_tokens(tokenizer, texts)]
        from tokenweight.data.chat import chat_tokens  # which imports this file

        return [chat_tokens(tokenizer, text) for text in texts]

    try:
        return arrays([text for _, text in documents])
    except Exception:  # tokenizers and templates raise whatever they like
        found: list[Any] = []
        for name, text in documents:  # which one was it?
            try:
                found += arrays([text])
            except Exception as error:
                named = ValueError(f"{name}: cannot be tokenized: {' '.join(str(error).split())}")
                if not chat:
                    raise named from error
                found.append(named)
        return found


def token_pieces(tokens: list[int], tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """The text of each token; joined, they are the decoded text.

    A character whose bytes are spread over several tokens belongs to the last of them; the others get an empty string.
    Special tokens are shown by name.

    Args:
        tokens: ids of one sequence.
        tokenizer: tokenizer of the ids; without one, the pieces are the ids, separated by spaces.
    """
    if tokenizer is None:
        return [f" {token}" if place else str(token) for place, token in enumerate(tokens)]

    def decode(start: int, stop: int) -> str:  # `join`: of one row it is a string, though typed as perhaps a list
        return "".join(tokenizer.decode(tokens[start:stop], clean_up_tokenization_spaces=False))

    pieces = [""] * len(tokens)
    # A token alone decodes wrongly: a sentencepiece tokenizer drops its leading space. So each is decoded behind the
    # tokens before it, tokens[context:done], and what these decode to is cut off.
    context = done = 0
    known = ""
    for stop in range(1, len(tokens) + 1):
        text = decode(context, stop)
        if text.endswith("\ufffd") and stop < len(tokens):
            continue  # perhaps half a character: the next token decides
        pieces[stop - 1] = text[len(known) :]
        context, done = done, stop
        known = decode(context, done)
    return pieces


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The ids and names of special tokens, and of others with which the chat template marks turns."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    added = getattr(tokenizer, "added_tokens_decoder", {})
    named = {
        token: one.content
        for token, one in added.items()
        if one.special or (one.content in template and not one.content.isspace())
    }
    named.pop(tokenizer.unk_token_id, None)  # which stands for any unknown word
    return {token: name for token, name in named.items() if len(name) > 1}  # a character has no other spelling


def _taken_apart(
    text: str,
    ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    control: dict[int, str],
    plain: Callable[[Sequence[str]], list[list[int]]],
) -> list[int]:
    """The tokens of a text in which names of control tokens are read in two parts: the tokenizer finds them in its
    vocabulary, even where it does not look for them."""
    names = [control[token] for token in control.keys() & {*ids}]
    parts = _cut(text, names)
    if len(parts) == 1 and (normalizer := getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)):
        parts = _cut(normalizer.normalize_str(text), names)  # which may have made the name of other characters
    if len(parts) == 1:
        raise ValueError(f"{type(tokenizer).__name__} makes the control token {names[0]} of {text[:40]!r}")
    found = []
    for part, inner in zip(parts, plain(parts)):
        disjoint = control.keys().isdisjoint(inner)
        found += inner if disjoint else _taken_apart(part, inner, tokenizer, control, plain)
    return found


def _cut(text: str, names: Sequence[str]) -> list[str]:
    """The text, cut after the first character of each name in it."""
    places = [match.start() + 1 for match in re.finditer(f"(?={'|'.join(map(re.escape, names))})", text)]
    return [text[start:stop] for start, stop in itertools.pairwise([0, *places, len(text)])]
