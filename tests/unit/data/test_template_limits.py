"""Chat templates that fail, never end or eat memory: each is an error of the template, and the process goes on."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import select
import signal
import subprocess
import sys

import pytest

from megatron_dypo.data.tokenizer.chat import ChatTemplate
from megatron_dypo.data.tokenizer.template_process import TEMPLATES, TemplateError, TemplateProcess

USER = [{"role": "user", "content": "hello"}]
GOOD = "{% for m in messages %}{{ m.content }}{% endfor %}"


def _pid(process: TemplateProcess) -> int:
    assert process.pid is not None
    return process.pid


def _render(template: str) -> str:
    return ChatTemplate(template, {"bos_token": "<s>"}, "m/tokenizer_config.json").render(USER)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("a\n{{ 1 // 0 }}", "line 2: ZeroDivisionError"),
        ("{{ messages[0].no.name }}", "UndefinedError"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ messages[0].content.no() }}", "UndefinedError"),
        ("{{ 'x'.encode('no-such-codec') }}", "LookupError"),
        ("{{ 'abc'.index('d') }}", "ValueError: substring not found"),
        ("{{ messages.pop() }}", "SecurityError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "TypeError: no loader"),
        ("{{ cycler() }}", "RuntimeError"),
        ("{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}", "RecursionError"),
        ("{{ range(10 ** 9) | list }}", "OverflowError"),
        ("{{ 'x' * 10 ** 11 }}", "needs more than 512 MiB of memory"),
        ("{{ 'x' | center(10 ** 11) }}", "needs more than 512 MiB of memory"),
        ("{{ '%99999999999d' % 1 }}", "needs more than 512 MiB of memory"),
        (
            "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "needs more than 512 MiB of memory",
        ),
        ("{% for i in range(5) %}{{ messages[0].content * 2_000_000 }}{% endfor %}", "writes 50000000 bytes"),
        ("{{ no_such_function() }}", "UndefinedError"),
    ],
)
def test_a_template_that_fails_is_named_with_the_reason(template: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^m/tokenizer_config\.json: the chat template fails .*{reason}"):
        _render(template)
    assert _render(GOOD) == "hello"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if %}", "is not valid jinja2: line 1"),
        ("\n{{ 'x }}", "is not valid jinja2: line 2"),
        ("{% nonsense %}", "is not valid jinja2: line 1: Encountered unknown tag"),
        ("{{ x | nonsense }}", "No filter named 'nonsense'"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
        # Jinja2 accepts it, but the Python code that it generates has too many nested blocks.
        ("{% for m in messages %}" * 60 + "{% endfor %}" * 60, "SyntaxError"),
    ],
)
def test_a_template_that_does_not_compile_is_named_with_the_reason(template: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^m/tokenizer_config\.json: chat_template: .*{reason}"):
        _render(template)
    assert _render(GOOD) == "hello"


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ lipsum(n=10 ** 9) }}",
    ],
)
def test_a_template_without_end_is_ended(template: str) -> None:
    with pytest.raises(ValueError, match=r"takes more than 5 s of processor time|MiB of memory|ValueError"):
        _render(template)
    assert _render(GOOD) == "hello"


def test_a_template_without_end_is_ended_by_the_limit_of_processor_time() -> None:
    process = TemplateProcess()
    try:
        assert process.render(GOOD, {"messages": USER}) == "hello"
        # Send the kernel's signal at once. The slow tests wait for the limit itself, 5 s.
        os.kill(_pid(process), signal.SIGPROF)
        with pytest.raises(TemplateError, match="takes more than 5 s of processor time"):
            process.render(GOOD, {"messages": USER})
        assert process.render(GOOD, {"messages": USER}) == "hello"
    finally:
        process.close()


def test_a_process_that_somebody_killed_is_started_again() -> None:
    process = TemplateProcess()
    try:
        for _ in range(2):
            assert process.render(GOOD, {"messages": USER}) == "hello"
            os.kill(_pid(process), signal.SIGKILL)
        assert process.render(GOOD, {"messages": USER}) == "hello"
    finally:
        process.close()


def test_signals_for_the_trainer_do_not_end_the_process() -> None:
    process = TemplateProcess()
    try:
        assert process.render(GOOD, {"messages": USER}) == "hello"
        pid = _pid(process)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(pid, number)
            assert process.render(GOOD, {"messages": USER}) == "hello"
        assert _pid(process) == pid
    finally:
        process.close()


def test_the_process_ends_with_a_trainer_that_was_killed() -> None:
    program = (
        "import os, signal\n"
        "from megatron_dypo.data.tokenizer.template_process import TEMPLATES\n"
        "TEMPLATES.render('x', {})\n"
        "print(TEMPLATES.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    try:
        process = os.pidfd_open(int(done.stdout))
    except ProcessLookupError:
        return  # the process has ended already
    try:
        assert select.select([process], [], [], 30.0)[0], "the process goes on"
    finally:
        os.close(process)


def test_messages_over_the_limit_are_refused_before_they_are_sent() -> None:
    with pytest.raises(ValueError, match=r"fails on messages with roles \['user'\]: messages and template have 17"):
        ChatTemplate(GOOD, {}, "m").render([{"role": "user", "content": "x" * 17_000_000}])
    assert ChatTemplate(GOOD, {}, "m").render([{"role": "user", "content": "x" * 16_000_000}]) == "x" * 16_000_000


def test_threads_share_the_process() -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: TEMPLATES.render(GOOD, {"messages": [{"content": str(i)}]}), range(200)))
    assert texts == [str(i) for i in range(200)]


def test_a_forked_process_renders_too() -> None:
    assert _render(GOOD) == "hello"
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_render, [GOOD] * 4) == ["hello"] * 4
    assert _render(GOOD) == "hello"


def test_a_lone_surrogate_passes_through_the_process() -> None:
    assert TEMPLATES.render(GOOD, {"messages": [{"content": "\ud83d"}]}) == "\ud83d"


def test_a_template_that_loses_the_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="does not write the text of a user's message"):
        ChatTemplate("{{ bos_token }}<|im_start|>", {}, "m/chat_template.jinja").turns()
