from __future__ import annotations

import pytest

# pytest finds fixtures here by their names.
from cluster_fixtures import cluster, make_namespace, own_node

__all__ = ["anyio_backend", "cluster", "make_namespace", "own_node"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
