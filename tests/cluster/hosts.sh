#!/bin/bash
# Two hosts on this machine, and on them `deepspeed --hostfile`, `torchrun` and a host that is lost; a few minutes.
#
#   sudo env "PATH=$PATH" make test-cluster        as root, on Debian or Ubuntu; installs sshd and pdsh where they are missing
#
# A host is a network namespace with an address, a host name and an sshd of its own; both have this machine's files, as a cluster has
# its shared ones. /etc/hosts and ssh's settings know the two while it runs. docs/clusters.md shows what it prints.
set -euo pipefail
cd "$(dirname "$0")/../.."
name=hosts.sh
. tests/cluster/common.sh
is_there sshd ssh pdsh ip || install openssh-server openssh-client pdsh iproute2

hosts=(dsclip-h1 dsclip-h2)
bridge=dsclip-br
ssh_settings=/etc/ssh/ssh_config.d/dsclip-test-cluster.conf

cleanup() {
    code=$?
    for host in "${hosts[@]}"; do
        ip netns pids "$host" 2>/dev/null | xargs -r kill -KILL 2>/dev/null || true
        ip netns del "$host" 2>/dev/null || true
    done
    ip link del "$bridge" 2>/dev/null || true
    rm -f "$ssh_settings"
    ended "$code"
}
trap cleanup EXIT
trap 'exit 1' INT TERM

ip link add "$bridge" type bridge
ip addr add 10.77.0.1/24 dev "$bridge"
ip link set "$bridge" up
ssh-keygen -q -t ed25519 -N '' -f "$place/key"
ssh-keygen -q -t ed25519 -N '' -f "$place/host_key"
cat >"$ssh_settings" <<CONF
Host dsclip-h1 dsclip-h2
    IdentityFile $place/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
CONF
cat >"$place/sshd_config" <<CONF
HostKey $place/host_key
AuthorizedKeysFile $place/key.pub
StrictModes no
PidFile none
UsePAM no
LogLevel ERROR
SetEnv DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=eth0 PYTHONPATH=$PYTHONPATH
CONF
chmod 755 "$place"
mkdir -p /run/sshd
start() {  # start HOST ADDRESS: the host, with its network and its sshd
    ip netns add "$1"
    ip link add "$1" type veth peer name eth0 netns "$1"  # one end here has the host's name, the other is its eth0
    ip link set "$1" master "$bridge" up
    ip -n "$1" addr add "$2/24" dev eth0
    ip -n "$1" link set eth0 up
    ip -n "$1" link set lo up
    echo "$2 $1 $mark" >>/etc/hosts
    (ip netns exec "$1" unshare --uts sh -c "hostname $1; exec $(command -v sshd) -D -e -f '$place/sshd_config'" 2>"$place/$1.log" &)
    until_true 20 ssh "$1" true 2>/dev/null
}
start dsclip-h1 10.77.0.11
start dsclip-h2 10.77.0.12
printf '%s slots=1\n' "${hosts[@]}" >"$place/hostfile"
say "$(ssh dsclip-h1 'hostname; hostname -I' | xargs), $(ssh dsclip-h2 'hostname; hostname -I' | xargs); $(ssh -V 2>&1 | cut -d, -f1), pdsh $(pdsh -V 2>/dev/null | head -n 1 | grep -o '[0-9.]*' | head -n 1)"

# on HOST COMMAND: in the checkout, as someone who is logged in there.
on() { ssh "$1" "export PATH='$PATH'; cd '$PWD' && exec $2"; }
# processes HOST WORD: ids of the processes there that have the word in their command.
processes() {
    local pid
    for pid in $(ip netns pids "$1"); do
        ! grep -qa "$2" "/proc/$pid/cmdline" 2>/dev/null || echo "$pid"
    done
}
nothing_left() { [ -z "$(processes dsclip-h1 train.py)$(processes dsclip-h2 train.py)" ]; }
losses() { python - "$1" <<'PYTHON'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
print({row["step"]: row["loss"] for row in rows if "loss" in row})
PYTHON
}
train="launchers/train.py --config demo ${tiny[*]} optim.warmup_steps=5"

# 1. deepspeed's launcher over ssh: the losses are those of two ranks on one host.
here="deepspeed --num_gpus 2 $train train.name=one_host train.steps=15"
on dsclip-h1 "$here" >"$place/one_host.out" 2>&1
across="deepspeed --hostfile $place/hostfile"
on dsclip-h1 "$across $train train.name=ssh train.steps=15" >"$place/ssh.out" 2>&1
[ "$(losses "$place/runs/one_host/metrics.jsonl")" = "$(losses "$place/runs/ssh/metrics.jsonl")" ]
say "deepspeed --hostfile: $(losses "$place/runs/ssh/metrics.jsonl"), as two ranks on one host"

# 2. The launcher is told to stop, and with it every connection ends: both hosts save and end all the same, and nothing is left.
on dsclip-h1 "$across $train train.name=stopped train.steps=1000" >"$place/stopped.out" 2>&1 & launched=$!
until_true 180 logged '"step": 5[,}]' "$place/runs/stopped/metrics.jsonl"
kill -TERM $(processes dsclip-h1 bin/deepspeed)
code=0; wait "$launched" || code=$?
until_true 60 nothing_left
say "SIGTERM to deepspeed: exit code $code, nothing left on either host; saved $(ls "$place/runs/stopped/checkpoints")"

# 3. torchrun on each host, which find each other.
rendezvous="torchrun --nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_endpoint dsclip-h1:29512 --rdzv_id dsclip"
on dsclip-h2 "$rendezvous $train train.name=torchrun train.steps=15" >"$place/torchrun2.out" 2>&1 & launched=$!
on dsclip-h1 "$rendezvous $train train.name=torchrun train.steps=15" >"$place/torchrun1.out" 2>&1
wait "$launched"
[ "$(losses "$place/runs/one_host/metrics.jsonl")" = "$(losses "$place/runs/torchrun/metrics.jsonl")" ]
say "torchrun with a c10d rendezvous: the same losses"

# 4. A host is lost: its cable is pulled, and with it every packet. The other says so and ends; the run goes on there alone.
lost="train.name=lost train.steps=40 train.save_every=10 train.hang_timeout=0.5"
on dsclip-h1 "$across $train $lost" >"$place/lost.out" 2>&1 & launched=$!
until_true 180 test -d "$place/runs/lost/checkpoints/step_00000010"
ip link set dsclip-h2 down
began=$SECONDS
end_of_h1() { [ -z "$(processes dsclip-h1 local_rank)" ]; }
until_true 180 end_of_h1
say "dsclip-h2 is cut off: dsclip-h1 ended after $((SECONDS - began)) s, and says"
grep -a 'dsclip:' "$place/lost.out" | head -n 4 | cut -c 1-400 | sed 's/^/    /'
ip netns pids dsclip-h2 | xargs -r kill -KILL
kill "$launched" 2>/dev/null || true
on dsclip-h1 "deepspeed --num_gpus 1 $train $lost --resume auto" >"$place/alone.out" 2>&1
grep 'continued from' "$place/alone.out" | sed 's/^/    /'
logged '"step": 40[,}]' "$place/runs/lost/metrics.jsonl"
say "the run went on with one rank and is at step 40; all passed"
