"""The metadata servers of two clouds, as far as they tell that a machine will be taken back, as their documents say."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta


class Metadata(http.server.ThreadingHTTPServer):
    """Announces nothing until `announce`; refuses who asks Amazon without a token of its own, or Google without its header."""

    seconds: int | None = None
    asked = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def announce(self, seconds: int) -> None:
        self.seconds = seconds


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Metadata

    def _answer(self, code: int, text: str = "") -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_PUT(self) -> None:
        known = (
            self.path == "/latest/api/token" and 1 <= int(self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", 0)) <= 21600
        )
        self._answer(200 if known else 400, "a token" if known else "")

    def do_GET(self) -> None:
        self.server.asked += 1
        seconds = self.server.seconds
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers.get("X-aws-ec2-metadata-token") != "a token":
                self._answer(401)
            elif seconds is None:
                self._answer(404)
            else:
                when = datetime.now(UTC) + timedelta(seconds=seconds)
                self._answer(200, json.dumps({"action": "terminate", "time": when.strftime("%Y-%m-%dT%H:%M:%SZ")}))
        elif self.path == "/computeMetadata/v1/instance/preempted":
            known = self.headers.get("Metadata-Flavor") == "Google"
            self._answer(200 if known else 403, "FALSE" if seconds is None else "TRUE")
        else:
            self._answer(404)

    def log_message(self, *words: object) -> None:
        """Nothing to the terminal."""


@contextmanager
def metadata_server() -> Iterator[Metadata]:
    """One on loopback."""
    with Metadata(("127.0.0.1", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
