#!/usr/bin/env bash
# The study on MNIST-5k from nothing to docs/results/mnist.md and the README's table, and with CIFAR10=FOLDER, which holds CIFAR-10's
# binary files, that on five of its classes, to docs/results/cifar5.md. Goes on where it was stopped. SEEDS=1 trains
# each method on digits once, 23 models instead of 49; its intervals are of images alone. Further files of settings may be given, which are
# layered over the study's on digits: `benchmarks/results.sh smaller.yaml`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
processes=${PROCESSES:-2}
seeds=${SEEDS:-3}
study=(benchmarks/study.py --preset demo benchmarks/studies/mnist.yaml)

older() { # rows of another suite, or version, are not mixed with these; git has them
    [ ! -d "$1" ] || (cd "$1" && rm -rf rows clean worst autoattack settings.yaml study.json)
}

"$python" "${study[@]}" "$@" --processes "$processes" --seeds "$seeds"
"$python" "${study[@]}" benchmarks/studies/mnist_early.yaml "$@" --processes "$processes" --until projection
test -f runs/study/mnist_sampled/manifest.json ||
    "$python" benchmarks/sampled_set.py runs/study/mnist/on_manifold_set runs/study/mnist/models/standard-0 runs/study/mnist_sampled --generator.precision fast
"$python" "${study[@]}" "$@" --processes "$processes" --ablations --seeds 1
"$python" "${study[@]}" "$@" --processes "$processes" --trained at_eps_20 dmat_eps_20 --seeds "$seeds"
"$python" "${study[@]}" "$@" --processes "$processes" --trained at at_eps_20 dmat dmat_eps_20 dmat_trades_wide --seeds "$seeds" --worst-case
"$python" "${study[@]}" "$@" --processes "$processes" --seeds 1 --autoattack digits_autoattack --autoattack-limit 50
older benchmarks/results/mnist
"$python" benchmarks/study_report.py runs/study/mnist --pack benchmarks/results/mnist
"$python" benchmarks/study_report.py benchmarks/results/mnist --page docs/results/mnist.md --headline README.md
"$python" benchmarks/release.py runs/study/mnist models/mnist standard at_eps_20 dmat_eps_20

if [ -n "${CIFAR10:-}" ]; then
    methods=(standard at om_at_fgsm om_at dmat trades dmat_trades joint dmat_trades_wide dmat_recolor dmat_fog_recolor dmat_fog_recolor_stadv)
    study=(benchmarks/study.py --preset cifar10 benchmarks/studies/cifar5.yaml --more-methods benchmarks/studies/cifar5_methods.yaml
        --data.source "$CIFAR10" --processes "$processes")
    "$python" "${study[@]}" --trained "${methods[@]}" --seeds 3
    "$python" "${study[@]}" --trained standard at om_at dmat dmat_fog_recolor_stadv --seeds 5
    "$python" "${study[@]}" --trained at dmat dmat_fog_recolor_stadv --seeds 5 --worst-case
    "$python" "${study[@]}" --trained at dmat joint dmat_trades_wide dmat_recolor dmat_fog_recolor dmat_fog_recolor_stadv --seeds 3 --worst-case
    "$python" "${study[@]}" --trained at dmat joint dmat_fog_recolor_stadv --seeds 1 --autoattack cifar10_autoattack --autoattack-limit 100
    again=(benchmarks/study.py --preset cifar10 benchmarks/studies/cifar5.yaml benchmarks/studies/cifar5_again.yaml
        --more-methods benchmarks/studies/cifar5_methods.yaml --data.source "$CIFAR10" --processes "$processes" --first-seed 5 --seeds 5)
    "$python" "${again[@]}" --trained at dmat dmat_fog_recolor_stadv --worst-case
    older benchmarks/results/cifar5
    older benchmarks/results/cifar5/again
    "$python" benchmarks/study_report.py runs/study/cifar5 --pack benchmarks/results/cifar5
    "$python" benchmarks/study_report.py runs/study/cifar5_again --pack benchmarks/results/cifar5/again
    "$python" benchmarks/study_report.py benchmarks/results/cifar5 --page docs/results/cifar5.md
    "$python" benchmarks/release.py runs/study/cifar5 models/cifar5 standard at om_at dmat dmat_trades_wide dmat_fog_recolor_stadv
fi
