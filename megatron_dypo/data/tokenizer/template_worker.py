"""The process that runs chat templates: jinja2 in a sandbox, under limits of processor time and memory.

A template is a program that comes with a model. Jinja2's sandbox protects the machine, but does not prevent an endless
loop or a string of 10 GB. Either may be a single C call, which only the kernel can stop.
:mod:`megatron_dypo.data.tokenizer.template_process` starts the process, which imports only jinja2.

Protocol, over one :class:`multiprocessing.connection.Connection`: a request is a pickled tuple. ``(template, None)``
asks for the names that the template reads; ``(template, arguments)`` asks for the text that it writes. An answer is one
status byte, :data:`OK`, :data:`REFUSED` or :data:`FAILED`, and a text in UTF-8: what was asked for, or the reason.
"""

from __future__ import annotations

import functools
import json
import pickle
import resource
import signal
import sys
import traceback
from collections.abc import Mapping
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.meta
import jinja2.parser
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_LIMIT_S = 5
"""Seconds of processor time for one rendering; a real template takes less than a millisecond."""
MEMORY_LIMIT = 512 << 20
"""Bytes of memory for templates, in addition to the memory of the interpreter."""
TEXT_LIMIT = 16 << 20
"""Most bytes of the messages of one prompt; also the most bytes of one rendered text."""

OK, REFUSED, FAILED = b"+", b"!", b"-"
"""Status: the template succeeded; it called ``raise_exception``; it is not jinja2, or broke a rule or a limit."""

TEMPLATE_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, ImportError, LookupError, MemoryError),
    *(NameError, OSError, ReferenceError, RuntimeError, StopIteration, SyntaxError, SystemError, TypeError, ValueError),
    jinja2.TemplateError,
)
"""Exceptions that a template can raise: its expressions may call any method of a string, a number or a list."""


class Refusal(jinja2.TemplateError):
    """The error of a template that called ``raise_exception``: its author excluded these messages on purpose."""


class _GenerationBlock(Extension):
    """The block ``{% generation %}``. It marks assistant text for trainers that mask by template; it has no effect."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance attribute)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own tojson escapes characters for HTML, which a prompt does not want.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise Refusal(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    return _environment().from_string(template)


def variables(template: str) -> list[str]:
    """Return the names that ``template`` reads from its arguments, sorted, without those that every template has."""
    _compile(template)
    names = jinja2.meta.find_undeclared_variables(_environment().parse(template))
    return sorted(names - set(_environment().globals))


def answer(template: str, arguments: Mapping[str, Any] | None) -> bytes:
    """Return the answer to one request of the protocol above."""
    try:
        text = "\n".join(variables(template)) if arguments is None else _compile(template).render(**arguments)
        content = text.encode("utf-8", "surrogatepass")
    except Refusal as error:
        return REFUSED + str(error).encode("utf-8", "replace")
    except TEMPLATE_ERRORS as error:
        return FAILED + _reason(error).encode("utf-8", "replace")
    if len(content) > TEXT_LIMIT:
        return FAILED + f"writes {len(content)} bytes: a prompt may have at most {TEXT_LIMIT}".encode()
    return OK + content


def _reason(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"needs more than {MEMORY_LIMIT >> 20} MiB of memory"
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"is not valid jinja2: line {error.lineno}: {error.message}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    place = f"line {lines[-1]}: " if lines else ""
    return f"{place}{type(error).__name__}: {str(error)[:500]}"


def main() -> None:
    """Answer requests on the connection whose file descriptor is the first argument, until it is closed."""
    # These signals are meant for the trainer. This process ends when the trainer closes its end of the connection.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # SIGPROF enforces the time limit. The parent may have ignored or blocked it, and children inherit that.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory()
    connection = Connection(int(sys.argv[1]))
    while True:
        try:
            template, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        # SIGPROF ends the process, even in the middle of a C call.
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
        content = answer(template, arguments)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(content)


def _limit_memory() -> None:
    # The limit is on top of what is mapped already: a preloaded library may have mapped gigabytes.
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = mapped + MEMORY_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
