"""Strategic-merge patches: the documented semantics, and what holds for all patches."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrt.errors import ConfigError
from asyncrt.podpatch import check_pod_patch, merge_pod_patch

Json = dict[str, Any]


def template() -> Json:
    """Return a template with one of everything that is merged in its own way."""
    return {
        "metadata": {"labels": {"app": "a", "tier": "b"}},
        "spec": {
            "restartPolicy": "Never",
            "containers": [
                {
                    "name": "worker",
                    "image": "python",
                    "command": ["python3", "worker.pyz"],
                    "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
                    "volumeMounts": [{"name": "tmp", "mountPath": "/cache"}],
                }
            ],
            "volumes": [{"name": "tmp", "emptyDir": {}}],
            "tolerations": [{"key": "spot", "operator": "Exists"}],
        },
    }


def worker_of(merged: Json) -> Json:
    found: Json = merged["spec"]["containers"][0]
    return found


def merged_worker(patch: Json) -> Json:
    """Return the worker's container after a patch of it."""
    whole = {"spec": {"containers": [{"name": "worker", **patch}]}}
    check_pod_patch(whole)
    return worker_of(merge_pod_patch(template(), whole))


def merged_spec(patch: Json) -> Json:
    check_pod_patch({"spec": patch})
    found: Json = merge_pod_patch(template(), {"spec": patch})["spec"]
    return found


def test_mapping_is_merged_key_by_key_and_null_removes_one() -> None:
    patch = {"metadata": {"labels": {"app": None, "team": "red", "absent": None}}}
    assert merge_pod_patch(template(), patch)["metadata"] == {
        "labels": {"tier": "b", "team": "red"}
    }
    assert merged_spec({"restartPolicy": None, "dnsPolicy": "None"})["dnsPolicy"] == "None"
    assert "restartPolicy" not in merged_spec({"restartPolicy": None})


def test_new_mapping_has_no_nulls_and_no_directives() -> None:
    patch = {"affinity": {"$patch": "replace", "nodeAffinity": {"a": None, "b": 1}}}
    assert merged_spec(patch)["affinity"] == {"nodeAffinity": {"b": 1}}


def test_containers_are_merged_by_name_and_new_ones_follow() -> None:
    containers = merged_spec(
        {"containers": [{"name": "proxy", "image": "p"}, {"name": "worker", "image": "other"}]}
    )["containers"]
    assert [(item["name"], item["image"]) for item in containers] == [
        ("worker", "other"),
        ("proxy", "p"),
    ]
    assert containers[0]["command"] == ["python3", "worker.pyz"]


def test_environment_is_merged_by_name() -> None:
    patch = {"env": [{"name": "B", "value": "3"}, {"name": "C", "value": "4"}]}
    assert [(item["name"], item["value"]) for item in merged_worker(patch)["env"]] == [
        ("A", "1"),
        ("B", "3"),
        ("C", "4"),
    ]


def test_mounts_are_merged_by_path_not_by_name() -> None:
    patch = {"volumeMounts": [{"name": "other", "mountPath": "/cache"}]}
    assert merged_worker(patch)["volumeMounts"] == [{"name": "other", "mountPath": "/cache"}]


@pytest.mark.parametrize("containers", ["initContainers", "ephemeralContainers"])
def test_other_containers_are_merged_as_the_containers_are(containers: str) -> None:
    original = {"spec": {containers: [{"name": "i", "env": [{"name": "A", "value": "1"}]}]}}
    patch = {"spec": {containers: [{"name": "i", "env": [{"name": "B", "value": "2"}]}]}}
    check_pod_patch(patch)
    [merged] = merge_pod_patch(original, patch)["spec"][containers]
    assert [item["name"] for item in merged["env"]] == ["A", "B"]


def test_lists_without_a_key_of_their_own_are_replaced() -> None:
    spec = merged_spec({"tolerations": [{"operator": "Exists"}]})
    assert spec["tolerations"] == [{"operator": "Exists"}]
    assert merged_worker({"command": ["python"]})["command"] == ["python"]
    assert merged_worker({"command": []})["command"] == []


def test_item_is_deleted_by_its_key() -> None:
    patch = {"env": [{"name": "A", "$patch": "delete"}, {"name": "absent", "$patch": "delete"}]}
    assert merged_worker(patch)["env"] == [{"name": "B", "value": "2"}]


def test_list_is_replaced_where_an_item_says_so() -> None:
    patch = {"env": [{"name": "C", "value": "3"}, {"$patch": "replace"}]}
    assert merged_worker(patch)["env"] == [{"name": "C", "value": "3"}]


def test_mapping_is_replaced_or_emptied_where_it_says_so() -> None:
    replaced = {"metadata": {"labels": {"$patch": "replace", "new": "1"}}}
    assert merge_pod_patch(template(), replaced)["metadata"]["labels"] == {"new": "1"}
    deleted = {"metadata": {"labels": {"$patch": "delete"}}}
    assert merge_pod_patch(template(), deleted)["metadata"]["labels"] == {}


def test_source_of_a_volume_is_exchanged_with_retain_keys() -> None:
    patch = {"name": "tmp", "hostPath": {"path": "/scratch"}}
    assert merged_spec({"volumes": [patch]})["volumes"] == [{**patch, "emptyDir": {}}]
    retained = {**patch, "$retainKeys": ["name", "hostPath"]}
    assert merged_spec({"volumes": [retained]})["volumes"] == [patch]


