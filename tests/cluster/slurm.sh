#!/bin/bash
# A SLURM cluster of two nodes on this machine, and on it launchers/slurm.sbatch and a job array of tools/sweep.py; a few minutes.
#
#   sudo env "PATH=$PATH" make test-cluster        as root, on Debian or Ubuntu; installs slurm and munge where they are missing
#
# Both nodes are daemons of this machine with names of their own (slurmd -N), so that tasks are started, signalled and requeued as
# on a cluster, over the loopback device. /etc/hosts knows the two names while it runs. docs/clusters.md shows what it prints.
set -euo pipefail
cd "$(dirname "$0")/../.."
name=slurm.sh
. tests/cluster/common.sh
is_there slurmctld slurmd sbatch munged || install slurmctld slurmd slurm-client munge
export SLURM_CONF=$place/slurm.conf

cleanup() {
    code=$?
    scancel --user root 2>/dev/null || true
    ended "$code"
}
trap cleanup EXIT

state() { scontrol show job "$1" 2>/dev/null | grep -o 'JobState=[A-Z_]*' | cut -d= -f2; }
is() { [ "$(state "$1")" = "$2" ]; }
is_down() { [ "$(sinfo -h -n "$1" -t down -o %D 2>/dev/null)" = 1 ]; }
logged_twice() { [ "$(grep -c "$1" "$2" 2>/dev/null)" = 2 ]; }
# ranks [PROCID]: process ids of the ranks' pythons, or of one rank and its data workers, the oldest first.
ranks() {
    local pid
    for pid in $(pgrep -f '^[^ ]*python[^ ]* launchers/train.py'); do
        ! grep -qz "^SLURM_PROCID=${1:-}" "/proc/$pid/environ" 2>/dev/null || echo "$pid"
    done
}
both_catch_usr1() {
    local pid caught=0
    for pid in $(ranks); do
        ! (( 0x$(awk '/SigCgt/ {print $2}' "/proc/$pid/status" 2>/dev/null || echo 0) >> 9 & 1 )) || caught=$((caught + 1))
    done
    [ "$caught" = 2 ]
}

cat >"$SLURM_CONF" <<CONF
ClusterName=dsclip
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
# A requeued job waits for its credentials to expire, by default two minutes.
AuthInfo=cred_expire=5
# A node that says nothing for so long is down, by default after five minutes.
SlurmdTimeout=30
# Time to save after scancel, on loaded cores too.
KillWait=60
SlurmctldPort=16817
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool.%n
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd.%n.pid
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
NodeName=dsclip-n1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=17001 CPUs=2
NodeName=dsclip-n2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=17002 CPUs=2
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP
CONF
mkdir "$place/state"
echo "127.0.0.1 dsclip-n1 dsclip-n2 $mark" >>/etc/hosts
mkdir -p /run/munge && chown munge: /run/munge
if ! munge -n </dev/null >/dev/null 2>&1; then
    setpriv --reuid munge --regid munge --clear-groups munged --foreground & daemons+=($!)
    until_true 20 sh -c 'munge -n </dev/null >/dev/null 2>&1'
fi
slurmctld -D 2>/dev/null & daemons+=($!)
for node in dsclip-n1 dsclip-n2; do slurmd -D -N "$node" 2>/dev/null & daemons+=($!); done
both_idle() { [ "$(sinfo -h -t idle -o %D 2>/dev/null)" = 2 ]; }
until_true 60 both_idle
say "$(slurmctld -V), $(sinfo -h -o '%D nodes: %N')"

shape=(--nodes 2 --ntasks-per-node 1 --cpus-per-task 2)  # of every job: both nodes, whole
send() { sbatch --parsable "${shape[@]}" --gpus-per-node 0 "$@"; }

# 1. Ranks that end with several codes: srun returns the highest, and a job goes back so often and no more. srun gets the job's cores.
cat >"$place/mixed" <<'PYTHON'
#!/bin/bash
echo "task $SLURM_PROCID: ${SLURM_CPUS_PER_TASK:-no number of} cores"
[ "$SLURM_PROCID" = 0 ] && exit 1
exit 75
PYTHON
chmod +x "$place/mixed"
job=$(DSCLIP_MOST_REQUEUES=1 PYTHON=$place/mixed send --output "$place/mixed.out" launchers/slurm.sbatch)
until_true 120 is "$job" FAILED
say "job $job: $(scontrol show job "$job" | grep -o 'Restarts=[0-9]*'), FAILED; its output:"
sed 's/^/    /' "$place/mixed.out"
logged_twice 'task 0: 2 cores' "$place/mixed.out"
logged_twice 'task 1: 2 cores' "$place/mixed.out"

# 2. Sent by launchers/submit.py, one task a rank; a signal before the first step requeues, one while it trains saves and requeues, and it goes on.
submit() {
    python launchers/submit.py --nodes 2 --ranks-per-node 1 --cpus-per-rank 2 --gpus-per-node 0 --json "$@" |
        python -c 'import json, sys; found = json.load(sys.stdin); print(found.get("job") or sys.exit(found["error"]))'
}
job=$(submit --sbatch=--output="$place/train.out" --config demo train.steps=60 "${tiny[@]}")
metrics=$place/runs/demo/metrics.jsonl
until_true 60 both_catch_usr1
scancel --signal=USR1 "$job"
until_true 60 logged 'back into the queue' "$place/train.out"
logged 'stopped by SIGUSR1 before its first step' "$place/train.out"
say "job $job: USR1 while it began, requeued"
until_true 180 logged '"step": 10[,}]' "$metrics"
scancel --signal=USR1 "$job"
until_true 60 logged_twice 'back into the queue' "$place/train.out"
until_true 60 is "$job" PENDING
say "job $job: USR1 in step 10 or later, saved, requeued"
until_true 240 is "$job" COMPLETED
logged '"step": 60[,}]' "$metrics"
say "job $job: $(scontrol show job "$job" | grep -o 'Restarts=[0-9]*'), COMPLETED; its output:"
sed 's/^/    /' "$place/train.out"

