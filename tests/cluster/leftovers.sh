# shellcheck shell=bash
# Part of scripts/cluster: what the parts leave behind on the machine; how `down` removes it and
# makes sure. Ours is what names our directory, the bridge cni0, a pod's cgroup, or a chain of the
# names that Kubernetes and CNI plugins give.

CHAINS='(KUBE|CNI)-[A-Z0-9a-z-]+'

# our_processes prints the pids of the parts and of all pods, whoever is their parent. It asks for
# all processes at once: one by one would take seconds on a busy machine.
our_processes() {
    { # each may find nothing, or lose a process that ends meanwhile, which is no error
        find /proc/[0-9]*/exe -maxdepth 0 -lname "$DIR/*" 2>/dev/null || true
        debian_programs_in_our_directory || true
        grep -ls ':/kubepods' /proc/[0-9]*/cgroup || true
    } | cut -d/ -f3 | sort -un
}

debian_programs_in_our_directory() {
    grep -lsaF "$RUN/" /proc/[0-9]*/cmdline | sed 's/cmdline$/exe/' |
        while read -r program; do
            find "$program" -maxdepth 0 -printf '%p %l\n' 2>/dev/null || true
        done | grep -E '/(containerd[a-z0-9-]*|docker-registry|runc)( \(deleted\))?$'
}

our_mounts() { awk -v below="$RUN/" 'index($2, below) == 1 {print $2}' /proc/mounts | sort -r; }

our_interfaces() {
    { ip -o link show master cni0; ip -o link show dev cni0; } 2>/dev/null |
        awk -F': ' '{sub(/@.*/, "", $2); print $2}'
    # Named at `down`'s begin: a port of a bridge that is gone cannot be told from others.
    local name
    while read -r name; do
        if [ -e "/sys/class/net/$name" ]; then echo "$name"; fi
    done < <(cat "$RUN/interfaces" 2>/dev/null)
}

our_routes() { ip route show table all 2>/dev/null | grep -E '(^| )10\.24[45]\.| dev cni0( |$)'; }

our_rules() {
    local save
    for save in iptables-save ip6tables-save; do
        "$save" 2>/dev/null | grep -E "^:$CHAINS |$CHAINS" | sed "s/^/${save%-save} /"
    done
}

our_cgroups() {
    find /sys/fs/cgroup -depth -type d \( -path '*/kubepods' -o -path '*/kubepods/*' \) 2>/dev/null
}

# our_sockets prints the sockets that containerd's shims have left; their place cannot be chosen.
our_sockets() {
    local socket
    for socket in /run/containerd/s/*; do
        if [ -S "$socket" ] && ! ss -Hxl 2>/dev/null | grep -qF "$socket"; then echo "$socket"; fi
    done
}

# our_log_links prints the links to pods' logs that the kubelet makes, whatever podLogsDir says.
our_log_links() {
    if [ -d /var/log/containers ]; then find /var/log/containers -type l -lname "$RUN/*"; fi
}

remove_leftovers() {
    our_interfaces | sort -u >"$RUN/interfaces.new" || true
    mv "$RUN/interfaces.new" "$RUN/interfaces"
    kill_processes
    our_mounts | xargs -r -d '\n' umount -l 2>/dev/null || true
    our_interfaces | sort -u | xargs -r -n1 ip link delete 2>/dev/null || true
    remove_rules iptables
    remove_rules ip6tables
    our_cgroups | xargs -r -d '\n' rmdir 2>/dev/null || true
    our_sockets | xargs -r -d '\n' rm -f
    our_log_links | xargs -r -d '\n' rm -f
    rmdir /var/log/containers 2>/dev/null || true # unless others use it
    restore_sysctls
}

# kill_processes does not ask first: nothing is kept that could be damaged. The kubelet and
# containerd's shims may start another process meanwhile, so it looks again until there is none.
kill_processes() {
    local pids _
    for _ in {1..50}; do
        mapfile -t pids < <(our_processes)
        if [ ${#pids[@]} -eq 0 ]; then return; fi
        kill -9 "${pids[@]}" 2>/dev/null || true
        sleep 0.1
    done
}

# remove_rules takes out the rules that jump into our chains, then the chains; it never writes a
# whole table, which would undo what another program changes meanwhile.
remove_rules() { # remove_rules iptables|ip6tables
    local table rule chain words
    for table in filter nat mangle raw; do
        while read -r rule; do
            mapfile -t words < <(unquote <<<"${rule/#-A/-D}")
            "$1" -w -t "$table" "${words[@]}" 2>/dev/null || true
        done < <("$1" -w -t "$table" -S 2>/dev/null |
            grep -E -- "^-A .*$CHAINS" | grep -vE -- "^-A $CHAINS")
        mapfile -t words < <("$1" -w -t "$table" -S 2>/dev/null |
            sed -nE "s/^-N ($CHAINS)\$/\1/p")
        for chain in "${words[@]}"; do "$1" -w -t "$table" -F "$chain" 2>/dev/null || true; done
        for chain in "${words[@]}"; do "$1" -w -t "$table" -X "$chain" 2>/dev/null || true; done
    done
}

# unquote prints the words of a line that iptables has quoted as for a shell. A shell would also
# run what stands in a comment.
unquote() { python3 -c 'import shlex, sys; print(*shlex.split(sys.stdin.read()), sep="\n")'; }

restore_sysctls() {
    local name value
    while read -r name value; do
        echo "$value" >"/proc/sys/${name//.//}" || say "could not set $name back to $value"
    done < <(cat "$RUN/sysctls" 2>/dev/null)
}

# list_leftovers prints one line for everything of ours that is still there.
list_leftovers() {
    local kind
    for kind in processes mounts interfaces routes rules cgroups sockets log_links; do
        # grep and find fail where there is nothing.
        { "our_$kind" || true; } | sed "s/^/left of ${kind/_/ }: /"
    done
}
