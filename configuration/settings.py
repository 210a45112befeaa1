"""The key=value words of a command, read into a dataclass of its settings and checked as the settings of runs are."""

import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from common.errors import UserError
from common.stores import fetched, is_address
from configuration.nodes import nearest
from configuration.values import FilePath, Setting, check_value, options_of, range_in

T = TypeVar("T")


def read_settings(words: list[str], kind: type[T], groups: Sequence[str] = (), others: str = "") -> tuple[T, list[str]]:
    """Return the settings that a command line gives, and its words for parts of `groups`, such as solver.steps=4.

    kind: a dataclass; a field's annotation says what its word may give, with the ranges of common/ranges.py. The
    default holds without a word. UserError for another word, a value of another kind, and a missing word that has no
    default. others: what may follow, in words, for the message.
    """
    settings, rest = known_settings(words, kind)
    for word in rest:
        if "=" not in word or re.split("[./=]", word)[0] not in groups:
            raise UserError(unusable(word, kind, groups) + others)
    return settings, rest


def unusable(word: str, kind: type, groups: Sequence[str] = ()) -> str:
    """Return in a sentence that a command does not take a word, and what it takes."""
    keys = [*(field.name for field in fields(kind)), *(f"{group} settings" for group in groups)]
    key, equals, _ = word.partition("=")
    return f"cannot use {word!r}{nearest(key, keys) if equals else ''}; the keys are {', '.join(keys)}, as key=value"


def known_settings(words: list[str], kind: type[T]) -> tuple[T, list[str]]:
    """Return the settings that a command line gives, as in read_settings, and every other word of it."""
    hints, given, rest = get_type_hints(kind, include_extras=True), dict[str, Any](), list[str]()
    for word in words:
        key, equals, text = word.partition("=")
        if equals and key in hints:
            given[key] = text
        else:
            rest.append(word)
    values = {key: value_of(key, text, hints[key]) for key, text in given.items()}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"{field.name} is missing; add it to the command, such as {field.metadata['example']}")
    return kind(**values), rest


def value_of(key: str, text: str, hint: Any) -> Any:
    """Return the value that key=text gives a setting of this annotation. UserError for one of another kind."""
    options = [FilePath if option is Path else option for option in options_of(hint) if option is not NoneType]
    if not text and NoneType in options_of(hint):
        return None
    value = parsed(text, options)
    check_value(key, value, Setting(Annotated[Union[tuple(options)], range_in(hint)]))  # noqa: UP007
    if key == "out" and FilePath in options and is_address(value):
        raise UserError(f"out={value} is in a store, where this command writes nothing; give a path on this machine")
    return fetched(value) if FilePath in options else value


def parsed(text: str, options: Sequence[Any]) -> Any:
    """Return a word as one of these types; the text itself where it can be none of them."""
    if bool in options:
        return {"true": True, "false": False}.get(text, text)
    inner = next((get_args(option)[0] for option in options if get_origin(option) is list), None)
    if inner is not None:
        return [parsed(word, options_of(inner)) for word in text.strip("[]").split(",")] if text else text
    if int in options and re.fullmatch(r"-?[0-9]{1,50}", text):
        return int(text)
    if float in options and re.fullmatch(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]{1,3})?", text, re.IGNORECASE):
        return float(text)
    return text
