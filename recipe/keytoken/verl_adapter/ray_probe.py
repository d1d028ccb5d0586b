"""A child that joins or starts Ray, says what it found as one line of JSON, and leaves.

``python -m keytoken.verl_adapter.ray_probe [ADDRESS]``: without an address a Ray of its own is started, with
one CPU and without a dashboard, and a task is run on it.
"""

import json
import sys

import ray


def main(address: str | None) -> None:
    """Look at a cluster, or at one of its own, and write what is there to standard output."""
    if address:
        ray.init(address=address, log_to_driver=False)
    else:
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    answer = ray.get(ray.remote(num_cpus=0)(_twice).remote(21), timeout=60)
    alive = [node for node in ray.nodes() if node["Alive"]]
    report = {
        "version": ray.__version__,
        "nodes": [node["NodeManagerAddress"] for node in alive],
        "resources": {name: ray.cluster_resources().get(name, 0.0) for name in ("CPU", "GPU", "memory")},
        "task": answer,
    }
    ray.shutdown()
    sys.stdout.write(json.dumps(report) + "\n")


def _twice(number: int) -> int:
    return 2 * number


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
