# The life of a job, sourced by every slurm/*.sbatch. docs/operations.md has the signals and exit codes.
# Each cluster's particulars are in $SAMBALM_CLUSTER.env: in the folder $SAMBALM_CLUSTERS where that is set, else in
# configs/clusters of the folder that the job was submitted in, else among those that the package brings.

# shellcheck shell=bash
set -uo pipefail
leaving= # why this job is to end soon
trap 'leaving="told to leave"; scancel --quiet --signal=TERM "$SLURM_JOB_ID"' USR1 TERM
shipped=$(cd "$(dirname "${BASH_SOURCE[0]}")/../configs/clusters" && pwd) || exit
cd "$SLURM_SUBMIT_DIR" || exit
cluster=${SAMBALM_CLUSTER:-generic}
clusters=${SAMBALM_CLUSTERS:-configs/clusters}
[[ ${SAMBALM_CLUSTERS:-} || -f $clusters/$cluster.env ]] || clusters=$shipped
if [[ ! -f $clusters/$cluster.env ]]; then
    echo "error: $clusters has no $cluster.env, which SAMBALM_CLUSTER names" >&2
    exit 2
fi
set -a
# shellcheck source=/dev/null
. "$clusters/$cluster.env"
# What that file leaves out.
# shellcheck source=/dev/null
. "$shipped/generic.env"
set +a
python=${SAMBALM_PYTHON:-$SLURM_SUBMIT_DIR/.venv/bin/python}
job_name="job$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
steps=0 # of this job, each with a rendezvous port of its own

say() { echo "$(date '+%F %T') $job_name: $*"; }

# Runs a command on nodes: on_nodes LOG NODE,NODE,... COMMAND... Signals are for the ranks; this waits for them.
on_nodes() {
    local log=$1 nodes=$2 count; shift 2
    count=$(tr ',' '\n' <<<"$nodes" | wc -l)
    srun --nodes="$count" --ntasks="$count" --ntasks-per-node=1 --nodelist="$nodes" --kill-on-bad-exit=1 --wait=60 \
        --overlap --cpu-bind=none --export=ALL --open-mode=append --output="$log" \
        bash -c 'trap "" USR1; exec "$@"' - "$@" &
    local pid=$! status
    while wait $pid; status=$?; kill -0 $pid 2>/dev/null; do :; done
    return $status
}

# Runs ranks on nodes: ranks_on LOG ATTEMPT_DIR NODES MODULE ARGUMENTS...
ranks_on() {
    local log=$1 attempt=$2 nodes=$3; shift 3
    local port=$((20000 + (SLURM_JOB_ID * 16 + steps++) % 20000))
    on_nodes "$log" "$nodes" "$python" -m sambalm.slurm.agent "$attempt" $port "$RANKS_PER_NODE" "$@"
}

# Nodes of the job that are up, separated by commas. Of a job with --no-kill, lost nodes leave the allocation.
living_nodes() {
    sinfo --noheader --Node --format='%N %T' --nodes="$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%N)" |
        awk '$2 !~ /down|fail|drain|unk|boot|\*/ && !seen[$1]++ {print $1}' | paste -sd,
}

# Sets $nodes to those to train on, by the health checks; bad ones are reported in the attempt's folder.
pick_nodes() {
    local needed=$1 run_dir=$2 attempt=$3 living names; shift 3
    living=$(living_nodes)
    on_nodes "$attempt/health.log" "$living" timeout 120 \
        "$python" -m sambalm.slurm.health node "$attempt/health" "$run_dir"
    IFS=, read -ra names <<<"$living"
    nodes=$("$python" -m sambalm.slurm.health pick "$attempt" "$needed" "${names[@]}") || return 1
    if [[ ${CHECK_LINKS:-1} == 1 ]]; then
        if ! ranks_on "$attempt/health.log" "$attempt/health" "$nodes" sambalm.slurm.health links "$attempt/links"; then
            say "the nodes did not come together for an all-reduce: see $attempt/health.log"
            return 1
        fi
    fi
    IFS=, read -ra names <<<"$nodes"
    nodes=$("$python" -m sambalm.slurm.health pick "$attempt" "$needed" "${names[@]}") || return 1
    nodes=$(cut -d, -f"1-$needed" <<<"$nodes")
}

