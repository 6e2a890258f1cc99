#!/usr/bin/env bash
# Train on Slurm: one Ray on all nodes of the allocation, the launcher on the first.
#
#   sbatch --nodes=2 cluster/slurm.sh recipes/mmlink_13b.yaml launch.num_workers=16 [key=value ...]
#
# Submit from a folder that all nodes see, with the environment active in which samtrain is installed (sbatch passes
# PATH and every other variable on, MLFLOW_TRACKING_URI and NCCL_* among them). Options of sbatch win over those below.
#
# The launcher is started on the head itself and not by `ray job submit`, because Ray keeps no exit status of a job that
# was stopped and gives 1 for every other failure. So the exit status here is the run's: 0 success, 2 bad recipe or
# input, 1 failure, 143 stopped with a checkpoint saved. After 1 or 143 the same command again, or `scontrol requeue`,
# goes on from the newest checkpoint; so does Slurm itself where a node died (--requeue).

#SBATCH --job-name=samtrain
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --cpus-per-task=72
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
if (($# == 0)); then
    echo "usage: sbatch [option ...] cluster/slurm.sh RECIPE [key=value ...]" >&2
    exit 2
fi
python -m samtrain.launch --print-config "$@" >/dev/null # a recipe that cannot be read ends here, with 2

# This Ray is this job's alone, also where two jobs share a node: its port, its folder and its token are its own.
# Some of Ray's ports listen on all interfaces, and whoever reaches them without a token may run anything.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0
unset RAY_ADDRESS # of another cluster
head=$(python -c 'import ray; print(ray.util.get_node_ip_address())')
export HEAD_ADDRESS="$head:$((20000 + SLURM_JOB_ID % 10000))"
export RAY_FOLDER="/tmp/ray-$SLURM_JOB_ID" # short: sockets lie in it, and their paths may have 107 characters

# One task a node; the first is the head. They try to reach it for two minutes. Ray counts a machine's cores and not
# what Slurm grants of them; GPUs it counts by CUDA_VISIBLE_DEVICES, which Slurm sets.
# shellcheck disable=SC2016 # the variables are those of each node
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    bash -euc '
    role=(--address "$HEAD_ADDRESS")
    if ((SLURM_PROCID == 0)); then
        role=(--head --node-ip-address "${HEAD_ADDRESS%:*}" --port "${HEAD_ADDRESS#*:}" --include-dashboard false
              --temp-dir "$RAY_FOLDER")
    fi
    exec ray start "${role[@]}" --num-cpus "$SLURM_CPUS_PER_TASK" --log-color false --block' &
ray=$!
trap 'kill -TERM "$ray" 2>/dev/null || true; wait "$ray" || true' EXIT

until (exec 3<>"/dev/tcp/${HEAD_ADDRESS%:*}/${HEAD_ADDRESS#*:}") 2>/dev/null; do
    kill -0 "$ray" 2>/dev/null || { echo "slurm.sh: Ray did not start, see above" >&2; exit 1; }
    sleep 0.5
done
python - "$HEAD_ADDRESS" "$SLURM_JOB_NUM_NODES" <<'PYTHON'
import sys, time
import ray

address, expected = sys.argv[1], int(sys.argv[2])
ray.init(address=address, logging_level="ERROR", log_to_driver=False)
deadline = time.monotonic() + 300
while (joined := sum(node["Alive"] for node in ray.nodes())) < expected:
    if time.monotonic() > deadline:
        sys.exit(f"slurm.sh: {joined} of {expected} nodes have joined Ray at {address} after 300 s")
    time.sleep(0.5)
PYTHON

python -m samtrain.launch --address "$HEAD_ADDRESS" "$@" &
launcher=$!
# Slurm signals this script alone (--signal=B:...), and `wait` returns when it does: wait until the launcher has ended.
trap 'kill -TERM "$launcher" 2>/dev/null || true' TERM
while kill -0 "$launcher" 2>/dev/null; do
    wait "$launcher" || true
done
status=0
wait "$launcher" || status=$?
exit "$status"
