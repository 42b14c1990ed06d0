"""The code in the README of an exported model."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor


def by_its_readme(folder: Path, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What the code in the README computes."""
    (code,) = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    variables = {"x": x}
    with torch.no_grad():
        exec(code, variables)
    return variables["logits"]
