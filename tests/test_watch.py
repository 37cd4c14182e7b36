"""The watch, in virtual time over scripted answers: nothing lost, told twice, or out of order."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest

from asyncrt.backends.kubeapi import LineStream
from asyncrt.backends.watch import Watch
from asyncrt.errors import KubernetesError
from asyncrt.testing import run_in_virtual_time

Object = dict[str, Any]
PATH = "/api/v1/namespaces/team/pods"


def pod(name: str, version: int, uid: str | None = None) -> Object:
    metadata = {
        "namespace": "team",
        "name": name,
        "uid": uid or f"uid-{name}",
        "resourceVersion": str(version),
        "managedFields": [{"manager": "kubelet"}],
    }
    return {"kind": "Pod", "apiVersion": "v1", "metadata": metadata, "status": {}}


def line(kind: str, item: Object) -> bytes:
    return msgspec.json.encode({"type": kind, "object": item}) + b"\n"


def bookmark(version: int, *, ends_list: bool = False) -> bytes:
    metadata: Object = {"resourceVersion": str(version), "creationTimestamp": None}
    if ends_list:
        metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
    return line("BOOKMARK", {"kind": "Pod", "apiVersion": "v1", "metadata": metadata})


def error_line(code: int, *, retry_after: int | None = None) -> bytes:
    details = {} if retry_after is None else {"retryAfterSeconds": retry_after}
    status = {
        "kind": "Status",
        "code": code,
        "reason": "Expired",
        "message": "no",
    }
    return line("ERROR", {**status, "details": details})


def refused(status: int, *, retry_after: float | None = None, reason: str = "") -> KubernetesError:
    return KubernetesError("no", status=status, retry_after=retry_after, reason=reason)


class Sleep(float):
    """Seconds in which a stream says nothing."""


Step = bytes | Sleep | KubernetesError
SILENCE = Sleep(10**6)


class ScriptedApi:
    """Answers with what the test wrote down, and remembers what it was asked, and when."""

    def __init__(self, *, lists: list[Any] = (), streams: list[Any] = ()) -> None:  # type: ignore[assignment]
        self.lists = list(lists)
        self.streams = list(streams)
        self.asked: list[tuple[float, Object]] = []

    async def request(
        self, method: str, path: str, *, query: dict[str, str | int | bool] | None = None
    ) -> Object:
        assert (method, path) == ("GET", PATH)
        await anyio.lowlevel.checkpoint()
        self.asked.append((anyio.current_time(), dict(query or {})))
        answer = self.lists.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return dict(answer)

    @asynccontextmanager
    async def stream_lines(
        self,
        path: str,
        *,
        query: dict[str, str | int | bool] | None = None,
        idle_timeout: float = 90.0,
    ) -> AsyncIterator[LineStream]:
        assert path == PATH
        await anyio.lowlevel.checkpoint()
        self.asked.append((anyio.current_time(), dict(query or {})))
        if not self.streams:
            raise DoneError
        steps = self.streams.pop(0)
        if isinstance(steps, Exception):
            raise steps
        left: list[Step] = list(steps)

        async def read() -> bytes:
            await anyio.lowlevel.checkpoint()
            while left:
                step = left.pop(0)
                if isinstance(step, Sleep):
                    await anyio.sleep(step)
                elif isinstance(step, Exception):
                    raise step
                else:
                    return step
            return b""

        yield LineStream(read, idle_timeout=idle_timeout)


class DoneError(Exception):
    """The script is over."""


class Watched:
    """A watch over a script, run to the script's end."""

    def __init__(self, api: ScriptedApi, **options: Any) -> None:
        self.api = api
        self.told: list[str] = []
        self.objects: list[Object] = []
        self._watch = Watch(
            api,
            PATH,
            on_event=self._on_event,
            on_synced=lambda: self.told.append("synced"),
            chance=random.Random(1),
            **options,
        )

    def _on_event(self, kind: str, item: Object) -> None:
        assert "managedFields" not in item["metadata"]
        assert (item["kind"], item["apiVersion"]) == ("Pod", "v1")
        self.objects.append(item)
        metadata = item["metadata"]
        self.told.append(f"{kind} {metadata['name']} {metadata['resourceVersion']}")

    async def run(self) -> Watched:
        with pytest.raises(DoneError):
            await self._watch.run()
        return self

    async def run_to_error(self) -> KubernetesError:
        with pytest.raises(KubernetesError) as caught:
            await self._watch.run()
        return caught.value

    @property
    def times(self) -> list[float]:
        return [at for at, _ in self.api.asked]

    @property
    def pauses(self) -> list[float]:
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


def page(*items: Object, version: int, more: str = "") -> Object:
    metadata: Object = {"resourceVersion": str(version)}
    if more:
        metadata["continue"] = more
    bare = [{k: v for k, v in item.items() if k not in ("kind", "apiVersion")} for item in items]
    return {"kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": bare}


