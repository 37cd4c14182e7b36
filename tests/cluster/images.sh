# shellcheck shell=bash
# Part of scripts/cluster: the images that tests use, made here and pushed to the registry once.

make_images() {
    has_image pause 3 || make_pause
    has_image library/python 3.11-slim || make_python 3.11-slim bookworm
    has_image library/python 3.13-slim || make_python 3.13-slim trixie
    has_image library/nopython 1 || make_empty
}

has_image() { # has_image REPOSITORY TAG
    curl -fsS -o /dev/null -H 'Accept: application/vnd.oci.image.manifest.v1+json' \
        "http://$REGISTRY/v2/$1/manifests/$2" 2>/dev/null
}

push_rootfs() { python3 "$sources/push_rootfs.py" "http://$REGISTRY" "$@"; }

# make_pause makes what holds a pod's namespaces: a program that waits, and nothing else.
make_pause() {
    local directory
    say "making the pause image"
    directory=$(mktemp -d)
    CGO_ENABLED=0 go build -C "$sources/pause" -trimpath -ldflags '-s -w' -o "$directory/pause" .
    tar -C "$directory" --owner 0 --group 0 -cf "$directory/pause.tar" pause
    push_rootfs pause 3 "$directory/pause.tar" --entrypoint /pause
    rm -rf "$directory"
}

# make_python makes what the official image of that name holds, as far as tests see, from Debian's
# packages: `python` and `pip` on PATH, pip allowed to install.
make_python() { # make_python TAG SUITE
    local archive
    say "making python:$1 from Debian $2 (about a minute)"
    archive=$(mktemp)
    # shellcheck disable=SC2016 # $1 is the hook's, the new root
    mmdebstrap --quiet --format=tar --variant=minbase \
        --include=python3,python3-pip,python3-venv,ca-certificates \
        --customize-hook='for name in python python3; do
            ln -s /usr/bin/python3 "$1/usr/local/bin/$name"; done
            ln -s /usr/bin/pip3 "$1/usr/local/bin/pip"' \
        --customize-hook='cd "$1"; rm -rf var/cache/apt/* var/lib/apt/lists/* usr/share/doc/*' \
        "$2" "$archive" >>"$RUN/logs/mmdebstrap.log" 2>&1 ||
        die "mmdebstrap failed; Debian's archive must be reachable; see $RUN/logs/mmdebstrap.log"
    push_rootfs library/python "$1" "$archive" --cmd python3 --env PIP_BREAK_SYSTEM_PACKAGES=1
    rm -f "$archive"
}

# make_empty makes an image with nothing in it, not even a shell.
make_empty() {
    local archive
    archive=$(mktemp)
    tar -cf "$archive" -T /dev/null
    push_rootfs library/nopython 1 "$archive" --cmd /bin/sh
    rm -f "$archive"
}

ctr_k8s() { ctr -a "$RUN/containerd/containerd.sock" -n k8s.io "$@"; }

# pull_images brings the images to the node. Unpacked at a test's first pod, they would take seconds
# of its time; later tests would find them there.
pull_images() {
    local name library=docker.io/library
    for name in "$REGISTRY/pause:3" $library/{python:3.11-slim,python:3.13-slim,nopython:1}; do
        if [ -z "$(ctr_k8s images ls -q "name==$name")" ]; then
            ctr_k8s images pull --hosts-dir "$RUN/hosts" "$name"
        fi
    done >"$RUN/logs/pull.log" 2>&1
}
