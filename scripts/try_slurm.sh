#!/usr/bin/env bash
# Runs infra/slurm/latentcache.sbatch for real, on a Slurm of two nodes on this machine: as root,
#
#   apt-get install slurm-wlm munge && bash scripts/try_slurm.sh
#
# from the repository's root, with `latentcache` and `ray` on the PATH. One dataset is made by a run
# that is ended in every way Slurm has, and taken up again each time; that takes six minutes on two
# cores. Checked are exit codes, summaries, the dataset, and that nothing is left behind.
set -euo pipefail

[[ $EUID == 0 ]] || { echo "this starts Slurm's daemons and has to be root" >&2; exit 1; }
for program in sbatch munged ray latentcache; do
  command -v "$program" >/dev/null || { echo "$program is not on the PATH" >&2; exit 1; }
done
script=$PWD/infra/slurm/latentcache.sbatch
folder=$(mktemp -d /tmp/try-slurm.XXXXXX)
export SLURM_CONF=$folder/slurm.conf LATENTCACHE_TMPDIR=$folder
daemons=()
stop_slurm() {
  # Jobs first: a slurmd waits for its own, and for ever once slurmctld is gone.
  scancel --user=root 2>/dev/null || true
  for ((i = 120; i; i--)); do
    [[ -z $(squeue --noheader 2>/dev/null) ]] && break
    sleep 0.5
  done
  kill "${daemons[@]}" 2>/dev/null || true
  wait "${daemons[@]}" 2>/dev/null || true
  daemons=()
}
finish() {
  stop_slurm
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
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MinJobAge=3600
NodeName=try1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$(free_port) CPUs=2
NodeName=try2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$(free_port) CPUs=2
PartitionName=spare Nodes=ALL Default=YES State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2
CONF
# Where cgroups are not to be had, as in a container: Slurm since 23.11 can do without, and 22.05
# asks for none of them as configured here.
cgroups=disabled
[[ $(slurmd -V) =~ \ (20|21|22|23\.02)\. ]] && cgroups=cgroup/v1
echo "CgroupPlugin=$cgroups" >"$folder/cgroup.conf"

munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
  --pid-file="$folder/munge.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed" \
  >"$folder/munged.log" 2>&1 &
daemons+=($!)
slurmctld -D -f "$SLURM_CONF" >"$folder/slurmctld.log" 2>&1 &
daemons+=($!)
for node in try1 try2; do
  slurmd -D -N "$node" -f "$SLURM_CONF" >"$folder/slurmd.$node.log" 2>&1 &
  daemons+=($!)
done

# until_so WHAT COMMAND…: wait until the command succeeds, five minutes at most.
until_so() {
  local what=$1
  shift
  for ((tries = 600; tries; tries--)); do
    "$@" && return
    sleep 0.5
  done
  fail "it never was so: $what"
}
queued_again() {
  is "$1" JobState COMPLETED && fail "it was done too soon for this: raise num_shards"
  is "$1" Restarts "$2"
}
field() { scontrol show job "$1" | tr ' ' '\n' | sed -n "s/^$2=//p"; }
is() { [[ $(field "$1" "$2") == "$3" ]]; }
num_units() { find latents/commits -name '*.json' 2>/dev/null | wc -l; }
has_units() { (($(num_units) >= $1)); }
nodes_are_idle() { [[ $(sinfo --noheader --partition=spare --format='%T %D' 2>/dev/null) == "idle 2" ]]; }
submit() { sbatch --parsable --nodes=2 "$@"; }
# tell JOB: what Slurm has to say of it, and its last summary.
tell() {
  echo "   job $1: $(field "$1" JobState), ExitCode=$(field "$1" ExitCode)," \
    "Restarts=$(field "$1" Restarts), NodeList=$(field "$1" NodeList); $(num_units) of $num_shards units"
  grep -h '^{' "latentcache-$1.log" | tail -n 1 | cut -c 1-200 | sed 's/^/   /'
}
check() { is "$1" "$2" "$3" || fail "job $1 has $2=$(field "$1" "$2"), not $3"; }

until_so "both nodes are up" nodes_are_idle
sinfo --version
cd "$folder"
# Work enough to outlast a job of two minutes, and more.
num_shards=160
latentcache demo-data shards --shards $num_shards --samples 12 >/dev/null
cat >config.yaml <<'YAML'
name: try-slurm
source: {shards: shards/*.tar}
transform: {resolution_px: 512, min_side_px: 64}
vae: {checkpoint: demo}
output: {url: latents}
rejects: {max_rate: 0.5}
compute: {num_gpus: 0, num_cpu_actors: 2, decode_threads: 2}
YAML

echo "== a mistake in the config: the exit code is the program's"
job=$(submit "$script" config.yaml --set compute.num_gpu=1)
until_so "the job failed" is "$job" JobState FAILED
check "$job" ExitCode 2:0
tell "$job"

echo "== out of time: Slurm tells it, it finishes what is in hand and queues itself again"
job=$(submit --time=2 "$script" config.yaml)
until_so "units are committed" has_units 1
squeue --steps --noheader --format='   step %i %j on %N'
num_raylets=$(pgrep --full --count "raylet/raylet .*$folder/lc-$job/" || true)
echo "   $num_raylets nodes in Ray's cluster"
((num_raylets == 2)) || fail "Ray is not on both nodes"
until_so "it was queued again" queued_again "$job" 1
tell "$job"
grep -q '"status": "interrupted".*"exit_code": 1' "latentcache-$job.log" || fail "it was not told"
scontrol update JobId="$job" TimeLimit=60

echo "== preempted by a job of another partition: Slurm queues it again"
count=$(num_units)
until_so "it goes on" has_units $((count + 2))
submit --partition=urgent --output=/dev/null --wrap='sleep 1' >/dev/null
until_so "it was queued again" queued_again "$job" 2
tell "$job"

echo "== told to stop, by scancel --batch --signal=TERM: it finishes what is in hand"
count=$(num_units)
until_so "it goes on" has_units $((count + 2))
scancel --batch --signal=TERM "$job"
until_so "the job failed" is "$job" JobState FAILED
check "$job" ExitCode 1:0
check "$job" Restarts 2
tell "$job"

echo "== cancelled, by scancel"
count=$(num_units)
job=$(submit "$script" config.yaml)
until_so "it goes on" has_units $((count + 2))
scancel "$job"
until_so "the job is cancelled" is "$job" JobState CANCELLED
until_so "its nodes are free" nodes_are_idle
tell "$job"

echo "== submitted again: what is left is done"
job=$(submit "$script" config.yaml)
until_so "it is complete" is "$job" JobState COMPLETED
check "$job" ExitCode 0:0
tell "$job"
latentcache verify latents || fail "what it made is not whole"

echo "== nothing stays"
until_so "its nodes are free" nodes_are_idle
ls -d "$folder"/lc-* 2>/dev/null && fail "temporary folders are left"
stop_slurm
pgrep --list-full --full --runstates D,R,S "$folder|^slurmstepd" && fail "processes are left"
echo "all well"