def in_virtual_time(
    test: Callable[[], Coroutine[Any, Any, None]],
) -> Callable[[], None]:
    def run() -> None:
        run_in_virtual_time(test)

    run.__name__ = test.__name__
    return run


FIRST = [line("ADDED", pod("a", 1)), line("ADDED", pod("b", 2)), bookmark(5, ends_list=True)]


@in_virtual_time
async def test_a_list_in_the_stream_is_told_and_followed() -> None:
    stream = [*FIRST, line("MODIFIED", pod("a", 6)), line("DELETED", pod("b", 7))]
    watched = await Watched(ScriptedApi(streams=[stream]), label_selector="x=y").run()
    assert watched.told == ["ADDED a 1", "ADDED b 2", "synced", "MODIFIED a 6", "DELETED b 7"]
    first, second = (query for _, query in watched.api.asked)
    assert first["sendInitialEvents"] is True
    assert first["resourceVersionMatch"] == "NotOlderThan"
    assert "resourceVersion" not in first
    assert second["resourceVersion"] == "7"
    assert "sendInitialEvents" not in second
    for query in (first, second):
        assert query["labelSelector"] == "x=y"
        assert query["watch"] is query["allowWatchBookmarks"] is True
        assert 240 <= query["timeoutSeconds"] <= 480


@pytest.mark.parametrize("refusal", [400, 422])
def test_a_server_that_cannot_list_in_a_stream_is_listed_in_pages(refusal: int) -> None:
    async def main() -> None:
        lists = [page(pod("a", 1), version=5, more="next"), page(pod("b", 2), version=5)]
        api = ScriptedApi(lists=lists, streams=[refused(refusal), [line("ADDED", pod("c", 6))]])
        watched = await Watched(api, field_selector="f=g").run()
        assert watched.told == ["ADDED a 1", "ADDED b 2", "synced", "ADDED c 6"]
        queries = [query for _, query in api.asked]
        assert [query.get("continue") for query in queries[1:3]] == [None, "next"]
        assert all(query["fieldSelector"] == "f=g" for query in queries)
        assert queries[1]["limit"] == 100
        assert queries[3]["resourceVersion"] == "5"

    run_in_virtual_time(main)


@in_virtual_time
async def test_a_server_that_ignores_the_wish_for_a_list_is_listed_after_20_s() -> None:
    api = ScriptedApi(
        lists=[page(pod("a", 1), version=5)],
        streams=[[line("ADDED", pod("a", 1)), SILENCE], [line("ADDED", pod("c", 6))]],
    )
    watched = await Watched(api).run()
    assert watched.told == ["ADDED a 1", "synced", "ADDED c 6"]
    assert watched.pauses[0] == pytest.approx(20)


@in_virtual_time
async def test_410_in_mid_stream_lists_again_and_tells_the_difference() -> None:
    again = [
        line("ADDED", pod("a", 1)),  # as it was
        line("ADDED", pod("c", 8)),  # new
        line("ADDED", pod("d", 9, uid="another")),  # another one of the same name
        bookmark(9, ends_list=True),
    ]
    first = [*FIRST, line("ADDED", pod("d", 6)), error_line(410)]
    watched = await Watched(ScriptedApi(streams=[first, again])).run()
    assert watched.told[3:] == [
        "ADDED d 6",
        "ADDED c 8",
        "DELETED d 6",
        "ADDED d 9",
        "DELETED b 2",
        "synced",
    ]
    assert [query.get("resourceVersion") for _, query in watched.api.asked] == [None, None, "9"]


@in_virtual_time
async def test_410_of_a_page_begins_the_list_again() -> None:
    lists = [
        page(pod("a", 1), version=5, more="old"),
        refused(410),
        page(pod("b", 6), version=7),
    ]
    watched = await Watched(ScriptedApi(lists=lists, streams=[refused(422)])).run()
    assert watched.told == ["ADDED a 1", "ADDED b 6", "DELETED a 1", "synced"]


@in_virtual_time
async def test_a_stream_that_ends_goes_on_where_it_was_by_bookmark() -> None:
    streams = [[*FIRST, bookmark(50)], [line("MODIFIED", pod("a", 51))], []]
    watched = await Watched(ScriptedApi(streams=streams)).run()
    assert [query.get("resourceVersion") for _, query in watched.api.asked] == [
        None,
        "50",
        "51",
        "51",
    ]
    assert watched.told.count("synced") == 1


@in_virtual_time
async def test_a_stream_that_ends_within_its_list_begins_again() -> None:
    streams = [[FIRST[0]], FIRST]
    watched = await Watched(ScriptedApi(streams=streams)).run()
    assert watched.told == ["ADDED a 1", "ADDED b 2", "synced"]


@in_virtual_time
async def test_what_goes_away_while_the_list_is_told_is_told_once() -> None:
    stream = [FIRST[0], line("DELETED", pod("a", 3)), bookmark(5, ends_list=True)]
    watched = await Watched(ScriptedApi(streams=[stream])).run()
    assert watched.told == ["ADDED a 1", "DELETED a 3", "synced"]


