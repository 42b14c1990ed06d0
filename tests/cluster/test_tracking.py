"""Tracking with a real MLflow server that is killed and comes again: nothing waits for it, and nothing is lost."""

import contextlib
import io
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as Found
from small import MlflowServer, free_ports, settings

from dmat_ray.cluster import encoder, gan, one_training, session, tracking, train, workers
from dmat_ray.cluster.outbox import Outbox
from dmat_ray.errors import UserError
from dmat_ray.manifold.gan_images import ImageCache
from dmat_ray.storage import at

pytestmark = pytest.mark.cluster
UNSENT = "mlflow_unsent_*.jsonl"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


def runs(server: MlflowServer, experiment: str) -> dict[str, Found]:
    """By name."""
    client = MlflowClient(server.url)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert len({run.info.run_name for run in found}) == len(found), "none is there twice"
    return {run.info.run_name: run for run in found}


def values(server: MlflowServer, run: Found, metric: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in MlflowClient(server.url).get_metric_history(run.info.run_id, metric)]


JOB = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from small import settings
from dmat_ray.cluster import tracking

tracked = ["--tracking.uri", sys.argv[3], "--tracking.experiment", "ended", "--tracking.patience_s", "1"]
config = settings(Path(sys.argv[2]), *tracked)
with tracking.tracked(config, sys.argv[4], "train") as run:
    print(run.id, flush=True)
    sys.stdin.readline()
    tracking.open_run(config, sys.argv[4] + "s child", "trial", run).finish("FINISHED")
    run.metrics({"loss": 0.5}, step=7)
