"""An S3 server on this machine (moto) in a process of its own, and the environment in which every S3 client finds it.

    with s3.serving(folder) as server:      # AWS_ENDPOINT_URL and credentials are set, and restored at the end
        server.put("photos", {"a/1.png": content})

Run as a program it is the server: `python tests/s3.py LOG` prints its port and appends a line for every request to LOG.
"""

import contextlib
import functools
import os
import secrets
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEYS = {"AWS_ACCESS_KEY_ID": "root", "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20), "AWS_DEFAULT_REGION": "us-east-1"}
# what a developer's machine may have set, and nothing that waits for a cloud's metadata server
OTHERS = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
UNSET = ("AWS_PROFILE", "AWS_REGION", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "HTTP_PROXY", "http_proxy")


@contextlib.contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Sets these variables (None: removes), and puts back what was there."""
    before = {name: os.environ.get(name) for name in values}

    def put(settings: dict[str, str | None]) -> None:
        for name, value in settings.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(values)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def asked_once() -> Iterator[None]:
    """One attempt where there are four: at a store that does not answer those take seconds."""
    from dmat_ray.storage import object_store  # not at the top: the server needs none of it

    before = object_store.ATTEMPTS
    object_store.ATTEMPTS = 1
    object_store._made.cache_clear()
    try:
        yield
    finally:
        object_store.ATTEMPTS = before
        object_store._made.cache_clear()


@functools.cache
def _client(service: str, url: str) -> Any:
    import boto3

    return boto3.client(service, endpoint_url=url)


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    log: Path

    def client(self, service: str = "s3") -> Any:
        """boto3's client, a reader and writer that is not ours."""
        return _client(service, self.url)

    def put(self, bucket: str, objects: dict[str, bytes]) -> None:
        """A new bucket with these objects, by key."""
        client = self.client()
        client.create_bucket(Bucket=bucket)
        for key, content in objects.items():
            client.put_object(Bucket=bucket, Key=key, Body=content)

    def requests(self) -> list[str]:
        """'METHOD path?query RANGE' of every request so far."""
        return self.log.read_text().splitlines()

    @contextlib.contextmanager
    def asking_for_credentials(self) -> Iterator[None]:
        """Inside, every request needs a key that the server's IAM knows, and a policy that allows it."""
        self._post("moto-api/reset-auth", b"0")
        try:
            yield
        finally:
            self._post("moto-api/reset-auth", b"inf")

    def _post(self, path: str, content: bytes) -> None:
        headers = {"Content-Type": "text/plain"}  # a form's content would be taken apart
        request = urllib.request.Request(f"{self.url}/{path}", content, headers, method="POST")
        urllib.request.urlopen(request, timeout=60).close()


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server with nothing in it, whose log lies in `folder`; this process's environment leads to it."""
    log = folder / "requests.txt"
    log.touch()
    process = subprocess.Popen([sys.executable, __file__, str(log)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port, "the server has not started"
        url = f"http://127.0.0.1:{port}"
        with environment(AWS_ENDPOINT_URL=url, **KEYS, **OTHERS, **dict.fromkeys(UNSET)):
            yield Server(url, log)
    finally:
        process.kill()
        process.wait()


def main(log: Path) -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, type: str, message: str, *args: object) -> None:
            pass

    app = DomainDispatcherApplication(create_backend_app)

    def logged(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with log.open("a") as file:
            file.write(f"{environ['REQUEST_METHOD']} {environ['REQUEST_URI']} {environ.get('HTTP_RANGE', '')}".rstrip() + "\n")
        answer: Iterable[bytes] = app(environ, start_response)
        return answer

    server = make_server("127.0.0.1", 0, logged, threaded=True, request_handler=Quiet)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
