"""Start a run, and let another host try all its ports: ``python -m … CONFIG OVERRIDES…``, below two_hosts.sh.

It prints a JSON object: ``listening``, the [address, port] at which the processes of the run listen; ``answers``, port
→ the beginning of the answer that the other host got; ``witness``, the answer of a server that anybody may use.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import psutil
import yaml

from tests.support.e2e.commands import finished, start, steps_of, wait_until
from tests.support.strangers import listening

HERE = "10.77.0.1"


def ask_from_the_other_host(ports: list[int]) -> dict[str, str | None]:
    """Return the answers that the other host gets at the ports of this one."""
    enter = ["nsenter", "--target", os.environ["OTHER_HOST"], "--net"]
    command = [*enter, sys.executable, "-m", "tests.support.strangers", HERE, *map(str, ports)]
    answers: dict[str, str | None] = json.loads(subprocess.check_output(command, timeout=600))
    return answers


def witness() -> str | None:
    """Return the answer of a server that listens on all addresses and asks for no key."""
    server = HTTPServer(("", 0), BaseHTTPRequestHandler)
    Thread(target=server.serve_forever, daemon=True).start()
    (answer,) = ask_from_the_other_host([server.server_port]).values()
    server.shutdown()
    return answer


def main() -> None:
    config = Path(sys.argv[1])
    process = start("train", config, *sys.argv[2:])
    run_dir = Path(yaml.safe_load(config.read_text())["run"]["dir"])
    wait_until(process, lambda: 1 in steps_of(run_dir))
    root = psutil.Process(process.pid)
    found = sorted(listening(root, *root.children(recursive=True)))
    answers = ask_from_the_other_host([port for _, port in found])
    process.send_signal(signal.SIGINT)
    finished(process, status=75)
    print(json.dumps({"listening": found, "answers": answers, "witness": witness()}))


if __name__ == "__main__":
    main()
