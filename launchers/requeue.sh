#!/bin/bash
# Runs a SLURM job's command, and puts the job back into the queue when that ended with exit code 75: stopped by a signal, and saved.
#
#   bash launchers/requeue.sh srun python launchers/train.py --resume auto train.name=b32
#
# In a batch script of a job with --requeue; launchers/slurm.sbatch and the scripts of tools/sweep.py are such. A job goes back at most
# DSCLIP_MOST_REQUEUES times (100): srun returns the highest code of its tasks, so that one rank may have failed where 75 is returned.

# srun doesn't take over sbatch's --cpus-per-task.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}"
most=${DSCLIP_MOST_REQUEUES:-100}
"$@"
code=$?
if [ "$code" = 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "$most" ]; then
    echo "requeue.sh: stopped by a signal and saved; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
elif [ "$code" = 75 ]; then
    echo "requeue.sh: ended with 75 once more after $most requeues; not put back. Send it again if it got on (DSCLIP_MOST_REQUEUES: more of them)" >&2
fi
exit "$code"