# Prints all nodes that the job is to do without, those of `sbatch --exclude` too: excluded_with NEEDED NODE,NODE,...
# Fails where its partition would have too few left: Slurm would leave the job pending for good.
excluded_with() {
    local needed=$1 all rest; shift
    all=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%x)
    [[ ! $all || $all == "(null)" ]] && all=$1 || all=$1,$all
    rest=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format=%N | sort -u |
        grep --invert-match --line-regexp --fixed-strings --file=<(scontrol show hostnames "$all") --count)
    ((rest >= needed)) && echo "$all"
}

# Starts this job again from its newest checkpoint, elsewhere than on bad nodes; or leaves that to its successor
# (`sambalm slurm submit --chain`), or to Slurm where it is ending the job already: scancel, a preemption.
start_again() {
    local state bad excluded=
    if [[ ${SAMBALM_SUCCESSOR:-0} == 1 ]]; then
        say "$1; the next job of the chain goes on"
        exit 0
    fi
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
    if [[ $state != RUNNING ]]; then
        say "$1; Slurm is ending this job ($state)"
        exit "$REQUEUE"
    fi
    if ((${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS)); then
        say "$1; not requeued: MAX_RESTARTS=$MAX_RESTARTS is reached"
        exit "$REQUEUE"
    fi
    bad=$(paste -sd, "$run_dir/attempts/$SAMBALM_ATTEMPT/bad_nodes" 2>/dev/null)
    if [[ $bad ]] && ! excluded=$(excluded_with "$needed" "$bad"); then
        say "$bad may be given to this job again: partition $SLURM_JOB_PARTITION has too few others"
    fi
    say "$1; requeueing"
    trap '' TERM USR1
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        say "Slurm does not requeue this job: submit it again to go on"
        exit "$REQUEUE"
    fi
    [[ $excluded ]] && scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$excluded"
    exit 0
}

newest_checkpoint() {
    local folders=("$1"/checkpoints/step_*)
    [[ -e ${folders[-1]} ]] && echo "${folders[-1]##*/}"
}

# train_job CONFIG NODES [section.key=value]...
train_job() {
    local config=$1 needed=$2 prepared run_dir limit attempt nodes next code reason; shift 2
    prepared=$("$python" -W ignore -m sambalm.slurm.prepare $((needed * RANKS_PER_NODE)) "$config" "$@") || exit
    read -r REQUEUE NO_PROGRESS limit run_dir <<<"$prepared"
    local crashes=0 newest # since a checkpoint was made: the ranks count too, but not those that die as they start
    newest=$(newest_checkpoint "$run_dir")
    for ((try = 0; ; try++)); do
        export SAMBALM_ATTEMPT="$job_name.$try"
        attempt=$run_dir/attempts/$SAMBALM_ATTEMPT
        mkdir -p "$attempt"
        pick_nodes "$needed" "$run_dir" "$attempt" || start_again "${leaving:-too few nodes are fit to train}"
        [[ $leaving ]] && start_again "$leaving"
        say "training on $nodes; logs: $attempt/NODE.log"
        # After a crash torchrun first starts the ranks again where they are; then the nodes are checked.
        IN_JOB_RESTARTS=${IN_JOB_RESTARTS:-1} \
            ranks_on "$attempt/%N.log" "$attempt" "$nodes" sambalm.pretrain.cli train "$config" "$@"
        read -r next code reason <<<"$("$python" -m sambalm.slurm.outcome "$attempt")"
        case $next in
            finish) say "finished"; exit 0 ;;
            requeue) start_again "$reason" ;;
            end) say "not started again: $reason; logs: $attempt/NODE.log"; exit "$code" ;;
            *) # retry
                say "attempt $SAMBALM_ATTEMPT crashed: see $attempt"
                [[ $leaving ]] && start_again "$leaving"
                [[ $(newest_checkpoint "$run_dir") == "$newest" ]] || crashes=0
                newest=$(newest_checkpoint "$run_dir")
                if ((++crashes > limit)); then
                    say "not started again: $crashes crashes without a new checkpoint"
                    exit "$NO_PROGRESS"
                fi ;;
        esac
    done
}
