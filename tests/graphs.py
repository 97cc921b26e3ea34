"""What deployments a Serve config's graph has, without starting it."""

from __future__ import annotations

import inspect
import os
from unittest.mock import patch

from deployments.app import AppArgs, build_app
from deployments.ingress.ingress import Ingress


def deployment_names(args: AppArgs) -> set[str]:
    """Names of every deployment `build_app` binds."""
    with patch.dict(os.environ, {"SDGRAPH_API_KEYS_FILE": "/etc/sdgraph/api-keys"}):
        given = build_app(args)._bound_deployment.init_args
    bound = dict(zip(inspect.signature(Ingress).parameters, given, strict=False))
    apps = [*bound["handles"].values(), *bound["compiled"].values()]
    return {app._bound_deployment.name for app in apps} | {"ingress"}
