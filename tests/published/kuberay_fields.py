"""Make kuberay.json.gz, the fields of a RayJob, from KubeRay's definition of it: names, types, limits, and no text.

    python tests/published/kuberay_fields.py ray-operator/config/crd/bases/ray.io_rayjobs.yaml     (that of KubeRay 1.7.0)

Fields that it does not name are not allowed, as in `kubectl --validate=strict`.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml


def fields(schema: Any) -> Any:
    """The schema without descriptions, closed."""
    if isinstance(schema, list):
        return [fields(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: fields(value) for key, value in schema.items() if not (key == "description" and isinstance(value, str))}
    if found.get("type") == "object" and isinstance(found.get("properties"), dict):
        found.setdefault("additionalProperties", False)
    return found


if __name__ == "__main__":
    versions = yaml.safe_load(Path(sys.argv[1]).read_text())["spec"]["versions"]
    (v1,) = [version for version in versions if version["name"] == "v1"]
    text = json.dumps(fields(v1["schema"]["openAPIV3Schema"]["properties"]["spec"]), sort_keys=True)
    Path(__file__).with_name("kuberay.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
