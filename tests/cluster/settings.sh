# shellcheck shell=bash
# Part of scripts/cluster: addresses, certificates and the settings files of the parts.

NODE=node1
SUBNET=10.244.0.0/16
GATEWAY=10.244.0.1
SERVICES=10.96.0.0/16
REGISTRY=localhost:5000

# The kernel settings that kubelet, kube-proxy and this script change; `down` puts them back.
SYSCTLS=(
    net.ipv4.ip_forward net.ipv4.conf.all.route_localnet net.bridge.bridge-nf-call-iptables
    vm.overcommit_memory vm.panic_on_oom kernel.panic kernel.panic_on_oops
)

kubectl() { "$DIR/bin/kubectl" --kubeconfig "$RUN/admin.kubeconfig" "$@"; }

# node_ip prints the machine's own address: the kubelet refuses a loopback address as the node's.
node_ip() {
    ip -4 -o addr show scope global |
        awk '$2 !~ /^(cni|docker|veth|br-)/ {split($4, a, "/"); print a[1]; exit}'
}

# forget_if_address_changed: the node's address is in certificates and in etcd; with another one (a
# laptop that moved) a new cluster is needed.
forget_if_address_changed() {
    [ -n "$(node_ip)" ] || die "no IPv4 address but loopback: the node needs one (ip address)"
    if [ -f "$RUN/node_ip" ] && [ "$(cat "$RUN/node_ip")" != "$(node_ip)" ]; then
        say "this machine's address was $(cat "$RUN/node_ip"), is $(node_ip): starting afresh"
        (down)
    fi
    mkdir -p "$RUN"/{cni,logs,pids,pki,etcd,containerd,kubelet,pod-logs,s3} "$DIR/registry"
    node_ip >"$RUN/node_ip"
}

write_settings() {
    remember_sysctls
    write_certificates
    write_kubeconfig admin
    write_kubeconfig kubelet
    write_network_settings
    write_containerd_settings
    write_kubelet_settings
    write_store_settings
}

