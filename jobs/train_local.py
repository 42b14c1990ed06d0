"""Train one classifier on a finished on-manifold set without Ray: in this process, or in several under torchrun.

    python jobs/train_local.py --preset demo dmat --output runs/demo
    torchrun --nproc-per-node 4 jobs/train_local.py --preset demo dmat --output runs/demo

The same loop and the same model as jobs/train.py, for machines that another scheduler hands out; a rerun goes on where it
stopped, and SIGTERM makes it write a checkpoint and stop with exit code 143. Settings under cluster.* and tracking.* have no
part in it, but for cluster.threads_per_worker. A checkpoint is written to OUTPUT/local/NAME, the model to OUTPUT/models/NAME.
"""

from dmat_ray import cli


def main() -> None:
    config, _ = cli.parse(str(__doc__), preset=["demo", "dmat"])
    import torch
    import torch.distributed

    from dmat_ray import models
    from dmat_ray.data import manifold_set
    from dmat_ray.errors import UserError
    from dmat_ray.local import LocalContext
    from dmat_ray.manifold import generators
    from dmat_ray.storage import local_output, set_folder
    from dmat_ray.trainer import describe, train

    if config.training.loader != "memory":
        raise UserError("training.loader stream reads through Ray Data: use jobs/train.py, or set training.loader memory")
    torch.set_num_threads(config.cluster.threads_per_worker)
    folder = local_output(config, "jobs/train_local.py") / "local" / config.name
    context = LocalContext(
        folder, lambda metrics: context.say(describe(config.name, metrics, config.training.epochs)), heed_sigterm=True
    )
    todo = models.untrained([config], context.say, context.world_size)
    if todo:
        folder.mkdir(parents=True, exist_ok=True)
        data = manifold_set.open_set(set_folder(config), "train")
        generator = generators.load_configured(config.generator, context.device)
        train(config, data, generator, generators.fingerprint(config.generator.path), context)
        if context.rank == 0:
            models.publish(context.checkpoints()[0], models.model_folder(config))
            context.say(f"model in {models.model_folder(config)}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    cli.run(main)
