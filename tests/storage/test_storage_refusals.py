"""What is told of a folder or a store that refuses, or is not there."""

import contextlib
import http.server
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3

from dmat_ray.errors import StorageError
from dmat_ray.models import checkpoint
from dmat_ray.storage import at


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Server]:
    with s3.serving(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def closed_folder() -> Iterator[Path]:
    """A folder of another user's, while this process is nobody; what is opened here may be opened by anyone."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        (root / "closed").mkdir()
        (root / "closed/x").write_text("x")
        (root / "closed/x").chmod(0)
        (root / "closed").chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield root / "closed"
        finally:
            os.seteuid(user)
            (root / "closed").chmod(0o700)


def test_permission_denied(closed_folder: Path) -> None:
    folder, file = at(closed_folder), at(closed_folder) / "x"
    for refused in (file.is_file, file.read_bytes, file.open, folder.files, folder.tree, folder.parent.tree, file.unlink):
        with pytest.raises(PermissionError, match="closed"):
            refused()
    for write in (file.write_bytes, file.create_bytes):
        with pytest.raises(PermissionError, match=r"/x'$"):
            write(b"x")


def test_a_store_that_does_not_know_us(server: s3.Server) -> None:
    server.put("closed", {"x": b"x"})
    folder, file = at("s3://closed"), at("s3://closed/x")
    with s3.environment(AWS_ACCESS_KEY_ID="stranger"), server.asking_for_credentials():
        for read in (file.read_bytes, file.open):
            with pytest.raises(PermissionError, match="s3://closed/x"):
                read()
        for refused, done in ((file.is_file, "looked at"), (folder.files, "listed"), (folder.tree, "listed")):
            with pytest.raises(StorageError, match=f"'s3://closed.*' cannot be {done}: .*AWS_ACCESS_KEY_ID"):
                refused()
        with pytest.raises(StorageError, match=r"'s3://closed/x' cannot be written: the store does not know the key"):
            file.write_bytes(b"y")
    assert file.read_bytes() == b"x"


@pytest.fixture
def refusing() -> Iterator[list[Any]]:
    """A store that answers everything with one of Amazon's documented errors: a status and a code, to be set."""
    answer: list[Any] = [400, ""]

    class Handler(http.server.BaseHTTPRequestHandler):
        def refuse(self) -> None:
            body = f"<Error><Code>{answer[1]}</Code><Message>.</Message><RequestId>A</RequestId></Error>".encode()
            self.send_response(answer[0])
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_POST = refuse

        def log_message(self, *words: object) -> None:
            """Nothing to the terminal."""

    store = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=store.serve_forever, daemon=True).start()
    with s3.environment(**s3.KEYS, **s3.OTHERS, AWS_ENDPOINT_URL=f"http://127.0.0.1:{store.server_port}"):
        yield answer
    store.shutdown()
    store.server_close()


@pytest.mark.slow
def test_credentials_that_have_expired_and_a_clock_that_is_wrong(refusing: list[Any]) -> None:
    """The codes are those of Amazon's list of error responses; an answer to HEAD has no body that could hold one."""
    file = at("s3://bucket/x")
    refusing[:] = [400, "ExpiredToken"]
    with s3.asked_once():
        for act in (file.parent.files, lambda: file.write_bytes(b"x")):
            with pytest.raises(StorageError, match="the credentials have expired; renew what AWS_SESSION_TOKEN"):
                act()
        for act in (file.read_bytes, file.is_file):
            with pytest.raises(StorageError, match="as it does when credentials have expired"):
                act()
        refusing[:] = [403, "RequestTimeTooSkewed"]
        with pytest.raises(StorageError, match="the clock of this machine is wrong"):
            file.parent.files()


def test_a_bucket_that_is_not_there(server: s3.Server) -> None:
    absent = at("s3://absent-bucket/x")
    with pytest.raises(StorageError, match="'s3://absent-bucket/x' cannot be written: there is no bucket 'absent-bucket'"):
        absent.write_bytes(b"x")
    with pytest.raises(FileNotFoundError):
        absent.read_bytes()
    assert (absent.is_file(), absent.files(), absent.parent.is_dir()) == (False, [], False)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_store_that_is_not_there(server: s3.Server) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with s3.environment(AWS_ENDPOINT_URL=url):
            file = at("s3://bucket/x")
            # neither is what lies there said to be damaged, nor to be missing
            for use, done, attempts in (
                (file.read_bytes, "read", contextlib.nullcontext()),
                (file.parent.tree, "listed", s3.asked_once()),
                (lambda: checkpoint.newest_of(["s3://bucket/checkpoint_1"], "run.json", print), "looked at", s3.asked_once()),
            ):
                told_so = pytest.raises(
                    StorageError, match=f"'s3://bucket.*' cannot be {done}: {url} cannot be reached .*connect"
                )
                with attempts, told_so as told:
                    use()
                assert "\n" not in str(told.value)
