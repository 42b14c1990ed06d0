"""What is told to MLflow: in order, by a thread, and kept while a server does not answer.

MLflow's own asynchronous logging gives up what it could not send. Here nothing is given up but what a server refuses, and
files that it fails at again and again while it answers: a stage
never waits for its server while it computes, and what is left at its end is written to a file, which the next job sends.
"""

import contextlib
import json
import math
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping
from typing import Any

from dmat_ray.cluster.mlflow_client import answering_client, reason_of, status_of
from dmat_ray.errors import StorageError, UserError
from dmat_ray.storage import OF_THE_FILE, Location
from dmat_ray.storage.files import text_digest
from dmat_ray.storage.folders import fetched
from dmat_ray.wording import number_of

KEY = "dmat_ray.key"
PARENT = "mlflow.parentRunId"
EPOCH = "epoch"  # a metric of trainings
FRONT = "pareto_front"  # a tag of trials and of models
KINDS = {"create", "metrics", "artifact", "text", "tag", "register", "finish"}
STORED = {"artifact", "text"}  # what goes to a store of artifacts, by way of packages whose errors are their own
PAUSES_S = (0.5, 1, 2, 5, 10)
TRIES = 20  # of what may pass or not: about three minutes, of one job or of several
Entry = dict[str, Any]


