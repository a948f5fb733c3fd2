"""The Jinja environment of chat templates: that of Transformers, in a sandbox, for a template is somebody's program."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, nodes, parser
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_PROBE = "text-of-a-part"
_NOBODY_READS = "key-that-nobody-reads"


class Refusal(TemplateError):
    """A template called raise_exception: it does not take the messages."""


class BrokenTemplate(ValueError):
    """A text that is no template; the message goes behind "the template has"."""


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> Template:
    """The template of a text.

    Raises:
        BrokenTemplate: it is none.
    """
    try:
        return _environment().from_string(source)
    except TemplateSyntaxError as error:
        raise BrokenTemplate(f"a syntax error in line {error.lineno}: {error.message}") from None
    except SyntaxError as error:  # Jinja makes a Python program; its lines are not the template's
        raise BrokenTemplate(f"a syntax error: {error.msg}") from None
    except Exception as error:  # nested too deeply, constants that cannot be computed
        raise BrokenTemplate(f"an error that keeps it from being compiled: {type(error).__name__}: {error}") from None


def fault_of(source: str) -> str | None:
    """What is wrong with a template, as BrokenTemplate says it; None where it can be used."""
    try:
        compiled(source)
    except BrokenTemplate as error:
        return str(error)
    return None


@functools.lru_cache(maxsize=8)
def reads_parts(source: str, special_tokens: tuple[tuple[str, str], ...]) -> bool:
    """Whether a template writes the texts of content that comes in parts, found out by trying. Others fail on it, or
    write the list as Python or JSON has it, with all that is in it."""
    text = _written(source, special_tokens, [{"type": "text", "text": _PROBE, _NOBODY_READS: ""}])
    return _PROBE in text and _NOBODY_READS not in text


@functools.lru_cache(maxsize=8)
def reads_texts(source: str, special_tokens: tuple[tuple[str, str], ...]) -> bool:
    """Whether a template writes content that is a text; those of multimodal models may look for parts alone."""
    return _PROBE in _written(source, special_tokens, _PROBE)


def _written(source: str, special_tokens: tuple[tuple[str, str], ...], content: object) -> str:
    messages = [{"role": "user", "content": content}]
    try:
        return compiled(source).render({**dict(special_tokens), "messages": messages, "tools": None})
    except Exception:  # it is a program, and may fail in any way
        return ""


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


class _Generation(Extension):
    """`{% generation %}`, which marks the assistant's words for training: what is inside stays. It is a scope of its
    own: variables that are set inside are not seen behind it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` in templates: what makes dictionaries, and no class with methods of its own."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` in templates: no names that begin with an underscore, which are Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no name for self: it may be one of kwargs
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no names that begin with an underscore, such as {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise Refusal(message)


def _strftime_now(format: str) -> str:  # noqa: A002 - templates may call it by this name
    return datetime.now().strftime(format)


def _tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter writes it for HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
