from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

# pytest finds fixtures here by their names.
from cluster_fixtures import make_namespace, own_node, real_cluster
from clusters import Cluster, open_cluster

__all__ = ["anyio_backend", "cluster", "make_namespace", "own_node", "real_cluster"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.cluster)])
async def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Cluster]:
    """A cluster: the same tests pass on the fake and on a real one."""
    async with open_cluster(request.param, tmp_path) as opened:
        yield opened