class Outbox:
    """The entries for one tracking server (or database), which wait in `folder` if a job ends before they are sent.

    An entry is JSON: {"do": one of KINDS, "run": a handle, ...}. A handle is ours, so that a run can be written to
    before the server has made it. Raises UserError if the server does not answer at the start, or the database cannot be opened.
    """

    def __init__(self, uri: str, folder: Location, patience_s: float) -> None:
        self.uri, self.patience_s = uri, patience_s
        # of this server: the ids in them are nobody else's
        self._folder, self._name = folder, f"mlflow_unsent_{text_digest(uri)[:8]}"
        self._client = answering_client(uri, folder)
        # of earlier jobs; later of this one. Each is written once, by one process, so that who has sent all of it may remove it:
        # of two jobs at a time both may send it, and neither loses what the other has kept
        self._files = [f for f in folder.files() if f.name.startswith(self._name) and f.name.endswith(".jsonl")]
        self._entries: deque[Entry] = deque(entry for file in self._files for entry in _read(file))
        self._ids: dict[str, str] = {}
        self._epochs: dict[str, float] = {}  # the last that the server has of runs that were opened again
        self._change = threading.Condition()
        self._down_since: float | None = None
        threading.Thread(target=self._work, daemon=True, name="mlflow outbox").start()

    def put(self, entry: Entry) -> None:
        """Send `entry` after all that were put before it; returns at once."""
        with self._change:
            self._entries.append(entry)
            self._change.notify_all()

    def flush(self) -> None:
        """Wait until all is sent, or the server has not answered for `patience_s`; then keep what is left in a file."""
        with self._change:
            while self._entries and not self._given_up():
                self._change.wait(timeout=0.2)
            if not self._entries:
                return
            left = [
                {**entry, "id": self._ids.get(entry["run"]), "parent_id": self._ids.get(entry.get("parent") or "")}
                for entry in self._entries
            ]
            file = self._folder / f"{self._name}_{uuid.uuid4().hex[:12]}.jsonl"
            try:
                file.write_bytes("".join(json.dumps(entry) + "\n" for entry in left).encode())
            except (OSError, StorageError) as error:
                _warn(f"{len(left)} entries for MLflow cannot be kept in '{file}': {error}")
                return
            self._remove_files()  # what they held and was not sent stands in the new one
            self._files = [file]
        _warn(f"{len(left)} entries for MLflow are kept in '{file}'; the next job with this output sends them")

    def id_of(self, run: str) -> str:
        """The server's id of a run. Raises UserError if it has not answered for `patience_s`, or refused to make it."""
        with self._change:
            while run not in self._ids:
                if self._given_up() or not self._entries:
                    said = "refused to make the run" if not self._entries else "does not answer"
                    raise UserError(f"MLflow at '{self.uri}' {said}, and this needs it")
                self._change.wait(timeout=0.2)
            return self._ids[run]

    def _remove_files(self) -> None:
        for file in self._files:
            with contextlib.suppress(OSError, StorageError):
                file.unlink()
        self._files = []

    def _given_up(self) -> bool:
        return self._down_since is not None and time.monotonic() - self._down_since > self.patience_s

    def _work(self) -> None:
        failures = 0
        while True:
            with self._change:
                while not self._entries:
                    self._change.wait()
                entry = self._entries[0]
            answers = True
            try:
                self._send(entry)
            except Exception as error:  # nothing that happens here may end a training
                refused, tries = _refused(entry, error), entry.get("tries", 0)
                if refused is None and _is_unable(error) and not self._answers_otherwise(entry):
                    refused = False  # what stands before a server that is not there says the same as one that cannot do this
                if refused is None:
                    tries += 1
                    with self._change:
                        entry["tries"] = tries  # which the next job goes on with
                if not refused and tries < TRIES:
                    if failures == 0:
                        self._down_since = time.monotonic()
                        _warn(f"MLflow at '{self.uri}' does not answer ({reason_of(error)}); going on, and sending later")
                    time.sleep(PAUSES_S[min(failures, len(PAUSES_S) - 1)])
                    failures += 1
                    continue
                after = "" if refused else f" after {tries} tries"
                _warn(f"MLflow refuses an entry ({entry['do']}), which is left out{after}: {reason_of(error)}")
                answers = bool(refused)
            if failures and answers:
                _warn(f"MLflow at '{self.uri}' answers again; sending what was kept")
            failures, self._down_since = 0, None
            with self._change:
                self._entries.popleft()
                if not self._entries:
                    self._remove_files()
                self._change.notify_all()

    def _answers_otherwise(self, entry: Entry) -> bool:
        """Whether a server that cannot take this entry can do other things, so that it would hold up the rest for nothing.

        Only of files: a server, or a database, that is full or locked takes nothing else either, and is still read.
        """
        return entry["do"] in STORED and self._answers()

    def _answers(self) -> bool:
        """Whether the server does something small."""
        try:
            self._client.search_experiments(max_results=1)
        except Exception:  # of as many kinds as at the start
            return False
        return True

    def _send(self, entry: Entry) -> None:
        if entry.get("id"):
            self._ids.setdefault(entry["run"], entry["id"])
        if entry["do"] == "create":
            if entry["run"] not in self._ids:
                found = self._create(entry)
                with self._change:
                    self._ids[entry["run"]] = found
        elif entry["run"] in self._ids:  # else the run was refused, which has been said
            getattr(self, f"_{entry['do']}")(self._ids[entry["run"]], entry)

    def _create(self, entry: Entry) -> str:
        """A run of its key that is unfinished, or a new one: sent twice it is made once."""
        from mlflow.entities import Param

        place = self._experiment(entry["experiment"], entry["artifacts"])
        wanted = f"tags.`{KEY}` = '{entry['key']}'" + ("" if entry.get("reopen") else " and attributes.status != 'FINISHED'")
        found = self._client.search_runs([place], filter_string=wanted, max_results=1)
        if found:
            run_id = str(found[0].info.run_id)
            if found[0].info.status != "FINISHED":
                self._client.update_run(run_id, status="RUNNING")
            self._epochs[run_id] = found[0].data.metrics.get(EPOCH, -1.0)
            there = found[0].data.params  # which cannot be changed, though some may differ, such as a budget or the workers
        else:
            there = {}
            parent = entry.get("parent_id") or self._ids.get(entry["parent"] or "")
            # tags with the run itself: a kill right after it must not leave one that is never found again
            tags = {KEY: entry["key"], **entry["tags"], **({PARENT: parent} if parent else {})}
            made = self._client.create_run(place, tags=tags, run_name=entry["name"], start_time=entry["time"])
            run_id = str(made.info.run_id)
        params = [Param(key, value) for key, value in entry["params"].items() if key not in there]
        refusals = [r for start in range(0, len(params), 100) for r in self._refusals(run_id, entry, params[start : start + 100])]
        if refusals:  # which must not cost the run
            what = number_of(len(refusals), "setting")
            _warn(f"MLflow refuses {what} of the run '{entry['name']}', left out of its params: {reason_of(refusals[0])}")
        return run_id

    def _refusals(self, run_id: str, entry: Entry, params: list[Any]) -> list[Exception]:
        """Log params, of which MLflow takes all or none; returns why those are refused that are, one by one."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.log_batch(run_id, params=params)
        except MlflowException as error:
            if not _refused(entry, error):
                raise
            return [r for one in params for r in self._refusals(run_id, entry, [one])] if len(params) > 1 else [error]
        return []

    def _experiment(self, name: str, artifacts: str | None) -> str:
        """The id of an experiment, which is made if it is not there; another job may make it at the same time."""
        from mlflow.exceptions import MlflowException

        if found := self._client.get_experiment_by_name(name):
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name, artifact_location=artifacts))
        except MlflowException:
            if found := self._client.get_experiment_by_name(name):
                return str(found.experiment_id)
            raise

    def _metrics(self, run_id: str, entry: Entry) -> None:
        from mlflow.entities import Metric

        values: Mapping[str, float] = entry["values"]
        if values.get(EPOCH, math.inf) <= self._epochs.get(run_id, -1.0):
            return  # told again by a training that was killed and goes on
        self._client.log_batch(run_id, metrics=[Metric(k, v, entry["time"], entry["step"]) for k, v in values.items()])

    def _artifact(self, run_id: str, entry: Entry) -> None:
        try:
            path = fetched(entry["path"])
        except StorageError as error:  # no refusal of MLflow's
            raise OSError(str(error)) from None
        if path.is_dir():
            self._client.log_artifacts(run_id, str(path), entry["folder"])
        else:
            self._client.log_artifact(run_id, str(path), entry["folder"])

    def _text(self, run_id: str, entry: Entry) -> None:
        self._client.log_text(run_id, entry["content"], entry["name"])

    def _tag(self, run_id: str, entry: Entry) -> None:
        self._client.set_tag(run_id, entry["key"], entry["value"])

    def _register(self, run_id: str, entry: Entry) -> None:
        from mlflow.exceptions import MlflowException

        with contextlib.suppress(MlflowException):  # it is there
            self._client.create_registered_model(entry["model"])
        ours = [v for v in self._client.search_model_versions(f"run_id = '{run_id}'") if v.name == entry["model"]]
        source = f"{self._client.get_run(run_id).info.artifact_uri}/{entry['folder']}"
        version = ours[0] if ours else self._client.create_model_version(entry["model"], source, run_id)
        for key, value in entry["tags"].items():
            self._client.set_model_version_tag(entry["model"], version.version, key, value)
        for alias in entry["aliases"]:
            self._client.set_registered_model_alias(entry["model"], alias, version.version)
        among = {self._ids.get(handle) for handle in entry["among"]}
        for other in self._client.search_model_versions(f"name = '{entry['model']}'") if among and None not in among else ():
            if other.run_id not in among:
                self._client.set_model_version_tag(entry["model"], other.version, FRONT, "false")

    def _finish(self, run_id: str, entry: Entry) -> None:
        if entry.get("if_open") and self._client.get_run(run_id).info.status != "RUNNING":
            return
        self._client.set_terminated(run_id, entry["status"], end_time=entry["time"])


def new_handle() -> str:
    """A handle for a run that is about to be made."""
    return uuid.uuid4().hex


def now_ms() -> int:
    """Milliseconds since the epoch, as MLflow counts."""
    return time.time_ns() // 1_000_000


def _refused(entry: Entry, error: Exception) -> bool | None:
    """Whether sending it again can only fail again; None if that cannot be told."""
    status = status_of(error)
    if status is not None:
        if _is_unable(error):
            return None
        return 400 <= status < 500 and status not in (401, 408, 429)  # a password may be renewed
    if isinstance(error, FileNotFoundError | ImportError):  # of a package for the store of artifacts
        return True
    if isinstance(error, OSError):
        return None if error.errno in OF_THE_FILE else False  # a folder of artifacts that nobody may write to, e.g.
    return None if entry["do"] in STORED else True  # boto3's errors are no OSErrors, whatever they are of


def _is_unable(error: Exception) -> bool:
    """Whether a server, or what stands before it, has said that it cannot; MLflow's client says so of one that is silent, too."""
    return (status_of(error) or 0) >= 500


def _read(file: Location) -> list[Entry]:
    """What an earlier job could not send; a damaged line is left out and told."""
    entries: list[Entry] = []
    try:
        lines = file.read_bytes().decode().splitlines()
    except FileNotFoundError:
        return []  # another job has meanwhile sent it
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and entry.get("do") in KINDS and isinstance(entry.get("run"), str):
            entries.append(entry)
        else:
            _warn(f"a line of '{file}' is damaged and left out")
    return entries


def _warn(text: str) -> None:
    # a terminal that is gone, or a pipe that nobody reads, must not end the thread that sends: a job would wait for it for ever
    with contextlib.suppress(OSError, ValueError):
        print(f"warning: {text}", file=sys.stderr, flush=True)