remember_sysctls() {
    if [ -f "$RUN/sysctls" ]; then return; fi
    local name
    for name in "${SYSCTLS[@]}"; do
        if [ -r "/proc/sys/${name//.//}" ]; then
            printf '%s %s\n' "$name" "$(cat "/proc/sys/${name//.//}")"
        fi
    done >"$RUN/sysctls.new"
    mv "$RUN/sysctls.new" "$RUN/sysctls"
}

write_certificates() {
    local pki=$RUN/pki names
    if [ -f "$pki/done" ]; then return; fi
    names="DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:$NODE"
    names+=",IP:127.0.0.1,IP:$(node_ip),IP:$GATEWAY,IP:${SERVICES%.0/*}.1"
    (
        umask 077
        openssl req -x509 -newkey rsa:2048 -nodes -days 3650 \
            -keyout "$pki/ca.key" -out "$pki/ca.crt" \
            -subj /CN=asyncrt-test -addext keyUsage=critical,keyCertSign,cRLSign
        sign_certificate apiserver /CN=kube-apiserver "$names"
        sign_certificate admin /O=system:masters/CN=admin "$names"
        sign_certificate kubelet "/O=system:nodes/CN=system:node:$NODE" "$names"
        openssl genrsa -out "$pki/sa.key" 2048
        openssl rsa -in "$pki/sa.key" -pubout -out "$pki/sa.pub"
    ) 2>"$RUN/logs/pki.log" || die "openssl failed: $(tail -n3 "$RUN/logs/pki.log")"
    touch "$pki/done"
}

sign_certificate() { # sign_certificate NAME SUBJECT ALTERNATIVE_NAMES
    local pki=$RUN/pki
    openssl req -newkey rsa:2048 -nodes -keyout "$pki/$1.key" -out "$pki/$1.csr" -subj "$2"
    openssl x509 -req -in "$pki/$1.csr" -CA "$pki/ca.crt" -CAkey "$pki/ca.key" -CAcreateserial \
        -days 3650 -out "$pki/$1.crt" \
        -extfile <(printf '%s\n' "subjectAltName=$3" extendedKeyUsage=serverAuth,clientAuth \
            subjectKeyIdentifier=hash authorityKeyIdentifier=keyid)
}

write_kubeconfig() { # write_kubeconfig USER
    cat >"$RUN/$1.kubeconfig" <<YAML
apiVersion: v1
kind: Config
clusters:
- name: asyncrt-test
  cluster: {server: "https://127.0.0.1:6443", certificate-authority: "$RUN/pki/ca.crt"}
users:
- name: $1
  user: {client-certificate: "$RUN/pki/$1.crt", client-key: "$RUN/pki/$1.key"}
contexts:
- name: asyncrt-test
  context: {cluster: asyncrt-test, user: $1}
current-context: asyncrt-test
YAML
}

write_network_settings() {
    cat >"$RUN/cni/10-bridge.conflist" <<JSON
{"cniVersion": "0.4.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "$RUN/ipam",
            "ranges": [[{"subnet": "$SUBNET"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
JSON
}

# containerd: hosts/docker.io makes python:3.11-slim resolve to library/python of our registry.
# Where CAP_SYS_RESOURCE is missing, a negative oom_score_adj would fail every pod. Network
# namespaces are mounted below our directory, so that `down` knows them as ours.
write_containerd_settings() {
    cat >"$RUN/containerd.toml" <<TOML
version = 2
root = "$RUN/containerd/root"
state = "$RUN/containerd/state"
oom_score = 0
[grpc]
  address = "$RUN/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "$REGISTRY/pause:3"
  restrict_oom_score_adj = true
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$RUN/cni"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "$RUN/hosts"
TOML
    mkdir -p "$RUN/hosts/docker.io"
    cat >"$RUN/hosts/docker.io/hosts.toml" <<TOML
server = "http://$REGISTRY"
[host."http://$REGISTRY"]
  capabilities = ["pull", "resolve"]
TOML
}

# kubelet: cgroup v1 machines are welcome (refused by default from 1.35 on), images are never
# collected (they could not be pulled from elsewhere), and tests may start many pods at once.
write_kubelet_settings() {
    cat >"$RUN/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: "$RUN/pki/ca.crt"}
authorization: {mode: Webhook}
tlsCertFile: "$RUN/pki/kubelet.crt"
tlsPrivateKeyFile: "$RUN/pki/kubelet.key"
containerRuntimeEndpoint: "unix://$RUN/containerd/containerd.sock"
podLogsDir: "$RUN/pod-logs"
cgroupDriver: cgroupfs
failSwapOn: false
failCgroupV1: false
resolvConf: /etc/resolv.conf
evictionHard: {nodefs.available: "1%", imagefs.available: "1%", memory.available: 100Mi}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
registryPullQPS: 50
registryBurst: 100
kubeAPIQPS: 100
kubeAPIBurst: 200
maxPods: 500
serializeImagePulls: false
YAML
}

write_store_settings() {
    cat >"$RUN/s3.json" <<JSON
{"identities": [
  {"name": "admin",
   "credentials": [{"accessKey": "asyncrt-admin", "secretKey": "asyncrt-admin-secret"}],
   "actions": ["Admin", "Read", "Write", "List", "Tagging"]},
  {"name": "reader",
   "credentials": [{"accessKey": "asyncrt-reader", "secretKey": "asyncrt-reader-secret"}],
   "actions": ["Read", "List"]}]}
JSON
    cat >"$RUN/registry.yaml" <<YAML
version: 0.1
storage: {filesystem: {rootdirectory: "$DIR/registry"}, delete: {enabled: true}}
http: {addr: "127.0.0.1:5000"}
YAML
}

# prepare_network makes the bridge before the first pod does, since pods and the certificates use
# its address; the CNI plugin takes it as it is.
prepare_network() {
    local module
    for module in overlay br_netfilter; do
        modprobe "$module" 2>/dev/null || true # built in, or not needed, on many kernels
    done
    echo 1 >/proc/sys/net/ipv4/ip_forward
    if ! ip link show cni0 >/dev/null 2>&1; then
        [ -z "$(our_routes)" ] || die "another network uses pods' addresses: $(our_routes)"
        ip link add cni0 type bridge
        ip addr add "$GATEWAY/16" dev cni0
        ip link set cni0 up
    fi
}