"""


def job(name: str, output: Path, server: MlflowServer) -> "subprocess.Popen[str]":
    """A process that logs what it has to log when a line comes."""
    command = [sys.executable, "-c", JOB, str(Path(__file__).parent), str(output), server.url, name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **pipes)


@dataclass(frozen=True)
class Outage:
    """What was done and said while the server was dead."""

    here: str
    """By a stage that goes on until the server is back."""
    seconds: float
    """How long that took to log all it had."""
    ended: str
    """By a job that ended before."""
    ended_id: str


@pytest.fixture(scope="module")
def outage(server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Outage:
    """The server is killed -9 in the middle of a stage, and a job ends while it is dead."""
    folder = tmp_path_factory.mktemp("outage")
    (folder / "kept.txt").write_text("kept")
    options = ("--tracking.uri", server.url, "--tracking.experiment", "killed", "--tracking.patience_s", 600)
    first = job("first", folder / "job", server)
    assert first.stdout is not None
    ended_id = first.stdout.readline().strip()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        with tracking.tracked(settings(folder, *options), "all", "tune") as parent:
            parent.metrics({"loss": 3.0}, step=0)
            before = tracking.open_run(settings(folder, *options), "before", "trial", parent)
            before.metrics({"loss": 2.0}, step=1)
            assert before.id
            server.kill()
            began = time.monotonic()
            for step in range(2, 50):
                before.metrics({"loss": 2.0 / step, "accuracy": step / 50}, step=step)
            before.finish("FINISHED")
            during = tracking.open_run(settings(folder, *options), "during", "trial", parent)
            during.tag("sample.alpha", "0.3")
            during.metrics({"loss": 1.5}, step=1)
            during.artifact(folder / "kept.txt", "files")
            during.text("note.txt", "a note")
            during.finish("FAILED")
            seconds = time.monotonic() - began
            _, ended = first.communicate("\n", timeout=300)
            assert first.returncode == 0, ended
            server.start()
        assert not list(folder.glob(UNSENT))
    assert len(list((folder / "job").glob(UNSENT))) == 1
    with (folder / "job" / "mlflow_unsent_01234567.jsonl").open("w") as other:
        other.write("of another server")
    assert runs(server, "ended")["train: first"].info.status == "RUNNING"
    second = job("second", folder / "job", server)
    _, text = second.communicate("\n", timeout=300)
    assert second.returncode == 0, text
    assert [path.name for path in (folder / "job").glob(UNSENT)] == ["mlflow_unsent_01234567.jsonl"], "which is not touched"
    return Outage(said.getvalue(), seconds, ended, ended_id)


@pytest.mark.exhaustive
def test_a_killed_server_gets_everything_when_it_is_back(server, outage):
    assert outage.seconds < 1, "nothing waits for the server"
    assert outage.here.count("does not answer") == 1
    assert outage.here.count("answers again") == 1
    found = runs(server, "killed")
    assert {name: run.info.status for name, run in found.items()} == {
        "tune: all": "FINISHED", "trial: before": "FINISHED", "trial: during": "FAILED",
    }  # fmt: skip
    for child in ("trial: before", "trial: during"):
        assert found[child].data.tags["mlflow.parentRunId"] == found["tune: all"].info.run_id
    expected = [(1, 2.0), *((step, 2.0 / step) for step in range(2, 50))]
    assert values(server, found["trial: before"], "loss") == expected
    assert found["trial: during"].data.tags["sample.alpha"] == "0.3"
    assert found["trial: during"].data.params["training.epochs"] == "2"
    client = MlflowClient(server.url)
    run_id = found["trial: during"].info.run_id
    assert [a.path for a in client.list_artifacts(run_id, "files")] == ["files/kept.txt"]
    assert Path(client.download_artifacts(run_id, "note.txt")).read_text() == "a note"


@pytest.mark.exhaustive
def test_what_a_job_cannot_send_the_next_one_sends(server, outage):
    assert "4 entries for MLflow are kept in '" in outage.ended
    found = runs(server, "ended")
    assert found.keys() == {"train: first", "trial: firsts child", "train: second", "trial: seconds child"}
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert found["train: first"].info.run_id == outage.ended_id
    assert found["trial: firsts child"].data.tags["mlflow.parentRunId"] == outage.ended_id
    assert values(server, found["train: first"], "loss") == [(7, 0.5)]


def test_what_the_server_refuses_is_told_and_the_rest_is_sent(server, tmp_path, capfd):
    config = settings(tmp_path, "--tracking.uri", server.url, "--tracking.experiment", "refused")
    with tracking.tracked(config, "", "train") as run:
        run.metrics({"longer than MLflow's names may be" * 10: 1.0}, step=1)
        run.artifact(tmp_path / "absent.txt")
        run.metrics({"loss": 1.0}, step=1)
    said = capfd.readouterr().err
    assert "warning: MLflow refuses an entry (metrics), which is left out: " in said
    assert "warning: MLflow refuses an entry (artifact), which is left out: " in said
    assert "absent.txt" in said
    (found,) = runs(server, "refused").values()
    assert found.info.status == "FINISHED"
    assert found.data.metrics == {"loss": 1.0}


def test_a_run_that_the_server_refuses_to_make_is_not_waited_for(server, tmp_path):
    client = MlflowClient(server.url)
    client.delete_experiment(client.create_experiment("deleted"))
    config = settings(tmp_path, "--tracking.uri", server.url, "--tracking.experiment", "deleted")
    with pytest.raises(UserError, match="refused to make the run"):
        assert tracking.open_run(config, "", "train").id


def test_a_server_that_is_not_there_at_the_start_is_named(tmp_path):
    uri = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(UserError, match=f"MLflow at tracking.uri '{uri}' does not answer: .*; start it, correct the address"):
        Outbox(uri, tmp_path, 1.0)


def test_a_server_that_refuses_its_name_is_told_of_the_option_for_it(server, tmp_path, monkeypatch):
    """As MLflow does with all names but addresses of loopback and private networks, unless it is told of them."""
    look = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **how: look(host.replace("mlflow", "127.0.0.1"), *more, **how))
    uri = server.url.replace("127.0.0.1", "mlflow")
    with pytest.raises(
        UserError, match=f"tracking.uri '{uri}' answers under other names only: .*--allowed-hosts {uri[7:]} and every other"
    ):
        Outbox(uri, tmp_path, 1.0)


def test_work_that_goes_on_with_other_machines_goes_on_in_its_run(server, tmp_path):
    """Another set's does not, though all settings are the same."""
    options = ("--tracking.uri", server.url, "--tracking.experiment", "moved", "--tracking.patience_s", 600)

    def begun(workers: int, of: str) -> str:
        config = settings(tmp_path, *options, "--cluster.train_workers", workers)
        with contextlib.suppress(InterruptedError), tracking.tracked(config, "dmat", "train", of=of) as run:
            run.metrics({"epoch": float(workers), "loss": 1.0 / workers}, step=workers)
            raise InterruptedError
        return run.id

    first, again, other = begun(2, "set"), begun(4, "set"), begun(4, "another")
    assert first == again != other
    found = MlflowClient(server.url).get_run(first)
    assert found.data.params["cluster.train_workers"] == "2", "as it began"
    assert values(server, found, "loss") == [(2, 0.5), (4, 0.25)]


