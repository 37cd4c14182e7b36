"""What the keys of a Lithops file mean here, and which of them mean nothing.

Names: https://lithops-cloud.github.io/docs/source/configuration.html
The section ``k8s`` has the same keys in both and is not treated here, but for the ignored ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

from asyncrt.configfile import Entry

# Key in the file: our key.
_TRANSLATED: Final[Mapping[str, str]] = {
    "lithops.backend": "asyncrt.backend",
    "lithops.chunksize": "asyncrt.chunksize",
    "lithops.execution_timeout": "asyncrt.timeout",
    "lithops.max_workers": "asyncrt.max_workers",
    "lithops.workers": "asyncrt.max_workers",
    "lithops.worker_processes": "asyncrt.slots",
    # There, this machine is one worker with many processes.
    "localhost.worker_processes": "local.max_workers",
}
_BACKENDS: Final = {"localhost": "local"}

# Value of `lithops.storage`: its sections, the later ones over the earlier ones.
_STORAGES: Final[Mapping[str, tuple[str, ...]]] = {
    "aws_s3": ("aws", "aws_s3"),
    "ceph": ("ceph",),
    "minio": ("minio",),
}
_STORAGE_KEYS: Final[Mapping[str, str]] = {
    "access_key_id": "s3.access_key_id",
    "endpoint": "s3.endpoint",
    "region": "s3.region",
    "region_name": "s3.region",
    "secret_access_key": "s3.secret_access_key",
    "session_token": "s3.session_token",
    "storage_bucket": "s3.bucket",
}

IGNORED_SECTIONS: Final = frozenset(
    {
        "aliyun",
        "aliyun_fc",
        "aliyun_oss",
        "aws_batch",
        "aws_ec2",
        "aws_lambda",
        "azure",
        "azure_batch",
        "azure_containers",
        "azure_functions",
        "azure_storage",
        "azure_vms",
        "code_engine",
        "gcp",
        "gcp_cloudrun",
        "gcp_compute_engine",
        "gcp_functions",
        "gcp_storage",
        "ibm",
        "ibm_cf",
        "ibm_cos",
        "ibm_vpc",
        "infinispan",
        "knative",
        "openwhisk",
        "oracle",
        "oracle_f",
        "oracle_oss",
        "rabbitmq",
        "redis",
        "serverless",
        "singularity",
        "standalone",
        "swift",
        "vm",
    }
)
SECTIONS: Final = IGNORED_SECTIONS | {"lithops", "localhost", "aws", "aws_s3", "ceph", "minio"}


def is_ignored(section: str, key: str) -> bool:
    """Tell whether a key of a section that both have means nothing here."""
    return section == "k8s" and key.startswith(("master_", "rabbitmq_"))


def translate(sections: Mapping[str, Entry]) -> Iterator[tuple[str | None, Entry]]:
    """Yield our key for each key of Lithops' own sections; ``None`` where it means nothing.

    Args:
        sections: The file's sections; those that mean something are mappings or empty.
    """
    storage = _storage(sections)
    for name in ("aws", *sorted(SECTIONS - {"aws"})):
        section = sections.get(name)
        if section is None or section.value is None:
            continue
        if name in IGNORED_SECTIONS:
            yield None, section
            continue
        for key, entry in (section.items or {}).items():
            if name == "lithops" and key == "backend" and isinstance(entry.value, str):
                yield (
                    "asyncrt.backend",
                    replace(entry, value=_BACKENDS.get(entry.value, entry.value)),
                )
            elif f"{name}.{key}" == "lithops.storage" and storage:
                continue
            elif name in storage:
                yield _STORAGE_KEYS.get(key), entry
            else:
                yield _TRANSLATED.get(f"{name}.{key}"), entry


def _storage(sections: Mapping[str, Entry]) -> tuple[str, ...]:
    """Return the storage sections that the file chooses."""
    lithops = sections.get("lithops")
    chosen = (lithops.items or {}).get("storage") if lithops else None
    return _STORAGES.get(str(chosen.value), ()) if chosen else ()
