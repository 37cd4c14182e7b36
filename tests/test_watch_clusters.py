"""The watch over a real connection, on the fake cluster and on a real one."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from clusters import BACKGROUND, Cluster, config_map, job

from asyncrt.backends.kubeapi import open_kube_api
from asyncrt.backends.watch import Watch
from asyncrt.errors import KubernetesError
from asyncrt.testing.fakekubernetes import BreakHow, FakeKubernetes

pytestmark = pytest.mark.anyio


class Seen:
    """What a watch has told, and a way to wait for more."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.objects: dict[str, dict[str, Any]] = {}
        self.synced = 0
        self._news = anyio.Event()

    def on_event(self, kind: str, item: dict[str, Any]) -> None:
        name = item["metadata"]["name"]
        self.told.append(f"{kind} {name}")
        if kind == "DELETED":
            del self.objects[name]
        else:
            assert (kind == "ADDED") is (name not in self.objects)
            self.objects[name] = item
        self._news.set()

    def on_synced(self) -> None:
        self.synced += 1
        self._news.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        with anyio.fail_after(60):
            while not condition():
                self._news = anyio.Event()
                await self._news.wait()


@asynccontextmanager
async def watching(
    cluster: Cluster, resource: str, selector: str | None = "test"
) -> AsyncIterator[Seen]:
    seen = Seen()
    async with cluster.api() as api, anyio.create_task_group() as group:
        watch = Watch(
            api,
            cluster.core(resource),
            on_event=seen.on_event,
            on_synced=seen.on_synced,
            label_selector=selector,
        )
        group.start_soon(watch.run)
        await seen.until(lambda: seen.synced > 0)
        yield seen
        group.cancel_scope.cancel()


async def test_changes_are_told_in_order(cluster: Cluster) -> None:
    path = cluster.core("configmaps")
    async with cluster.api() as api:
        await api.request("POST", path, body=config_map("before"))
        async with watching(cluster, "configmaps") as seen:
            assert seen.told == ["ADDED before"]
            await api.request("POST", path, body=config_map("one"))
            await api.request("PATCH", f"{path}/one", body={"data": {"a": "1"}})
            await api.request("PATCH", f"{path}/before", body={"metadata": {"labels": None}})
            await api.request("DELETE", f"{path}/one")
            await seen.until(lambda: not seen.objects)
    assert seen.told[1:] == ["ADDED one", "MODIFIED one", "DELETED before", "DELETED one"]


async def test_a_pod_goes_through_its_phases(cluster: Cluster) -> None:
    async with cluster.api() as api, watching(cluster, "pods") as seen:
        phases: list[str] = []
        on_event = seen.on_event

        def note(kind: str, item: dict[str, Any]) -> None:
            phases.append(item["status"]["phase"])
            on_event(kind, item)

        seen.on_event = note  # type: ignore[method-assign]
        await api.request("POST", cluster.jobs, body=job("phases", "print('done')"))

        def done() -> bool:
            return any(p["status"]["phase"] == "Succeeded" for p in seen.objects.values())

        await seen.until(done)
        (pod,) = seen.objects.values()
        (status,) = pod["status"]["containerStatuses"]
        assert status["state"]["terminated"]["exitCode"] == 0
        assert status["state"]["terminated"]["reason"] == "Completed"
        assert pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] == "0"
        await api.request("DELETE", f"{cluster.jobs}/phases", query=BACKGROUND)
        await seen.until(lambda: not seen.objects)
    assert seen.told[0].startswith("ADDED")
    assert seen.told[-1].startswith("DELETED")


@pytest.fixture
async def fake_cluster(tmp_path: Path) -> AsyncIterator[tuple[Cluster, FakeKubernetes]]:
    async with FakeKubernetes(bookmark_seconds=0.05) as fake:
        yield Cluster(fake.kubeconfig(tmp_path / "config"), "default", fake), fake


