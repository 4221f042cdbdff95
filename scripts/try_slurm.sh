#!/usr/bin/env bash
# Runs infra/slurm/latentcache.sbatch for real, on a Slurm of two nodes on this machine: as root,
#
#   apt-get install slurm-wlm munge && bash scripts/try_slurm.sh
#
# from the repository's root, with `latentcache` and `ray` on the PATH. Checks that a job's exit code is
# the run's, that one out of time queues itself again and completes, and that nothing stays.
set -euo pipefail

[[ $EUID == 0 ]] || { echo "this starts Slurm's daemons and has to be root" >&2; exit 1; }
script=$PWD/infra/slurm/latentcache.sbatch
folder=$(mktemp -d /tmp/try-slurm.XXXXXX)
export SLURM_CONF=$folder/slurm.conf LATENTCACHE_TMPDIR=$folder
daemons=()
finish() {
  scancel --user=root 2>/dev/null || true
  kill "${daemons[@]}" 2>/dev/null || true
  wait "${daemons[@]}" 2>/dev/null || true
  rm -rf "$folder"
}
trap finish EXIT
fail() {
  echo "FAILED: $*" >&2
  tail -n 40 "$folder"/*.log >&2
  exit 1
}

free_port() {
  python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}
mkdir -p "$folder"/{state,spool.try1,spool.try2}
chmod 755 "$folder"
head -c 1024 /dev/urandom >"$folder/munge.key"
chmod 400 "$folder/munge.key"
cat >"$SLURM_CONF" <<CONF
ClusterName=try
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that is queued again waits until the credential of its first start has expired.
AuthInfo=socket=$folder/munge.socket,cred_expire=10
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MinJobAge=3600
NodeName=try1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$(free_port) CPUs=1
NodeName=try2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$(free_port) CPUs=1
PartitionName=all Nodes=ALL Default=YES State=UP
CONF
echo "CgroupPlugin=cgroup/v1" >"$folder/cgroup.conf"

munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
  --pid-file="$folder/munge.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" &
daemons+=($!)
slurmctld -D -f "$SLURM_CONF" >"$folder/slurmctld.log" 2>&1 &
daemons+=($!)
for node in try1 try2; do
  slurmd -D -N "$node" -f "$SLURM_CONF" >"$folder/slurmd.$node.log" 2>&1 &
  daemons+=($!)
done
for ((tries = 60; ; tries--)); do
  [[ $(sinfo --noheader --format='%T %D' 2>/dev/null) == "idle 2" ]] && break
  ((tries)) || fail "the nodes do not come up"
  sleep 1
done
sinfo --version

field() { scontrol show job "$1" | tr ' ' '\n' | sed -n "s/^$2=//p"; }
# until_is JOB FIELD VALUE: wait for it.
until_is() {
  for ((tries = 240; tries; tries--)); do
    [[ $(field "$1" "$2") == $3 ]] && return
    sleep 0.5
  done
  fail "job $1 has $2=$(field "$1" "$2"), not $3"
}
submit() { (cd "$folder" && sbatch --parsable --nodes=2 "$script" "$@"); }

cd "$folder"
latentcache demo-data shards --shards 6 --samples 24 >/dev/null
cat >config.yaml <<'YAML'
name: try-slurm
source: {shards: shards/*.tar}
transform: {resolution_px: 256, min_side_px: 64}
vae: {checkpoint: demo}
output: {url: latents}
rejects: {max_rate: 0.5}
compute: {num_gpus: 0, num_cpu_actors: 2, decode_threads: 1}
YAML

echo "== a run out of time queues itself again, and completes"
job=$(submit config.yaml)
for ((tries = 240; ; tries--)); do
  [[ -n $(ls latents/commits 2>/dev/null) ]] && break
  ((tries)) || fail "no unit was committed"
  sleep 0.25
done
scancel --batch --signal=USR1 "$job"
until_is "$job" Restarts 1
echo "   stopped after $(ls latents/commits | wc -l) of 6 units"
scontrol release "$job" 2>/dev/null || true
until_is "$job" JobState COMPLETED
[[ $(field "$job" ExitCode) == 0:0 ]] || fail "exit code $(field "$job" ExitCode)"
grep -h '^{' "latentcache-$job.log"
grep -q '"status": "interrupted"' "latentcache-$job.log" || fail "it was not stopped"
latentcache verify latents || fail "what it made is not whole"

echo "== a run's exit code is the job's"
job=$(submit config.yaml --set compute.num_gpu=1)
until_is "$job" JobState FAILED
[[ $(field "$job" ExitCode) == 2:0 ]] || fail "exit code $(field "$job" ExitCode)"

echo "== a job that is told to stop does, and is not queued again"
rm -r latents
job=$(submit config.yaml)
for ((tries = 240; tries; tries--)); do
  [[ -n $(ls latents/commits 2>/dev/null) ]] && break
  sleep 0.25
done
scancel --batch --signal=TERM "$job"
until_is "$job" JobState FAILED
[[ $(field "$job" ExitCode) == 1:0 ]] || fail "exit code $(field "$job" ExitCode)"

echo "== nothing stays"
ls -d "$folder"/lc-* 2>/dev/null && fail "temporary folders are left"
pgrep --full "$folder/lc-" && fail "processes are left"
echo "all well"