@pytest.mark.parametrize(
    ("patch", "problem"),
    [
        ([], "must be a mapping with 'metadata' and 'spec'"),
        ({"containers": []}, "must be a mapping with 'metadata' and 'spec'"),
        ({"spec": []}, "spec must be a mapping"),
        ({"spec": {1: 2}}, "spec has the key 1, which is no text"),
        ({"spec": {"$patch": "merge"}}, "spec has $patch: 'merge'; it can be"),
        ({"spec": {"$retainKeys": 5}}, "spec has a $retainKeys that is no list of names"),
        ({"spec": {"$setElementOrder/x": []}}, "the directive $setElementOrder/x; known are"),
        ({"spec": {"containers": [{"image": "x"}]}}, "spec.containers has an item without 'name'"),
        ({"spec": {"containers": ["worker"]}}, "spec.containers must be a list of mappings"),
        (
            {"spec": {"containers": [{"name": "a", "env": [{"$patch": "delete"}]}]}},
            "spec.containers.env has an item without 'name'",
        ),
        (
            {"spec": {"volumes": [{"name": "tmp", "$patch": "replace"}]}},
            "spec.volumes is replaced by '$patch: replace' in an item of its own",
        ),
        ({"spec": {"tolerations": [{"$patch": "delete"}]}}, "replaced as a whole"),
        ({"spec": {"tolerations": [{"key": {1}}]}}, "spec.tolerations.key is a set"),
        ({"spec": {"priority": b"1"}}, "spec.priority is a bytes, which JSON has not"),
    ],
)
def test_what_is_no_patch_is_refused_with_its_place(patch: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)) as caught:
        check_pod_patch(patch)
    assert caught.value.key == "pod_patch"
    assert caught.value.expected


# What holds for all patches

names = st.sampled_from(["a", "b", "c"])
scalars = st.one_of(st.booleans(), st.integers(), st.text(max_size=3))


def items(key: str, *, patch: bool) -> st.SearchStrategy[Any]:
    """Return lists that are merged by a key; in patches also with directives."""
    plain = st.fixed_dictionaries({key: names}, optional={"value": scalars})
    if patch:
        deleted = st.fixed_dictionaries({key: names, "$patch": st.just("delete")})
        plain = st.one_of(plain, deleted)
    listed = st.lists(plain, max_size=3, unique_by=lambda item: item[key])
    if patch:
        replaced = listed.map(lambda found: [*found, {"$patch": "replace"}])
        return st.one_of(listed, replaced)
    return listed


def specs(*, patch: bool) -> st.SearchStrategy[Any]:
    value: st.SearchStrategy[Any] = st.one_of(scalars, st.none()) if patch else scalars
    labels: Any = st.dictionaries(names, value, max_size=3)
    if patch:
        directive = st.sampled_from(["replace", "delete"])
        labels = st.one_of(
            labels,
            st.builds(lambda found, word: {**found, "$patch": word}, labels, directive),
        )
    container = st.fixed_dictionaries(
        {"name": names},
        optional={
            "image": value,
            "command": st.lists(st.text(max_size=2), max_size=2),
            "env": items("name", patch=patch),
            "volumeMounts": items("mountPath", patch=patch),
        },
    )
    return st.fixed_dictionaries(
        {},
        optional={
            "metadata": st.fixed_dictionaries({}, optional={"labels": labels}),
            "spec": st.fixed_dictionaries(
                {},
                optional={
                    "containers": st.lists(
                        container, max_size=3, unique_by=lambda item: item["name"]
                    ),
                    "volumes": items("name", patch=patch),
                    "tolerations": st.lists(st.dictionaries(names, scalars), max_size=2),
                    "hostIPC": value,
                },
            ),
        },
    )


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *(leaf for item in value.values() for leaf in leaves(item))]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


@given(specs(patch=False), specs(patch=True))
def test_patch_applied_twice_is_the_patch_applied_once(original: Json, patch: Json) -> None:
    check_pod_patch(patch)
    once = merge_pod_patch(original, patch)
    assert merge_pod_patch(once, patch) == once


@given(specs(patch=False), specs(patch=True))
def test_result_has_no_directive_and_no_null_and_changes_neither_argument(
    original: Json, patch: Json
) -> None:
    before = copy.deepcopy((original, patch))
    merged = merge_pod_patch(original, patch)
    assert (original, patch) == before
    found = leaves(merged)
    assert None not in found
    assert not {"$patch", "$retainKeys"} & {leaf for leaf in found if isinstance(leaf, str)}


@given(specs(patch=False))
def test_empty_patch_changes_nothing_and_a_template_is_a_patch_of_nothing(original: Json) -> None:
    assert merge_pod_patch(original, {}) == original
    assert merge_pod_patch({}, original) == original


@given(specs(patch=False), specs(patch=True))
def test_what_the_patch_does_not_name_stays(original: Json, patch: Json) -> None:
    merged = merge_pod_patch(original, patch)
    for part in ("metadata", "spec"):
        for name, value in original.get(part, {}).items():
            if name not in patch.get(part, {}):
                assert merged[part][name] == value