# 3. Tasks of one srun with different arguments are no job; made independent they are.
evaluate="python launchers/evaluate.py --model $place/runs/demo --task zeroshot --data demo:val --max-samples 1\$SLURM_PROCID --json"
code=0; srun "${shape[@]}" sh -c "$evaluate" >"$place/joined.out" 2>"$place/joined.log" || code=$?
[ "$code" = 2 ] && logged 'rank 0 was started with `--max-samples 10` and rank 1 `--max-samples 11`' "$place/joined.out"
srun "${shape[@]}" sh -c "env -u SLURM_STEP_NUM_TASKS $evaluate" >"$place/apart.out" 2>"$place/apart.log"
logged '"samples": 10[,}]' "$place/apart.out" && logged '"samples": 11[,}]' "$place/apart.out"
say "two evaluations in one srun: refused, and with env -u SLURM_STEP_NUM_TASKS two results"

# 4. A rank dies: the others end, and the job is not requeued.
job=$(send --output "$place/dies.out" launchers/slurm.sbatch --config demo train.name=dies train.steps=1000 "${tiny[@]}")
until_true 180 logged '"step": 5[,}]' "$place/runs/dies/metrics.jsonl"
kill -KILL "$(ranks 1 | head -n 1)"
until_true 180 is "$job" FAILED
say "job $job: rank 1 killed, $(scontrol show job "$job" | grep -o 'Restarts=[0-9]*\|ExitCode=[0-9:]*' | xargs), FAILED; its last lines:"
tail -n 6 "$place/dies.out" | cut -c 1-300 | sed 's/^/    /'

# 5. The same, ended by hand: saved, and not requeued.
job=$(send --output "$place/ended.out" launchers/slurm.sbatch --config demo train.name=ended train.steps=1000 "${tiny[@]}")
until_true 180 logged '"step": 5[,}]' "$place/runs/ended/metrics.jsonl"
scancel "$job"
until_true 90 is "$job" CANCELLED
say "job $job: scancel, $(state "$job"), saved: $(ls "$place/runs/ended/checkpoints")"

# 6. A job array of a grid, each task on both nodes; the first is told to stop, and goes on after the second.
cat >"$place/tiny.grid.yaml" <<GRID
name: tiny
recipe:
  model: {preset: demo, vision_width: 32, vision_heads: 1, vision_mlp_width: 64, vision_layers: 1,
          text_width: 32, text_heads: 1, text_mlp_width: 64, text_layers: 1}
  data: {tokenizer: demo, workers: 0}
  batch: {global_batch_size: 16}
  optim: {warmup_steps: 0}
  train: {log_every: 1, save_every: 100, export_hf: false, output: $place/runs/tiny}
  eval: {batch_size: 32, max_samples: 32, zeroshot_shards: demo:val}
axes:
  model: {slow: {optim.lr: 1e-4}, fast: {optim.lr: 1e-3}}
  samples: {s: {samples_seen: 1600, demo_samples: 64}}
GRID
array=$(submit --grid "$place/tiny.grid.yaml" --at-a-time 2)
until_true 180 logged '"step": 5[,}]' "$place/runs/tiny/slow_s/metrics.jsonl"
scancel --signal=USR1 "${array}_1"
finished() { [ -z "$(squeue -h -j "$array" 2>/dev/null)" ]; }
until_true 300 finished
listing=$(python tools/sweep.py "$place/tiny.grid.yaml" --list)
sed 's/^/    /' <<<"$listing"
[ "$(grep -c ' done' <<<"$listing")" = 2 ] || { cat "$place"/runs/tiny/slurm-*.out; exit 1; }
logged 'stopped by SIGUSR1' "$place/runs/tiny/slurm-1.out"
logged 'continued from' "$place/runs/tiny/slurm-1.out"
say "job array $array: both runs are done, the first after USR1 and a requeue"

# 7. The node of a job dies, with all that runs on it: SLURM sends the job to the other one, where it goes on from its checkpoint.
of_job() { grep -lz "^SLURM_JOB_ID=$job\$" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3; }
node_of() { scontrol show job "$1" | grep -o 'BatchHost=[^ ]*' | cut -d= -f2; }
job=$(submit --nodes 1 --sbatch=--output="$place/node.out" --config demo train.name=node train.steps=60 "${tiny[@]}" train.save_every=10)
until_true 180 logged '"step": 20[,}]' "$place/runs/node/metrics.jsonl"
dead=$(node_of "$job")
pkill -KILL -f "^slurmd .*-N $dead\$"
pkill -KILL -f "^slurmstepd: \[$job\."
of_job | xargs -r kill -KILL 2>/dev/null || true
until_true 120 is_down "$dead"
until_true 300 is "$job" COMPLETED
[ "$(node_of "$job")" != "$dead" ] && logged 'continued from' "$place/node.out" && logged '"step": 60[,}]' "$place/runs/node/metrics.jsonl"
say "job $job: its node $dead died, $(scontrol show job "$job" | grep -o 'Restarts=[0-9]*'), COMPLETED on $(node_of "$job"); of its output:"
grep 'took over\|continued from\|^Done' "$place/node.out" | sed 's/^/    /'
say "all passed"
