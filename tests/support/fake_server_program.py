"""A program that takes a server's command line and serves its health endpoints; run under the guard by tests.

The environment sets its behaviour: FAKE_SERVER=ok, =dies (right after writing a line to its log), =second-dies (server
1 does, server 0 does not), =dies-once (each does at its first start only), =second-waits (server 1
serves once there is a file ``go`` in the folder of logs), =stubborn (it ignores SIGTERM, and so does
its child), =part (it knows /health alone, as the second node of a server on two nodes does), =tempered (its log-probs
depend on the temperature).
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

KEY_FILE = Path(sys.argv[sys.argv.index("--config") + 1])
KEY_LINE = KEY_FILE.read_text()
KEY = KEY_LINE.removeprefix('api-key: "').removesuffix('"\n')
HOW = os.environ.get("FAKE_SERVER", "ok")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        allowed = self.path == "/health" or self.headers["Authorization"] == f"Bearer {KEY}"
        known = self.path == "/health" or HOW != "part"
        self.send_response((200 if allowed else 401) if known else 404)
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        scale = body["sampling_params"]["temperature"] if HOW == "tempered" else 1.0
        rows = [[-token / scale, token, None] for token in body["token_ids_logprob"]]
        self.do_GET()
        self.wfile.write(json.dumps({"meta_info": {"output_token_ids_logprobs": [rows]}}).encode())


print(f"server_args={{'api_key': '{KEY}'}}", flush=True)
PORT = int(sys.argv[sys.argv.index("--port") + 1])
HAS_DIED = KEY_FILE.with_name(f"died-{PORT}")
if HOW == "dies" or (HOW == "second-dies" and "_1." in KEY_FILE.name) or (HOW == "dies-once" and not HAS_DIED.exists()):
    HAS_DIED.touch()
    print("CUDA out of luck", flush=True)
    sys.exit(3)
while HOW == "second-waits" and "_1." in KEY_FILE.name and not KEY_FILE.with_name("go").exists():
    time.sleep(0.1)
if HOW == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # SIG_IGN is inherited
HTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
