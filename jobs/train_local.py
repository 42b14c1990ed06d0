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

    from dmat_ray.local_stages import train

    torch.set_num_threads(config.cluster.threads_per_worker)
    train(config, heed_sigterm=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    cli.run(main)