@pytest.mark.parametrize("how", ["gone", "error", "eof", "half_line", "reset"])
@pytest.mark.parametrize("streams_lists", [True, False])
async def test_no_change_is_lost_when_the_stream_breaks(
    how: BreakHow, streams_lists: bool, fake_cluster: tuple[Cluster, FakeKubernetes]
) -> None:
    cluster, fake = fake_cluster
    fake.streams_lists = streams_lists
    path = cluster.core("configmaps")
    async with cluster.api() as api, watching(cluster, "configmaps") as seen:
        await api.request("POST", path, body=config_map("stays"))
        await api.request("POST", path, body=config_map("goes"))
        await seen.until(lambda: len(seen.objects) == 2)
        fake.break_watches(how)
        await api.request("DELETE", f"{path}/goes")
        await api.request("POST", path, body=config_map("comes"))
        await seen.until(lambda: set(seen.objects) == {"stays", "comes"})
        assert seen.synced == (2 if how == "gone" else 1)
    assert len(seen.told) == 4


async def test_a_version_that_the_server_forgot_is_listed_again(
    fake_cluster: tuple[Cluster, FakeKubernetes],
) -> None:
    cluster, fake = fake_cluster
    path = cluster.core("configmaps")
    async with cluster.api() as api, watching(cluster, "configmaps") as seen:
        await api.request("POST", path, body=config_map("goes"))
        await seen.until(lambda: "goes" in seen.objects)
        await fake.stop_api()
        fake.store.remove("configmaps", fake.store.get("configmaps", "default", "goes"))
        fake.compact()
        await fake.start_api()
        await seen.until(lambda: not seen.objects)
        assert seen.synced == 2


async def test_events_that_come_twice_are_told_once(
    fake_cluster: tuple[Cluster, FakeKubernetes],
) -> None:
    cluster, fake = fake_cluster
    fake.duplicates_events = True
    path = cluster.core("configmaps")
    async with cluster.api() as api, watching(cluster, "configmaps") as seen:
        for _ in range(2):
            await api.request("POST", path, body=config_map("one"))
            await api.request("DELETE", f"{path}/one")
        await seen.until(lambda: len(seen.told) == 4)
    assert seen.told == ["ADDED one", "DELETED one"] * 2


async def test_a_token_that_expires_is_renewed_once(
    fake_cluster: tuple[Cluster, FakeKubernetes], tmp_path: Path
) -> None:
    _, fake = fake_cluster
    token = tmp_path / "token"
    token.write_text(fake.token)
    path = fake.kubeconfig(tmp_path / "config", tokenFile=str(token))
    cluster = Cluster(path, "default", fake)
    async with watching(cluster, "configmaps") as seen:
        fake.tokens = {"second": "tester"}
        token.write_text("second")
        fake.break_watches("eof")
        fake.store.create("configmaps", "default", config_map("one"))
        await seen.until(lambda: "one" in seen.objects)


async def test_a_right_that_is_taken_away_ends_the_watch_loudly(
    fake_cluster: tuple[Cluster, FakeKubernetes],
) -> None:
    cluster, fake = fake_cluster

    def forbid() -> None:
        fake.forbidden.add(("watch", "configmaps"))
        fake.break_watches("eof")

    async with cluster.api() as api:
        path = cluster.core("configmaps")
        watch = Watch(api, path, on_event=lambda kind, item: None, on_synced=forbid)
        with anyio.fail_after(30), pytest.raises(KubernetesError, match="verb 'watch'"):
            await watch.run()


async def test_thousands_of_objects_are_paged_and_do_not_hold_the_loop(tmp_path: Path) -> None:
    async with FakeKubernetes(hollow=True) as fake:
        fake.streams_lists = False
        for number in range(1000):
            fake.store.create("configmaps", "default", config_map(f"m-{number}"))
        seen = Seen()
        async with open_kube_api(kubeconfig=fake.kubeconfig(tmp_path / "config")) as api:
            turns = 0

            def slow(kind: str, item: dict[str, Any]) -> None:
                end = time.perf_counter() + 0.0005
                while time.perf_counter() < end:
                    pass
                seen.on_event(kind, item)
                turns_of_others.append(turns)

            turns_of_others: list[int] = []
            watch = Watch(
                api,
                "/api/v1/namespaces/default/configmaps",
                on_event=slow,
                on_synced=seen.on_synced,
            )
            async with anyio.create_task_group() as group:
                group.start_soon(watch.run)
                while not seen.synced:
                    turns += 1
                    await anyio.lowlevel.checkpoint()
                group.cancel_scope.cancel()
        assert len(seen.objects) == 1000
        # 0.5 s of callbacks in turns of 5 ms: others ran between them.
        assert len(set(turns_of_others)) >= 40
