"""A Ray cluster on this machine: a head, a node without cards, five small cards, eleven large ones on two nodes.

Prints its address, then reads commands as JSON lines and answers each with one, until its input ends.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from ray.util.state import list_actors

NODES = [
    {"num_cpus": 12, "num_gpus": 0, "labels": {"sdgraph/role": "cpu"}},
    {"num_cpus": 40, "num_gpus": 5, "labels": {"sdgraph/role": "small"}},
    {"num_cpus": 48, "num_gpus": 6, "labels": {"sdgraph/role": "large"}},
    {"num_cpus": 40, "num_gpus": 5, "labels": {"sdgraph/role": "large"}},
]


def replicas() -> list[dict[str, Any]]:
    """Every Serve replica that is alive, with its node and what it holds."""
    roles = {node["NodeID"]: node["Labels"].get("sdgraph/role", "head") for node in ray.nodes()}
    found = []
    for actor in list_actors(filters=[("state", "=", "ALIVE")], detail=True, limit=1000):
        if actor.class_name.startswith("ServeReplica:sdgraph:"):
            deployment = actor.class_name.removeprefix("ServeReplica:sdgraph:")
            resources = dict(actor.required_resources or {})
            found.append(
                {"deployment": deployment, "node": actor.node_id, "role": roles[actor.node_id], "resources": resources}
            )
    return found


def main() -> None:
    """Serve commands until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray has things to say of its own
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": True})
    nodes = [cluster.add_node(**node) for node in NODES]
    ray.init(address=cluster.address, log_to_driver=False)
    print(json.dumps({"address": cluster.address}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer: Any
        if command["do"] == "replicas":
            answer = replicas()
        elif command["do"] == "deploy":
            schema = ServeDeploySchema.model_validate(command["config"])
            _get_global_client().deploy_apps(schema, _blocking=False)
            answer = "accepted"
        else:
            (lost,) = (node for node in nodes if node.node_id == command["node"])
            cluster.remove_node(lost, allow_graceful=False)
            answer = "lost"
        print(json.dumps(answer), file=answers, flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
