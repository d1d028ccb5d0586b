"""Whether every node of the cluster sees the files of a run, asked before its pools start.

A folder that one node lacks shows late otherwise: as a missing model in one of many workers, or, if the run
folder is each node's own, as a checkpoint of which every node has a part.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from omegaconf import DictConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from keytoken.errors import ClusterError, ConfigurationError
from keytoken.resources import INPUTS, paths_of

# Folders into which every node writes its part of a checkpoint.
WRITTEN_BY_ALL = ("keytoken.run_dir", "trainer.default_local_dir")
TIMEOUT_S = 120.0


def require_seen_by_all(config: DictConfig, timeout_s: float = TIMEOUT_S) -> None:
    """Ask each living node of the cluster that Ray is connected to; nothing is asked of a single one.

    Raises:
        ConfigurationError: names the key, the path and the nodes that lack it.
        ClusterError: a node does not answer.
    """
    nodes = {
        node["NodeID"]: f"{node['NodeManagerHostname']} {node['NodeManagerAddress']}"
        for node in ray.nodes()
        if node["Alive"]
    }
    if len(nodes) < 2:
        return
    asked = [(key, path, path) for key, path in paths_of(config, INPUTS)]
    with _marks(paths_of(config, WRITTEN_BY_ALL)) as marks:
        asked += marks
        missing = _ask(nodes, [path for _, path, _ in asked], timeout_s)
    for key, path, shown in asked:
        lacking = sorted(nodes[node] for node, absent in missing.items() if path in absent)
        if lacking:
            what = "does not exist" if path == shown else "is a folder of its own"
            raise ConfigurationError(
                f"{key}={shown} {what} on {len(lacking)} of {len(nodes)} nodes ({', '.join(lacking[:5])}); "
                "put it on a disk that all nodes mount under the same name."
            )


@contextmanager
def _marks(folders: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str, str]]]:
    """A new file in each folder: who sees it shares the folder. Key, file and folder."""
    marks = [(key, Path(folder) / f".shared-{uuid4().hex}", folder) for key, folder in folders]
    try:
        for _, mark, _ in marks:
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        yield [(key, str(mark), folder) for key, mark, folder in marks]
    finally:
        for _, mark, _ in marks:
            mark.unlink(missing_ok=True)


def _ask(nodes: Mapping[str, str], paths: Sequence[str], timeout_s: float) -> dict[str, set[str]]:
    """The paths that do not exist, for each node."""
    absent_of: Any = ray.remote(num_cpus=0, max_retries=0)(_absent)
    answers = {}
    for node in nodes:
        on_node = NodeAffinitySchedulingStrategy(node, soft=False)
        answers[absent_of.options(scheduling_strategy=on_node).remote(list(paths))] = node
    ready, waiting = ray.wait(list(answers), num_returns=len(answers), timeout=timeout_s)
    if waiting:
        silent = ", ".join(sorted(nodes[answers[answer]] for answer in waiting))
        raise ClusterError(
            f"{silent}: no answer within {timeout_s:g} s to the question which files it sees. `ray status` "
            "shows whether the node lives; a hanging network disk has this effect as well."
        )
    return {answers[answer]: set(ray.get(answer)) for answer in ready}


def _absent(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if not Path(path).exists()]
