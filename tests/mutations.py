"""Do tests notice a wrong sign, clamp or budget? Each line below is changed in a copy of the package, where its tests must fail.

    .venv/bin/python tests/mutations.py

Prints a line a change, and exits with 1 if tests pass with one of them, or fail without any.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# file of dmat_ray/, what stands there once, what takes its place, and the tests that look at it
MUTATIONS = [
    ("threats/balls.py", "        return gradient.sign()\n    if norm", "        return -gradient.sign()\n    if norm", "pgd"),
    ("threats/balls.py", "return theta.clamp(-eps, eps)", "return theta.clamp(-1.05 * eps, 1.05 * eps)", "balls"),
    ("threats/image.py", "(theta, self.norm, self.eps)).clamp(0.0, 1.0) - x", "(theta, self.norm, self.eps)) - x", "pgd"),
    ("threats/latent.py", "_codes(batch) + theta * self.unit", "_codes(batch) + theta", "threats"),
    ("threats/weather.py", "(brightest + self.eps)", "(brightest + 0.9)", "published_attacks"),
    ("attack/__init__.py", "(b.loss_B > a.loss_B)", "(b.loss_B < a.loss_B)", "attack"),
    ("training/objectives.py", "F.kl_div(log_p, log_q,", "F.kl_div(log_q, log_p,", "objectives"),
    ("training/objectives.py", "total = total + weight * loss", "total = total + loss", "objectives"),
    ("training/validation.py", "torch.stack(rows).all(dim=0)", "torch.stack(rows).any(dim=0)", "trainer"),
    ("evaluation/metrics.py", "standing = standing & self", "standing = standing | self", "metrics"),
    ("training/schedules.py", "config.lr * epoch / config.lr_warmup", "config.lr * epoch", "schedules"),
    ("rng.py", "derive(seed, purpose, i)", "derive(seed, purpose)", "rng"),
]  # fmt: skip


def passes(tests: str, root: Path) -> bool:
    """Whether a test file of the copy passes."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-m",
        "not exhaustive",
        str(next((root / "tests").rglob(f"test_{tests}.py"))),
    ]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, check=False).returncode == 0


def main() -> int:
    """Of a shell: 0 if every change was noticed."""
    with tempfile.TemporaryDirectory() as folder:
        root, wrong = Path(folder), 0
        for name in ("dmat_ray", "tests", "pyproject.toml"):
            source = ROOT / name
            shutil.copytree(source, root / name) if source.is_dir() else shutil.copy(source, root / name)
        for tests in sorted({tests for *_, tests in MUTATIONS}):
            if not passes(tests, root):
                wrong += 1
                print(f"test_{tests}.py fails as it is", flush=True)
        for name, old, new, tests in MUTATIONS:
            path = root / "dmat_ray" / name
            text = path.read_text(encoding="utf-8")
            if text.count(old) < 1:
                raise SystemExit(f"{name} has no line with {old!r} any more: change it here, too")
            path.write_text(text.replace(old, new), encoding="utf-8")
            noticed = not passes(tests, root)
            path.write_text(text, encoding="utf-8")
            wrong += not noticed
            print(
                f"{'noticed' if noticed else 'NOT NOTICED'} by test_{tests}.py: {name}: {new.strip().splitlines()[0]}", flush=True
            )
        return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
