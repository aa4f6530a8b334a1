# What the scripts of this folder share: sourced in the checkout's root by root, with the script's name in `name`.

[ "$(id -u)" = 0 ] || { echo "$name starts daemons: run it as root" >&2; exit 2; }
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 PYTHONPATH=$PWD
place=$(mktemp -d)
mark="# dsclip test-cluster $$"
daemons=()
# A demo run of small batches, without evaluation, that saves where a script asks for it.
tiny=(batch.global_batch_size=16 train.log_every=5 train.save_every=1000 "train.output=$place/runs"
    eval.every_steps=1000 eval.zeroshot_shards=null eval.retrieval_shards=null eval.hard_negatives_shards=null)

say() { echo "$name: $*"; }
# is_there PROGRAM...: whether all are installed.
is_there() { for program; do command -v "$program" >/dev/null || return 1; done; }
install() {
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null
}
# until_true SECONDS COMMAND: waits for the command to succeed.
until_true() {
    local until=$((SECONDS + $1)); shift
    until "$@"; do
        [ "$SECONDS" -lt "$until" ] || { say "timed out: $*"; exit 1; }
        sleep 1
    done
}
logged() { grep -q "$1" "$2" 2>/dev/null; }
# ended CODE: ends the script's daemons, takes its names out of /etc/hosts, and shows the logs of a script that failed.
ended() {
    [ "$1" = 0 ] || tail -n 30 "$place"/*.out "$place"/*.log 2>/dev/null || true
    for pid in "${daemons[@]}"; do kill "$pid" 2>/dev/null || true; done
    grep -v "$mark" /etc/hosts >"$place/hosts" || true
    cat "$place/hosts" >/etc/hosts  # in place: a container's /etc/hosts is a mount
    wait || true
    [ "$1" = 0 ] && rm -rf "$place" || echo "$name failed; logs are in $place" >&2
}
