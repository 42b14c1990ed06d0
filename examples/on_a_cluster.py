"""All stages by Ray, and what MLflow has recorded of them, read from Python.

For platform engineers. On this machine, with a Ray of its own, or on a cluster:

    python examples/on_a_cluster.py
    ray job submit --working-dir . -- python examples/on_a_cluster.py

There OUTPUT must be a folder that all nodes share (docs/cluster.md).
"""

# %% Sizes: two minutes on two cores
OUTPUT, METHODS, EPOCHS, WORKERS = "runs/on_a_cluster", ("standard", "dmat"), 4, 2

# %% Settings are made before Ray is imported, which reads its environment once
from dmat_ray import settings, terminal_table
from dmat_ray.cluster.environment import prepare_environment

sizes = {"cluster": {"train_workers": WORKERS}, "training": {"epochs": EPOCHS, "lr_epochs": [0, 1, 3, EPOCHS]}}
configs = {name: settings("demo", name, "small", name=name, output=OUTPUT, **sizes) for name in METHODS}
config = configs[METHODS[0]]
prepare_environment(config)

# %% The stages, in one session of Ray and one run of MLflow. What is whole and unchanged is not done again
from dmat_ray.cluster import jobs, tracking
from dmat_ray.cluster.session import connected

speaker = jobs.Speaker()
with connected(config.cluster, config.output), tracking.tracked(config, "", "pipeline") as run:
    jobs.project(config, speaker.stage("project"), run)
    folders = jobs.train(list(configs.values()), speaker.stage("train"), run)
    models = dict(zip(METHODS, folders, strict=True))
    results, findings = jobs.evaluate(config, models, speaker.stage("evaluate"), run)
print(terminal_table(results, list(models)))

# %% What MLflow has of it: a run for each stage, its settings and its metrics
from mlflow import MlflowClient

client = MlflowClient(tracking.tracking_uri(config))
experiment = client.get_experiment_by_name(config.tracking.experiment)
runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
for name in METHODS:
    losses = client.get_metric_history(runs[f"train: {name}"].info.run_id, "train_loss")
    weight = runs[f"train: {name}"].data.params["objective.image.weight"]
    print(f"{name}: image weight {weight}, loss {losses[0].value:.2f} -> {losses[-1].value:.2f} in {len(losses)} epochs")
print(f"pages: {jobs.ui_command(config)}")
