"""MLflow's database for tests that are not about how it is made: that takes MLflow seconds, in every folder anew."""

import functools
import tempfile
from pathlib import Path


@functools.cache
def database() -> bytes:
    """One without runs."""
    import mlflow

    with tempfile.TemporaryDirectory() as folder:
        mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
        return (Path(folder) / "mlflow.db").read_bytes()


def with_database(output: Path) -> None:
    """Give a folder that is there the database that its first job would make."""
    if output.is_absolute() and output.is_dir() and not (output / "mlflow.db").exists():
        (output / "mlflow.db").write_bytes(database())
