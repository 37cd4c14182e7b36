"""Push the tar archive of a root file system to a registry as an image, with no container engine.

Usage: push_rootfs.py REGISTRY_URL REPOSITORY TAG TAR [--entrypoint CMD | --cmd CMD] [--env K=V]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import platform
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

MEDIA_TYPE = "application/vnd.oci.image"
SYSTEM_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def digest_of(body: bytes) -> str:
    return "sha256:" + hashlib.sha256(body).hexdigest()


def put(url: str, body: bytes, media_type: str) -> None:
    request = urllib.request.Request(url, data=body, method="PUT")  # noqa: S310 - a given registry
    request.add_header("Content-Type", media_type)
    urllib.request.urlopen(request).close()  # noqa: S310 - the same


def push_blob(registry: str, repository: str, body: bytes) -> str:
    """Store one blob, unless the registry has it, and return its digest."""
    digest = digest_of(body)
    blobs = f"{registry}/v2/{repository}/blobs"
    head = urllib.request.Request(f"{blobs}/{digest}", method="HEAD")  # noqa: S310 - the same
    try:
        urllib.request.urlopen(head).close()  # noqa: S310 - the same
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
    else:
        return digest
    begin = urllib.request.Request(f"{blobs}/uploads/", data=b"", method="POST")  # noqa: S310
    with urllib.request.urlopen(begin) as reply:  # noqa: S310 - the same
        location = urllib.parse.urljoin(blobs, reply.headers["Location"])
    separator = "&" if "?" in location else "?"
    target = f"{location}{separator}digest={urllib.parse.quote(digest)}"
    put(target, body, "application/octet-stream")
    return digest


def push_image(
    registry: str, repository: str, tag: str, archive: bytes, settings: dict[str, object]
) -> None:
    """Push an image of one layer. The same archive and settings give the same digest."""
    layer = gzip.compress(archive, compresslevel=1, mtime=0)
    config = json.dumps(
        {
            "architecture": ARCHITECTURES[platform.machine()],
            "os": "linux",
            "config": settings,
            "created": "1970-01-01T00:00:00Z",
            "rootfs": {"type": "layers", "diff_ids": [digest_of(archive)]},
        }
    ).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{MEDIA_TYPE}.manifest.v1+json",
        "config": {
            "mediaType": f"{MEDIA_TYPE}.config.v1+json",
            "size": len(config),
            "digest": push_blob(registry, repository, config),
        },
        "layers": [
            {
                "mediaType": f"{MEDIA_TYPE}.layer.v1.tar+gzip",
                "size": len(layer),
                "digest": push_blob(registry, repository, layer),
            }
        ],
    }
    url = f"{registry}/v2/{repository}/manifests/{tag}"
    put(url, json.dumps(manifest).encode(), f"{MEDIA_TYPE}.manifest.v1+json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("registry", "repository", "tag", "tar"):
        parser.add_argument(name)
    parser.add_argument("--entrypoint")
    parser.add_argument("--cmd")
    parser.add_argument("--env", action="append", default=[])
    arguments = parser.parse_args()
    settings: dict[str, object] = {"Env": [SYSTEM_PATH, *arguments.env]}
    if arguments.entrypoint:
        settings["Entrypoint"] = arguments.entrypoint.split()
    if arguments.cmd:
        settings["Cmd"] = arguments.cmd.split()
    push_image(
        arguments.registry,
        arguments.repository,
        arguments.tag,
        Path(arguments.tar).read_bytes(),
        settings,
    )


if __name__ == "__main__":
    main()