@in_virtual_time
async def test_duplicate_and_unknown_events_are_told_once_or_never() -> None:
    stream = [
        *FIRST,
        *[line("MODIFIED", pod("a", 6))] * 2,
        line("DELETED", pod("never", 7)),
        line("DELETED", pod("b", 8, uid="of a former one")),
        *[line("DELETED", pod("b", 9))] * 2,
    ]
    watched = await Watched(ScriptedApi(streams=[stream])).run()
    assert watched.told[3:] == ["MODIFIED a 6", "DELETED b 9"]


@in_virtual_time
async def test_half_a_line_is_dropped_and_comes_again() -> None:
    event = line("MODIFIED", pod("a", 6))
    streams = [[*FIRST, event[:20]], [event[:9], event[9:]]]
    watched = await Watched(ScriptedApi(streams=streams)).run()
    assert watched.told[3:] == ["MODIFIED a 6"]


@in_virtual_time
async def test_an_eof_every_second_slows_down_and_an_event_speeds_up_again() -> None:
    event = line("MODIFIED", pod("a", 6))
    streams = [FIRST, *[[Sleep(1)]] * 12, [event], []]
    watched = await Watched(ScriptedApi(streams=streams)).run()
    waits = [pause - 1 for pause in watched.pauses[1:13]]
    assert 0.05 <= waits[0] <= 0.4
    assert all(15 <= wait <= 30 for wait in waits[-3:])
    assert watched.pauses[13] <= 0.1


@in_virtual_time
async def test_streams_that_live_as_long_as_they_should_are_opened_again_at_once() -> None:
    long = [step for n in range(5) for step in (Sleep(60), bookmark(100 + n))]
    watched = await Watched(ScriptedApi(streams=[FIRST, *[long] * 10])).run()
    assert all(pause <= 300.5 for pause in watched.pauses[1:])


@in_virtual_time
async def test_a_silent_stream_is_dead_after_90_seconds() -> None:
    streams = [[*FIRST, Sleep(80), bookmark(6), SILENCE], [line("MODIFIED", pod("a", 7))]]
    watched = await Watched(ScriptedApi(streams=streams)).run()
    assert watched.told[3:] == ["MODIFIED a 7"]
    assert 170 <= watched.pauses[0] <= 170.2
    assert watched.api.asked[1][1]["resourceVersion"] == "6"


@pytest.mark.parametrize("where", ["answer", "stream"])
def test_retry_after_is_a_minimum(where: str) -> None:
    async def main() -> None:
        refusal: Any = refused(429, retry_after=7)
        if where == "stream":
            refusal = [error_line(500, retry_after=7)]
        watched = await Watched(ScriptedApi(streams=[refusal, FIRST])).run()
        assert 7 <= watched.pauses[0] < 7.2
        assert watched.told[-1] == "synced"

    run_in_virtual_time(main)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_for_good_ends_the_watch(status: int) -> None:
    async def main() -> None:
        error = await Watched(ScriptedApi(streams=[FIRST, refused(status)])).run_to_error()
        assert error.status == status

    run_in_virtual_time(main)


@in_virtual_time
async def test_a_certificate_that_does_not_fit_ends_the_watch() -> None:
    error = await Watched(ScriptedApi(streams=[refused(0, reason="TLS")])).run_to_error()
    assert error.reason == "TLS"


@in_virtual_time
async def test_no_contact_for_five_minutes_ends_the_watch() -> None:
    watched = Watched(ScriptedApi(streams=[FIRST, *[refused(0, reason="Unreachable")] * 1000]))
    error = await watched.run_to_error()
    assert error.reason == "Unreachable"
    assert 300 < watched.times[-1] - watched.times[0] < 331


@in_virtual_time
async def test_a_break_of_the_connection_is_survived() -> None:
    streams = [[*FIRST, refused(0, reason="Broken")], [line("MODIFIED", pod("a", 7))]]
    watched = await Watched(ScriptedApi(streams=streams)).run()
    assert watched.told[3:] == ["MODIFIED a 7"]


@pytest.mark.parametrize(
    "junk", [b"{}\n", b"not json\n", b"[]\n", line("ADDED", {}), line("ADDED", {"metadata": {}})]
)
def test_what_is_not_an_event_breaks_the_stream_not_the_watch(junk: bytes) -> None:
    async def main() -> None:
        streams = [[*FIRST, junk], [line("MODIFIED", pod("a", 7))]]
        watched = await Watched(ScriptedApi(streams=streams)).run()
        assert watched.told[3:] == ["MODIFIED a 7"]

    run_in_virtual_time(main)


@in_virtual_time
async def test_a_bug_in_a_callback_is_not_mistaken_for_a_broken_stream() -> None:
    def on_event(kind: str, item: Object) -> None:
        raise KeyError(kind)

    with pytest.raises(KeyError, match="ADDED"):
        await Watch(ScriptedApi(streams=[FIRST]), PATH, on_event=on_event).run()
