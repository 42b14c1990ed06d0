"""MLflow's client for an address, and the database that an output folder has where no address is given.

MLflow makes that by some forty migrations in the file itself, and with one that was left halfway it can neither go on nor begin
anew. So here it appears whole or not at all.
"""

import contextlib
import logging
import os
import shlex
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dmat_ray.errors import UserError
from dmat_ray.storage import DATABASE
from dmat_ray.storage.files import sync
from dmat_ray.storage.location import NO_LINKS, Location

if TYPE_CHECKING:
    from mlflow import MlflowClient

BUSY = ("locked", "unable to open", "disk i/o", "disk is full", "readonly")  # sqlite's words for what passes or can be freed
OLD_S = 3600.0  # since somebody was at work on a database, after which he is taken to have been killed


def answering_client(uri: str, folder: Location) -> "MlflowClient":
    """The client for `uri`, which has answered; if that is the database of the output `folder`, it is made if it is not there.

    Raises UserError if it cannot be made or opened, and if a server does not answer.
    """
    # its retries would hold the thread for minutes; ours go on for as long as the job does
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for chatty in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    from mlflow import MlflowClient

    own = Path(str(folder / DATABASE)) if uri == f"sqlite:///{folder / DATABASE}" else None
    if own is not None:
        _require_made(own)
    try:
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # of many kinds, by the sort of place
        raise UserError(_refusal(uri, own, error)) from error
    return client


def _refusal(uri: str, own: Path | None, error: Exception) -> str:
    from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

    if "mlflow db upgrade" in str(error):
        place = f"'{own}'" if own is not None else f"the database at tracking.uri '{uri}'"
        return (
            f"{place} has the tables of another version of MLflow; copy it, then: python -m mlflow db upgrade {shlex.quote(uri)}"
        )
    if own is not None and any(word in str(error).lower() for word in BUSY):
        return (
            f"MLflow's database '{own}' does not answer: {reason_of(error)}; another process may hold it, or its disk "
            "may be full or not to be written to"
        )
    if own is not None:
        return (
            f"'{own}' cannot be opened as MLflow's database: {reason_of(error)}; results are not in it: move it away, and a new "
            "one is made"
        )
    if "Invalid Host header" in str(error):
        host = urlsplit(uri).netloc.rpartition("@")[2]
        return (
            f"MLflow at tracking.uri '{uri}' answers under other names only: start it with --allowed-hosts {host} and "
            "every other name of its, by commas"
        )
    if status_of(error) in (401, 403):
        return (
            f"MLflow at tracking.uri '{uri}' does not let us in: {reason_of(error)}; give MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD in the environment"
        )
    if isinstance(error, UnsupportedModelRegistryStoreURIException) or "filesystem tracking backend" in str(error):
        return (
            f"tracking.uri '{uri}' is no address of an MLflow; write http://HOST:PORT of a server, sqlite:////FOLDER/mlflow.db "
            "of a database, or --tracking.uri null: then runs are kept in the output folder"
        )
    return (
        f"MLflow at tracking.uri '{uri}' does not answer: {reason_of(error)}; start it, correct the address, or give "
        "--tracking.uri null: then runs are kept in the output folder"
    )


def _require_made(database: Path) -> None:
    """Make the database if it is not there; of several processes one succeeds, and the others use what it has made."""
    for left in database.parent.glob(f".{DATABASE}.*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > OLD_S:
                left.unlink()
    if database.exists():
        return
    try:
        _make(database)
    except Exception as error:  # SQLAlchemy's, alembic's, MLflow's and the system's
        raise UserError(
            f"MLflow's database '{database}' cannot be made: {reason_of(error)}; give an --output that may be written to, where "
            "there is space, or the address of an MLflow server as --tracking.uri"
        ) from error


def _make(database: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    partial = database.with_name(f".{DATABASE}.{uuid.uuid4().hex}")
    try:
        SqlAlchemyStore(f"sqlite:///{partial}", str(database.with_name("mlartifacts"))).engine.dispose()
        try:
            os.link(partial, database)
        except FileExistsError:
            return  # somebody was faster
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if not database.exists():
                partial.rename(database)
        sync(database.parent)
    finally:
        for left in database.parent.glob(f"{partial.name}*"):  # with sqlite's journal
            left.unlink(missing_ok=True)


def status_of(error: Exception) -> int | None:
    """Of HTTP, of what MLflow's server or a store of artifacts has answered; None if nobody has."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return int(error.get_http_status_code())
    return getattr(getattr(error, "response", None), "status_code", None)


def reason_of(error: Exception) -> str:
    """What an error says, in one line of 300 characters at most."""
    return " ".join(str(error).split())[:300] or type(error).__name__
