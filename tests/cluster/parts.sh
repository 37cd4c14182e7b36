# shellcheck shell=bash
# Part of scripts/cluster: the processes; how each is started, known again and stopped.

# In the order of their start.
PARTS=(registry s3 etcd containerd apiserver controller-manager scheduler kube-proxy kubelet)

# The TCP ports that a part listens on; taken ones are reported before it fails on them.
declare -A PORTS=(
    [registry]="5000" [s3]="8333 8334 8335 8336" [etcd]="2379 2380" [apiserver]="6443"
    [controller-manager]="10257" [scheduler]="10259" [kube-proxy]="10249 10256"
    [kubelet]="10248 10250"
)

# started_at prints the start time of a process in clock ticks since boot. With it a pid is one
# process: the number alone may be another's after a reboot.
started_at() {
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return
    read -ra stat <<<"${stat##*) }"
    [ "${stat[0]}" != Z ] && echo "${stat[19]}"
}

alive() { # alive PART
    local pid ticks
    { read -r pid ticks <"$RUN/pids/$1"; } 2>/dev/null && [ "$(started_at "$pid")" = "$ticks" ]
}

all_alive() {
    local part
    for part in "${PARTS[@]}"; do alive "$part" || return; done
}

node_ready() {
    kubectl get node "$NODE" \
        -o jsonpath='{.status.conditions[?(@.type=="Ready")].status}' 2>/dev/null | grep -q True
}

run_in_background() { # run_in_background PART COMMAND...
    local part=$1 pid
    shift
    # 9 is the lock of `up`, which must not live as long as the part.
    setsid nohup "$@" >>"$RUN/logs/$part.log" 2>&1 </dev/null 9>&- &
    pid=$!
    echo "$pid $(started_at "$pid")" >"$RUN/pids/$part"
}

start_part() { # start_part PART
    local bin=$DIR/bin pki=$RUN/pki part=$1
    local qps=${ASYNCRT_CLUSTER_QPS:-20}
    if alive "$part"; then return; fi
    check_ports "$part"
    case $part in
    registry) run_in_background registry docker-registry serve "$RUN/registry.yaml" ;;
    s3) # pods reach S3 through the bridge; what is behind it asks for no credentials
        run_in_background s3 "$DIR/venv/bin/weed" server -dir="$RUN/s3" -ip=127.0.0.1 \
            -ip.bind=127.0.0.1 -volume.port=8334 -filer.port=8335 -master.port=8336 \
            -s3 -s3.ip.bind=0.0.0.0 -s3.port=8333 -s3.config="$RUN/s3.json" \
            -s3.port.iceberg=0 -s3.port.lance=0 -volume.max=20 -master.volumeSizeLimitMB=256
        ;;
    etcd) # its data does not outlive the cluster: no fsync
        run_in_background etcd "$bin/etcd" --data-dir "$RUN/etcd" --unsafe-no-fsync \
            --quota-backend-bytes 4294967296 \
            --listen-client-urls http://127.0.0.1:2379 \
            --advertise-client-urls http://127.0.0.1:2379 \
            --listen-peer-urls http://127.0.0.1:2380
        ;;
    containerd) run_in_background containerd containerd -c "$RUN/containerd.toml" ;;
    apiserver)
        run_in_background apiserver "$bin/kube-apiserver" --etcd-servers=http://127.0.0.1:2379 \
            --bind-address=0.0.0.0 --advertise-address="$(node_ip)" --client-ca-file="$pki/ca.crt" \
            --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key" \
            --service-account-key-file="$pki/sa.pub" \
            --service-account-signing-key-file="$pki/sa.key" \
            --service-account-issuer=https://kubernetes.default.svc \
            --service-cluster-ip-range="$SERVICES" --authorization-mode=Node,RBAC \
            --allow-privileged --kubelet-client-certificate="$pki/admin.crt" \
            --kubelet-client-key="$pki/admin.key" --kubelet-certificate-authority="$pki/ca.crt" \
            --kubelet-preferred-address-types=InternalIP
        ;;
    controller-manager)
        run_in_background controller-manager "$bin/kube-controller-manager" \
            --kubeconfig="$RUN/admin.kubeconfig" --leader-elect=false \
            --kube-api-qps="$qps" --kube-api-burst="$((qps * 2))" \
            --service-account-private-key-file="$pki/sa.key" --root-ca-file="$pki/ca.crt" \
            --use-service-account-credentials=false
        ;;
    scheduler)
        run_in_background scheduler "$bin/kube-scheduler" --kubeconfig="$RUN/admin.kubeconfig" \
            --leader-elect=false --kube-api-qps="$qps" --kube-api-burst="$((qps * 2))"
        ;;
    kube-proxy) # conntrack's limits belong to the machine: 0 leaves them alone
        run_in_background kube-proxy "$bin/kube-proxy" --kubeconfig="$RUN/admin.kubeconfig" \
            --hostname-override="$NODE" --cluster-cidr="$SUBNET" --proxy-mode=iptables \
            --conntrack-max-per-core=0 --conntrack-tcp-timeout-established=0 \
            --conntrack-tcp-timeout-close-wait=0
        ;;
    kubelet)
        run_in_background kubelet "$bin/kubelet" --kubeconfig="$RUN/kubelet.kubeconfig" \
            --config="$RUN/kubelet.yaml" --hostname-override="$NODE" --node-ip="$(node_ip)" \
            --root-dir="$RUN/kubelet"
        ;;
    kwok)
        run_in_background kwok "$DIR/bin/kwok" --kubeconfig="$RUN/admin.kubeconfig" \
            --config="$RUN/hollow_stages.yaml" --manage-all-nodes=false \
            --manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake --cidr=10.245.0.0/16
        ;;
    esac
}

check_ports() { # check_ports PART
    local port holder _
    for port in ${PORTS[$1]:-}; do
        for _ in {1..25}; do # a process that was just killed lets go of its port a moment later
            holder=$(ss -Hltnp "sport = :$port")
            if [ -z "$holder" ]; then continue 2; fi
            sleep 0.2
        done
        holder=$(sed -n 's/.*users:(("\([^"]*\)",pid=\([0-9]*\).*/\1 (process \2)/p' <<<"$holder")
        die "port $port, which $1 needs, is taken by ${holder:-another program}: stop that first"
    done
}

# stop_parts ends the parts together: asks first, kills what is still there after 10 s.
stop_parts() {
    local part pid _
    for part in "$@"; do
        if alive "$part"; then
            read -r pid _ <"$RUN/pids/$part"
            kill "$pid" 2>/dev/null || true
        fi
    done
    for _ in {1..100}; do
        none_alive "$@" && break
        sleep 0.1
    done
    for part in "$@"; do
        if alive "$part"; then
            say "$part did not end within 10 s: killing it"
            read -r pid _ <"$RUN/pids/$part"
            kill -9 "$pid" 2>/dev/null || true
            while alive "$part"; do sleep 0.05; done
        fi
        rm -f "$RUN/pids/$part"
    done
}

none_alive() {
    local part
    for part in "$@"; do
        if alive "$part"; then return 1; fi
    done
}

# wait_for says what it waits for only if that takes long.
wait_for() { # wait_for SECONDS WHAT COMMAND...
    local limit=$1 what=$2 begin=$SECONDS told=no
    shift 2
    until "$@" >/dev/null 2>&1; do
        if ((SECONDS - begin >= limit)); then
            die "$what is not ready after $limit s; see $RUN/logs"
        fi
        if ((SECONDS - begin >= 2)) && [ "$told" = no ]; then
            say "waiting for $what (at most $limit s)"
            told=yes
        fi
        sleep 0.2
    done
}
