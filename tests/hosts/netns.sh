#!/usr/bin/env bash
# Hosts on one machine: a network, mount, host-name and process namespace each, with an sshd, joined by a bridge.
#
#   netns.sh up [N]            make N hosts (default 2), node1 ... nodeN = 10.77.0.1 ... on a bridge; runs again safely
#   netns.sh exec HOST CMD...  run a command on a host, in the working directory and environment it is called with
#   netns.sh pid HOST          the host's process 1 as seen from outside (kill -9 it: power failure of the host)
#   netns.sh hosts N SLOTS     print a DeepSpeed hostfile
#   netns.sh link HOST up|down cable in, cable out (at the switch)
#   netns.sh down              end every host's processes, remove all that `up` made
#
# Needs root, iproute2, util-linux, openssh-server, openssh-client; pdsh for DeepSpeed's default launcher. Nothing
# outside the namespaces is changed but /run/netns; state lies in $NETNS_STATE. File systems are shared by all hosts
# (as a cluster's are), but for /root/.ssh, /root/.cache, /etc/hosts, /etc/ssh, /run/sshd, which are each host's own.
set -euo pipefail
state=${NETNS_STATE:-${TMPDIR:-/tmp}/deepnarrow-netns}
prefix=${NETNS_PREFIX:-dn}
net=${NETNS_NET:-10.77.0}

die() { echo "netns.sh: $*" >&2; exit 1; }
pid_of() { cat "$state/$1/pid" 2>/dev/null || die "no host $1"; }
number() { echo "${1#node}"; }

up() {
    local n=${1:-2} i
    down
    mkdir -p "$state"; chmod 700 "$state"
    for i in /run/sshd /root/.ssh /root/.cache; do  # to mount each host's own over; gone again with `down`
        [ -d "$i" ] || { mkdir -p "$i" && echo "$i" >> "$state/made"; }
    done
    ssh-keygen -q -t ed25519 -N '' -f "$state/id" -C netns-throwaway
    ip netns add "$prefix-switch"
    ip -n "$prefix-switch" link add br0 type bridge
    ip -n "$prefix-switch" link set br0 up
    ip -n "$prefix-switch" link set lo up
    : > "$state/known_hosts"
    for i in $(seq "$n"); do
        local host=node$i dir=$state/node$i
        mkdir -p "$dir/ssh" "$dir/dotssh" "$dir/run" "$dir/cache"
        ssh-keygen -q -t ed25519 -N '' -f "$dir/ssh/ssh_host_ed25519_key"
        echo "$host,$net.$i $(cut -d' ' -f1,2 "$dir/ssh/ssh_host_ed25519_key.pub")" >> "$state/known_hosts"
        ip netns add "$prefix-$host"
        ip -n "$prefix-switch" link add "v$i" type veth peer name eth0 netns "$prefix-$host"
        ip -n "$prefix-switch" link set "v$i" master br0 up
        ip -n "$prefix-$host" addr add "$net.$i/24" dev eth0
        ip -n "$prefix-$host" link set eth0 up
        ip -n "$prefix-$host" link set lo up
    done
    for i in $(seq "$n"); do
        local host=node$i dir=$state/node$i j
        { echo "127.0.0.1 localhost"
          for j in $(seq "$n"); do
              echo "$net.$j node$j"
          done; } > "$dir/hosts"
        cp "$state/id" "$dir/dotssh/id_ed25519"; cp "$state/id.pub" "$dir/dotssh/authorized_keys"
        cp "$state/known_hosts" "$dir/dotssh/known_hosts"
        chmod 700 "$dir/dotssh"; chmod 600 "$dir/dotssh/"*
        cat > "$dir/ssh/sshd_config" <<CFG
Port 22
HostKey /etc/ssh/ssh_host_ed25519_key
PidFile none
PasswordAuthentication no
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
MaxStartups 100:30:200
CFG
        : > "$dir/ssh/ssh_config"
        # Process 1 of the host: a shell that makes it one, then sshd in the foreground.
        ip netns exec "$prefix-$host" setsid unshare --mount --uts --pid --fork --mount-proc --kill-child \
            bash -c '
                hostname "$1"
                mount --bind "$2/hosts" /etc/hosts
                mount --bind "$2/ssh" /etc/ssh
                mount --bind "$2/dotssh" /root/.ssh
                mount --bind "$2/cache" /root/.cache
                mount --bind "$2/run" /run/sshd; chmod 755 /run/sshd
                exec "$(command -v sshd)" -D -E "$2/sshd.log" -f /etc/ssh/sshd_config
            ' _ "$host" "$dir" </dev/null >"$dir/init.log" 2>&1 &
        echo $! > "$dir/outer"
    done
    for i in $(seq "$n"); do
        local dir=$state/node$i child='' tries=0
        while :; do
            # outer is `unshare` itself (ip, setsid exec it); its one child is the host's process 1
            child=$(pgrep -P "$(cat "$dir/outer")" || true)
            if [ -n "$child" ] && nsenter -t "$child" -n -- bash -c 'exec 3<>/dev/tcp/127.0.0.1/22' 2>/dev/null; then break; fi
            tries=$((tries + 1)); [ $tries -lt 100 ] || { cat "$dir/init.log" >&2; die "node$i: no sshd after 10 s"; }
            sleep 0.1
        done
        echo "$child" > "$dir/pid"
    done
}

down() {
    local dir ns
    for dir in "$state"/node*/; do
        [ -f "$dir/outer" ] || continue
        # --kill-child: the host's process 1 goes with `unshare`, and with process 1 all of the host
        [ -f "$dir/pid" ] && kill -9 "$(cat "$dir/pid")" 2>/dev/null || true
        kill -9 "$(cat "$dir/outer")" 2>/dev/null || true
    done
    for ns in $(ip netns list | awk -v p="^$prefix-(switch|node[0-9]+)$" '$1 ~ p {print $1}'); do
        ip netns del "$ns"
    done
    if [ -f "$state/made" ]; then xargs -r rmdir --ignore-fail-on-non-empty < "$state/made"; fi
    rm -rf "$state"
}

case ${1:-} in
    up) shift; up "$@" ;;
    down) down ;;
    pid) pid_of "$2" ;;
    exec) host=$2; shift 2
        exec nsenter -t "$(pid_of "$host")" -n -m -u -p -- bash -c 'cd "$1" && shift && exec "$@"' _ "$PWD" "$@" ;;
    hosts) for i in $(seq "$2"); do echo "node$i slots=$3"; done ;;
    link) ip -n "$prefix-switch" link set "v$(number "$2")" "$3" ;;
    *) die "up [N] | down | exec HOST CMD... | pid HOST | hosts N SLOTS | link HOST up|down" ;;
esac
