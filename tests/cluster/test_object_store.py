"""The whole pipeline with every path by URL, on a real S3 server on loopback: what it makes is what it makes in folders."""

import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import s3
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load
from small import DMAT, ROOT, SMALL, MlflowServer, finish, settings, wait_for

from dmat_ray.cluster import context, encoder, events, jobs, nodes
from dmat_ray.config import DataConfig
from dmat_ray.data.reading import read_pixels
from dmat_ray.data.sources import list_examples
from dmat_ray.errors import StorageError
from dmat_ray.manifold.encoder import load_encoder, locate_encoder
from dmat_ray.manifold.generators import fingerprint
from dmat_ray.storage import at, files

pytestmark = [pytest.mark.cluster, pytest.mark.exhaustive, pytest.mark.usefixtures("ray_session")]
OUTPUT = "s3://everything/run"
SHORT = [*DMAT, "--evaluation.sets", "on_manifold", "--evaluation.limit", "10"]
ASSETS = ROOT / "dmat_ray" / "assets" / "mnist32"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("mlflow")) as running:
        yield running


@pytest.fixture(scope="module")
def photos(store: s3.Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as a folder of images, which lie in the bucket as well, and so does the generator."""
    folder = tmp_path_factory.mktemp("photos")
    config = DataConfig(source="mnist5k", train_limit=60, test_limit=40)
    rows = list_examples(config).table
    for i, (label, pixels) in enumerate(zip(rows["label"].to_pylist(), read_pixels(rows, config), strict=True)):
        (folder / str(label)).mkdir(exist_ok=True)
        Image.fromarray(pixels[0]).save(folder / str(label) / f"{i:03}.png")
    files = {f"photos/{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*.png")}
    store.put("everything", files | {f"generator/{path.name}": path.read_bytes() for path in ASSETS.iterdir()})
    return folder


@dataclass(frozen=True)
class Bucket:
    """What lies in the bucket, by boto3."""

    store: s3.Server

    def keys(self, prefix: str) -> list[str]:
        """Of what is not empty."""
        pages = self.store.client().get_paginator("list_objects_v2").paginate(Bucket="everything", Prefix=prefix)
        return [one["Key"].removeprefix(prefix) for page in pages for one in page.get("Contents", []) if one["Size"]]

    def read(self, key: str) -> bytes:
        return bytes(self.store.client().get_object(Bucket="everything", Key=key)["Body"].read())


@pytest.fixture(scope="module")
def bucket(store: s3.Server) -> Bucket:
    return Bucket(store)


@pytest.fixture(scope="module")
def by_url(server: MlflowServer) -> list[str]:
    """Options of every job here, beside those of SMALL."""
    address = ray.get_runtime_context().gcs_address
    inputs = ["--data.source", "s3://everything/photos", "--generator.path", "s3://everything/generator"]
    return [*SHORT, *inputs, "--methods", "dmat", "--tracking.uri", server.url, "--cluster.address", address]


def start(job: str, folder: Path, *options: str) -> "subprocess.Popen[str]":
    """A job whose working directory is `folder`."""
    command = [sys.executable, str(ROOT / "jobs" / job), *SMALL, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def said(photos: Path, by_url: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """What jobs/pipeline.py says when all is by URL; it leaves nothing where it runs."""
    folder = tmp_path_factory.mktemp("empty")
    told = finish(start("pipeline.py", folder, "--preset", "demo", "--output", OUTPUT, *by_url))
    assert list(folder.iterdir()) == []
    return told


@pytest.fixture(scope="module")
def calm(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the same with paths."""
    output = tmp_path_factory.mktemp("calm")
    given = [*SHORT, "--data.source", photos]
    config = settings(output, *given)
    jobs.project(config, print)
    (model,) = jobs.train([settings(output, "--name", "dmat", *given, preset=("demo", "dmat"))], print)
    jobs.evaluate(config, {"dmat": model}, print)
    return output


def test_a_rerun_that_finds_all_done_needs_no_ray(said: str, by_url: list[str], tmp_path: Path):
    nowhere = ["--cluster.address", "127.0.0.1:1"]  # where no Ray is
    told = finish(start("pipeline.py", tmp_path, "--preset", "demo", "--output", OUTPUT, *by_url, *nowhere))
    assert told.count("nothing to do") == said.count("nothing to do") + 3, "set, model and evaluation are there"
    table = said[said.index("report:") :]
    assert told[told.index("report:") :] == table


def same_weights(content: bytes, expected: bytes) -> None:
    found, calm = load(content), load(expected)
    assert found.keys() == calm.keys()
    assert [name for name in found if not found[name].equal(calm[name])] == []


def unnamed(path: str) -> str:
    """Units of an evaluation are named by the set, which says where its images came from."""
    return re.sub(r"units/[0-9a-f]{64}", "units/", path)


def test_all_is_in_the_bucket_and_is_what_folders_hold(said: str, calm: Path, bucket: Bucket):
    here = [str(path.relative_to(calm)) for path in calm.rglob("*") if path.is_file()]
    expected = [unnamed(name) for name in here if not name.startswith(("mlflow", "mlartifacts"))]
    assert sorted(map(unnamed, bucket.keys("run/"))) == sorted([*expected, nodes.MARK])
    same_weights(bucket.read("run/models/dmat/model.safetensors"), (calm / "models" / "dmat" / "model.safetensors").read_bytes())
    for name in ("evaluation/rows.parquet", "on_manifold_set/shards/part-000000.parquet"):
        found, known = pq.read_table(io.BytesIO(bucket.read(f"run/{name}"))), pq.read_table(calm / name)
        timed = [name for name in ("seconds",) if name in known.column_names]
        assert found.drop_columns(timed).equals(known.drop_columns(timed))
    assert found.num_rows > 0
    assert bucket.read("run/report.csv") == (calm / "report.csv").read_bytes()
    page = bucket.read("run/report.html").decode()
    assert "s3://everything/run" in page
    assert f"report: {OUTPUT}/report.html" in said
    assert bucket.keys("run/train/") == [], "of the training nothing is left but the model"


def test_no_path_is_taken_for_a_folders_and_no_secret_is_written(said: str, bucket: Bucket, server: MlflowServer):
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    for folder in (ROOT, session):
        assert [path for path in folder.rglob("*s3:*") if ".venv" not in path.parts] == []
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    assert [key for key in bucket.keys("run/") if secret in bucket.read(f"run/{key}")] == []
    assert secret.decode() not in said
    assert [path for path in server.folder.rglob("*") if path.is_file() and secret in path.read_bytes()] == []


def test_mlflow_has_the_artifacts(said: str, server: MlflowServer, bucket: Bucket, tmp_path: Path):
    client = MlflowClient(server.url)
    runs = client.search_runs([client.get_experiment_by_name("dmat_ray demo").experiment_id])
    by_name = {run.data.tags["mlflow.runName"]: run for run in runs}
    assert {"pipeline", "project", "train: dmat", "evaluate"} <= by_name.keys()
    assert all(run.info.status == "FINISHED" for run in runs)
    trained = Path(client.download_artifacts(by_name["train: dmat"].info.run_id, "checkpoint", str(tmp_path)))
    assert (trained / "model.safetensors").read_bytes() == bucket.read("run/models/dmat/model.safetensors")
    kept = {a.path for a in client.list_artifacts(by_name["evaluate"].info.run_id)}
    assert kept == {"report.html", "report.md", "report.csv", "rows.parquet", "checks.json"}


def test_a_training_that_is_killed_goes_on_from_the_bucket(said: str, by_url: list[str], bucket: Bucket, tmp_path: Path):
    options = ["--preset", "demo", "dmat", "--name", "dmat", "--output", "s3://everything/killed", *by_url]
    options += ["--manifold_set", f"{OUTPUT}/on_manifold_set"]

    def whole() -> list[str]:
        return sorted(key for key in bucket.keys("killed/train/") if key.endswith("/run.json"))

    process = start("train.py", tmp_path, *options)
    wait_for(lambda: len(whole()) >= 2, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert bucket.keys("killed/models/") == []
    training = whole()[0].rsplit("/", 2)[0]
    # what a kill in the middle of an upload leaves
    bucket.store.client().put_object(Bucket="everything", Key=f"killed/train/{training}/checkpoint_2999/state.pt", Body=b"half")
    resumed = finish(start("train.py", tmp_path, *options))
    assert re.search(r"going on with epoch [23], with 2 workers", resumed), resumed
    assert "epoch 1/3" not in resumed
    assert "warning" not in resumed
    same_weights(bucket.read("killed/models/dmat/model.safetensors"), bucket.read("run/models/dmat/model.safetensors"))
    assert bucket.keys("killed/train/") == []
    assert not any(tmp_path.iterdir())


def test_checkpoints_that_are_not_whole_are_not_listed(bucket: Bucket, photos: Path):
    for key in ("1/run.json", "1/state.pt", "2/progress.json", "3/state.pt", "3/.hidden.json"):
        bucket.store.client().put_object(Bucket="everything", Key=f"listed/checkpoint_{key}", Body=b"{}")
    bucket.store.client().put_object(Bucket="everything", Key="listed/checkpoint_manager_snapshot.json", Body=b"{}")
    found = context.stored_checkpoints("s3://everything/listed")
    assert [str(place) for place in found] == [f"s3://everything/listed/checkpoint_{n}" for n in (2, 1)]


def test_an_upload_is_tried_again(bucket: Bucket, photos: Path, monkeypatch, lines):
    """A store that is away for a moment does not end a training, one that stays away does."""
    uploader = context.RayContext.__new__(context.RayContext)
    uploader.say = lines.append
    monkeypatch.setattr(context, "UPLOAD_PAUSES_S", (0.0, 0.0))
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(files.time, "sleep", lambda seconds: monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint))
    place = at("s3://everything/again")
    uploader._put(ASSETS, place)
    assert sorted(bucket.keys("again/")) == sorted(path.name for path in ASSETS.iterdir())
    assert len(lines) == 1
    assert lines[0].startswith("warning: 's3://everything/again/")
    monkeypatch.setattr(context, "put", refuse)
    with pytest.raises(StorageError, match="no more"):
        uploader._put(ASSETS, place)


def refuse(*given: object) -> None:
    raise StorageError("no more")


def test_a_store_that_stays_away_is_no_error_of_the_users(bucket: Bucket, photos: Path, monkeypatch, tmp_path: Path):
    uploader = context.RayContext.__new__(context.RayContext)
    uploader._storage, uploader.say = at("s3://everything/away"), print
    monkeypatch.setattr(context, "UPLOAD_PAUSES_S", ())
    monkeypatch.setattr(context, "put", refuse)
    with events.listen(print) as uploader._mailbox:
        mailbox = ray.get_actor(uploader._mailbox)
        with pytest.raises(StorageError, match="no more"):
            uploader._upload(ray.train.Checkpoint(str(tmp_path)), "checkpoint_1")
        assert ray.get(mailbox.get_user_error.remote()) is None, "so that Ray Train starts the workers anew"


def run_job(monkeypatch: pytest.MonkeyPatch, job: str, *options: str) -> None:
    """A job in this process, which is connected to Ray."""
    monkeypatch.setattr(sys, "argv", [job, *SMALL, *options])
    runpy.run_path(str(ROOT / "jobs" / job), run_name="__main__")


def test_each_stage_by_itself(said: str, by_url: list[str], bucket: Bucket, monkeypatch, capsys, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    options = ["--output", OUTPUT, *by_url]
    for job, more in (
        ("project.py", ["--preset", "demo"]),
        ("train.py", ["--preset", "demo", "dmat", "--name", "dmat"]),
        ("evaluate.py", ["--preset", "demo"]),
    ):
        run_job(monkeypatch, job, *more, *options)
        assert "nothing to do" in capsys.readouterr().out
    run_job(monkeypatch, "predict.py", *options, "--model", "dmat", "--images", "s3://everything/photos/1")
    rows = pq.read_table(io.BytesIO(bucket.read("run/predictions/dmat.parquet")))
    assert rows.num_rows == len(bucket.keys("photos/1/"))
    run_job(monkeypatch, "export_model.py", *options, "--models", "dmat")
    assert json.loads(bucket.read("run/exported/dmat/config.json"))["architecture"]["name"] == "digits_cnn"
    assert bucket.read("run/exported/dmat/model.safetensors") == bucket.read("run/models/dmat/model.safetensors")
    file = tmp_path / "file.safetensors"
    file.write_bytes(bucket.read("run/models/dmat/model.safetensors"))
    given = ["--checkpoint", str(file), "--model", "theirs", "--classifier.name", "digits_cnn"]
    run_job(monkeypatch, "import_model.py", *options, *given)
    assert sorted(bucket.keys("run/models/theirs/")) == ["model.safetensors", "run.json"]
    run_job(monkeypatch, "inspect_set.py", "--preset", "demo", *options)
    assert "the set is sound" in capsys.readouterr().out
    assert b"<html" in bucket.read("run/inspection.html")
    before = len(bucket.store.requests())
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for job in ("project.py", "train.py", "evaluate.py", "pipeline.py"):
        run_job(monkeypatch, job, "--preset", "demo", "--output", OUTPUT, "--dry-run")
    assert len(bucket.store.requests()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]


def test_an_encoder_is_trained_and_found(by_url: list[str], photos: Path, bucket: Bucket, say, lines):
    output = "s3://everything/encoder"
    small = ("--encoder.kimg", "0.2", "--encoder.report_kimg", "0.1", "--encoder.batch_size", "16", "--encoder.width", "8")
    config = settings(output, *by_url, *small, "--encoder.width_max", "16", "--cluster.train_workers", "1")
    encoder.train_encoder(config, False, "a command", say)
    assert sorted(bucket.keys("encoder/encoder/")) == ["encoder.json", "encoder.safetensors"]
    assert bucket.keys("encoder/train/") == []
    encoder.train_encoder(config, False, "a command", say)
    assert lines[-1] == "is trained already and unchanged, nothing to do"
    found = locate_encoder(None, output, config.generator.path)
    assert str(found) == f"{output}/encoder"
    load_encoder(found, fingerprint(config.generator.path))
    beside = locate_encoder(None, "s3://everything/nothing", config.generator.path)
    assert str(beside) == "s3://everything/generator", "which came with one"
    load_encoder(beside, fingerprint("mnist32"))


@pytest.mark.parametrize("job", ["tune.py", "train_generator.py", "train_local.py", "import_generator.py"])
def test_jobs_that_need_a_folder_say_so(job: str, by_url: list[str], monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_job(monkeypatch, job, *by_url, "--output", OUTPUT, *(["--checkpoint", "x"] if "import" in job else []))
    assert f"jobs/{job} cannot write to an object store" in capsys.readouterr().err


def test_a_node_that_does_not_see_the_output_is_named(photos: Path, monkeypatch):
    monkeypatch.setattr(nodes, "SETTLING_S", 0.3)
    told = nodes.expectation("s3://everything/seen")
    assert nodes.complaints(told) == []
    other = json.dumps({**json.loads(told), "mark": "another"})
    assert "output 's3://everything/seen' is not the same folder on node" in nodes.complaints(other)[0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    (said,) = nodes.look(told)["complaints"]
    away = r"^node \S+ cannot read what the driver's, \S+, has written: .*127\.0\.0\.1:9 cannot be reached"
    assert re.search(away, said)
    monkeypatch.setenv(nodes.EXPECTED, told)
    with pytest.raises(StorageError, match=away):  # a worker that starts meanwhile ends no training
        nodes.require_like_driver()
    with pytest.raises(StorageError, match=r"cannot be (looked at|written): http://127\.0\.0\.1:9 cannot be reached"):
        nodes.expectation("s3://everything/seen")
