#!/usr/bin/env python3
"""`epd-serve` of the stand-in image: every role starts at once and answers its version, where the real one loads vLLM.

It takes the image's place where the way of an image to a host is tested, not what the image computes.
"""

import json
import os
import sys
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PORT = int(os.environ.get("EPD_PORT", "8000"))


class Handler(BaseHTTPRequestHandler):
    """Answers as a vLLM instance would."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._send({"object": "list", "data": [{"id": "stand-in", "object": "model"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        message = {"role": "assistant", "content": os.environ["STAND_IN_VERSION"]}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        self._send({"id": "1", "object": "chat.completion", "model": "stand-in", "choices": [choice], "usage": usage})

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if sys.argv[1:] == ["health"]:
    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=5)
else:
    ThreadingHTTPServer(("0.0.0.0", PORT), Handler).serve_forever()
