"""vLLM's control side and completions, as far as a swap and a client use them, in one process.

    python engine.py HOME SOCKET ANCHOR_DIGEST

It serves what serving.json names when it starts. Its answers are the digest of its weights and a
solution; HOME/planted.json ({"digest", "fault": reward | errors | latency}) spoils those of one.
Where HOME/plan.json names one of its moments, it sends the signal to whoever asked, which the
kernel names: so a controller is killed or stopped in the middle of a reload, and knows nothing.
"""

import json
import os
import socket
import struct
import sys
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

HOME, SOCKET, ANCHOR = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
STATE = {"paused": False, "weights": "", "served": "start", "root": ""}


def digest_in(directory: str) -> str:
    name = Path(directory).name
    return name if len(name) == 64 else ANCHOR


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def moment(self, name: str) -> None:
        """Signal the caller if the plan says so."""
        try:
            plan = json.loads((HOME / "plan.json").read_text())
        except (FileNotFoundError, ValueError):
            return
        size = struct.calcsize("3i")
        told = self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        pid = struct.unpack("3i", told)[0]
        if plan["point"] == f"engine:{name}" and plan["pid"] == pid:
            (HOME / "plan.json").unlink()
            os.kill(pid, plan["signal"])

    def answer(self, told: object) -> None:
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.act({})

    def do_POST(self) -> None:
        self.act(json.loads(self.rfile.read(int(self.headers["content-length"] or 0)) or b"{}"))

    def act(self, body: dict) -> None:
        path = urlsplit(self.path).path
        self.moment(f"{path}:before")
        try:
            told = self.effect(path, body)
        except RuntimeError:
            self.send_response(500)
            self.send_header("content-length", "0")
            self.end_headers()
            return
        self.moment(f"{path}:after")
        with suppress(OSError):  # whoever asked may be dead
            self.answer(told)

    def effect(self, path: str, body: dict) -> object:
        if path == "/pause":
            STATE["paused"] = True
        elif path == "/resume":
            STATE["paused"] = False
        elif path == "/is_paused":
            return {"is_paused": STATE["paused"]}
        elif path == "/collective_rpc" and body["method"] == "anchorage_load":
            return self.load(body["args"][0])
        elif path == "/collective_rpc":
            return {"results": [{"served": STATE["served"]}]}
        elif path == "/tokenize":
            return {"tokens": [1, 2]}
        elif path == "/v1/models":
            return {"data": [{"id": "m", "root": STATE["root"]}]}
        elif path == "/v1/completions":
            table = {f"token_id:{k}": -1.0 - int(STATE["weights"][k], 16) / 16 for k in range(5)}
            logprobs = {"top_logprobs": [table]}
            return {
                "choices": [{"index": i, "logprobs": logprobs} for i in range(len(body["prompt"]))]
            }
        elif path == "/v1/chat/completions":
            message = {"role": "assistant", "content": self.solution()}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            about = {"id": "x", "object": "chat.completion", "created": 1, "model": "m"}
            return about | {"choices": [choice], "usage": usage}
        return {}

    def solution(self) -> str:
        """What a client is answered."""
        try:
            planted = json.loads((HOME / "planted.json").read_text())
        except FileNotFoundError:
            planted = {"digest": None, "fault": ""}
        fault = planted["fault"] if planted["digest"] == STATE["weights"] else ""
        if fault == "errors":
            raise RuntimeError("planted")
        time.sleep(0.5 if fault == "latency" else 0.0)
        return f"{STATE['weights']}\n#### {8 if fault == 'reward' else 7}"

    def load(self, directory: str) -> object:
        STATE["weights"] = STATE["served"] = "f" * 64  # half loaded: nobody's weights
        self.moment("load:mid")
        time.sleep(0.02)
        STATE["weights"] = STATE["served"] = digest_in(directory)
        return {"results": [{"digest": STATE["weights"]}]}

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    address_family = socket.AF_UNIX
    daemon_threads = True

    def server_bind(self) -> None:
        SOCKET.unlink(missing_ok=True)
        self.socket.bind(str(SOCKET))


STATE["root"] = json.loads((HOME / "serving.json").read_text())["directory"]
STATE["weights"] = digest_in(STATE["root"])
Server(SOCKET.name, Handler).serve_forever()