def test_what_workers_that_are_started_anew_tell_again_is_logged_once(server, tmp_path, monkeypatch):
    """Nothing is started here: the stages hear what workers say that are killed after they told of 2, before it is kept."""
    heard = []

    def listen(handle, asked=None):
        heard.append(handle)
        return contextlib.nullcontext("mailbox")

    def fit(*_, **__):
        for reached, loss in ((1.0, 0.5), (2.0, 0.4), (2.0, 0.41), (3.0, 0.3)):
            value = dict.fromkeys(("loss", "train_loss", "loss_g", "loss_d", "l1", "images_per_second"), loss)
            heard[-1]({"run": "dmat", "metrics": {"epoch": reached, "kimg": reached, **value}, "machine": {}})
        raise InterruptedError

    monkeypatch.setattr(session, "await_machines", lambda *_, **__: None)
    monkeypatch.setattr(session, "connected", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(workers, "fit", fit)
    for stage in (one_training, train):
        monkeypatch.setattr(stage, "listen", listen)
    monkeypatch.setattr(train, "training_folder", lambda todo: at(tmp_path) / "train" / "dmat")
    monkeypatch.setattr(train, "is_trained", lambda config: False)
    monkeypatch.setattr(train, "_key", lambda config: "")
    monkeypatch.setattr(train, "read_manifest", lambda place: {"data": {}})
    images = ImageCache(tmp_path / "images", "0" * 64, {})
    monkeypatch.setattr(gan, "check", lambda config, storage: images)
    monkeypatch.setattr(ImageCache, "open", lambda self: ((), ()))
    config = settings(tmp_path, "--name", "dmat", "--tracking.uri", server.url, "--tracking.experiment", "anew")
    for begin in (
        lambda: train.train_models([config], print),
        lambda: gan.train(config, tmp_path / "generator", "", print),
        lambda: encoder.train(config, at(tmp_path) / "encoder", "", print),
    ):
        with pytest.raises(InterruptedError):
            begin()
    assert {name: [step for step, _ in values(server, run, "loss")] for name, run in runs(server, "anew").items()} == {
        "train: dmat": [1, 2, 3], "train_generator": [1000, 2000, 3000], "train_encoder": [1000, 2000, 3000]
    }  # fmt: skip


def test_two_who_call_their_output_the_same_have_a_run_each(server, tmp_path, monkeypatch):
    """As on two clusters, each with a disk of its own at /shared."""
    ids = []
    for disk in ("mine", "yours"):
        (tmp_path / disk).mkdir()
        monkeypatch.chdir(tmp_path / disk)
        config = settings(Path("shared"), "--tracking.uri", server.url, "--tracking.experiment", "shared")
        ids.append(tracking.open_run(config, "dmat", "train").id)
        assert tracking.open_run(config, "dmat", "train").id == ids[-1], "which goes on in its own"
    assert ids[0] != ids[1]


def test_a_run_whose_result_is_there_is_finished_whatever_comes_after(server, tmp_path):
    """SIGTERM in a training's last moments, after its model was published."""
    config = settings(tmp_path, "--tracking.uri", server.url, "--tracking.experiment", "done")

    def stopped(name: str, done: bool) -> None:
        with tracking.tracked(config, name, "train") as run:
            run.done = done
            raise SystemExit(143)

    for name, done in (("published", True), ("stopped", False)):
        with pytest.raises(SystemExit):
            stopped(name, done)
    assert {name: run.info.status for name, run in runs(server, "done").items()} == {
        "train: published": "FINISHED", "train: stopped": "FAILED"
    }  # fmt: skip
