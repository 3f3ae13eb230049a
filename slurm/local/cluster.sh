#!/usr/bin/env bash
# A real Slurm on this machine, for development and tests: four pretend nodes with (up to) eight pretend GPUs each.
#
#   slurm/local/cluster.sh up                 start it (about a second)
#   eval "$(slurm/local/cluster.sh env)"      let this shell's sbatch, squeue, moelab submit talk to it
#   slurm/local/cluster.sh status             nodes and jobs
#   slurm/local/cluster.sh down               cancel its jobs and stop it
#   slurm/local/cluster.sh start NAME         start a part that died: slurmctld, or a node (node1)
#
# All its files are in MOELAB_SLURM_DIR (.moelab/slurm), all its ports at MOELAB_SLURM_PORT (17800) and the few above; a Slurm that
# is installed or running on this machine is neither read nor changed. It keeps no accounts: sacct has nothing to say here.
# Needs Debian's or Ubuntu's packages: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
dir=$(realpath -m "${MOELAB_SLURM_DIR:-$here/../../.moelab/slurm}")
port=${MOELAB_SLURM_PORT:-17800} nodes=4 cpus=16 memory=32000
# A pretend GPU is a character device that Slurm counts and nobody opens: eight of those this machine has.
devices=$(find /dev -maxdepth 1 -type c | sort -V | tail -8 | paste -sd,) gpus=$(tr ',' '\n' <<< "$devices" | wc -l)
export SLURM_CONF=$dir/etc/slurm.conf PATH=$PATH:/usr/sbin

# PID NAME: a daemon of this cluster; one that is gone may have left its pid to a stranger, or to a daemon of another cluster.
ours() { [ "$(cat "/proc/${1:-none}/comm" 2>/dev/null)" = "$2" ] && grep -zqxF "SLURM_CONF=$SLURM_CONF" "/proc/$1/environ" 2>/dev/null; }
alive() { local name; name=$(basename "$1"); ours "$(cat "$1" 2>/dev/null)" "${name%%.*}"; }  # FILE with a pid, named by the daemon
idle() { timeout 5 sinfo -h -p debug -o %D -t idle 2>/dev/null; }

fill() {  # the templates, into the files Slurm reads
  for file in "$@"; do
    sed -e "s#@HERE@#$here#g; s#@DIR@#$dir#g; s#@USER@#$(id -un)#g; s#@PLUGINS@#$(echo /usr/lib/*/slurm-wlm)#g; s#@NODES@#$nodes#g; s#@GPUS@#$gpus#g; s#@DEVICES@#$devices#g" \
        -e "s#@CPUS@#$cpus#g; s#@MEMORY@#$memory#g; s#@PORT@#$port#g; s#@FIRST@#$((port + 1))#g; s#@LAST@#$((port + nodes))#g" \
        "$here/$file" > "$dir/etc/$file"
  done
}

start() {  # each daemon goes to the background and writes its pid file
  case $1 in
    slurmctld) slurmctld ;;
    *) mkdir -p "$dir/spool/$1"; slurmd -N "$1" -d "$(command -v slurmstepd)" ;;
  esac
}

up() {
  local tool n
  for tool in slurmctld slurmd munged sbatch; do
    command -v "$tool" >/dev/null && continue
    echo "$tool is not installed: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge" >&2
    exit 1
  done
  if alive "$dir/run/slurmctld.pid"; then echo "already up: $dir"; return; fi
  for n in $(seq "$port" $((port + nodes))); do
    ! (exec 3<>"/dev/tcp/127.0.0.1/$n") 2>/dev/null || { echo "port $n is in use; MOELAB_SLURM_PORT names the first of others" >&2; exit 1; }
  done
  trap 'down; echo "not up; what was started is stopped, see $dir/log" >&2' EXIT
  umask 022
  mkdir -p "$dir"/{etc,run,log,state,spool}
  chmod 711 "$dir/run"  # munged insists on a directory that others may pass through
  fill slurm.conf gres.conf oci.conf
  [ -f "$dir/etc/munge.key" ] || mungekey --create --keyfile="$dir/etc/munge.key"
  munged --key-file="$dir/etc/munge.key" --socket="$dir/run/munge.sock" --pid-file="$dir/run/munged.pid" \
         --seed-file="$dir/run/munge.seed" --log-file="$dir/log/munged.log"
  start slurmctld
  for n in $(seq $nodes); do start "node$n"; done
  for _ in $(seq 600); do [ "$(idle)" = $nodes ] && break; sleep 0.1; done
  [ "$(idle)" = $nodes ] || { echo "not all nodes came up; see $dir/log" >&2; exit 1; }
  trap - EXIT
  echo "up: $nodes nodes, $gpus pretend GPUs each; eval \"\$(slurm/local/cluster.sh env)\""
}

stop() {  # by the pid in a file of ours; a daemon that does not go in eight seconds is killed
  alive "$1" || { rm -f "$1"; return 0; }
  local pid name; pid=$(cat "$1") name=$(basename "$1")
  kill "$pid"
  for _ in $(seq 80); do ours "$pid" "${name%%.*}" || break; sleep 0.1; done
  ! ours "$pid" "${name%%.*}" || kill -9 "$pid" 2>/dev/null || true
  rm -f "$1"
}

down() {
  if alive "$dir/run/slurmctld.pid"; then
    timeout 5 squeue -h -o %A | sort -u | xargs -r timeout 5 scancel -f || true
    for _ in $(seq 150); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.1; done
  fi
  for file in "$dir"/run/slurmd.*.pid "$dir"/run/{slurmctld,munged}.pid; do stop "$file"; done
}

status() {
  alive "$dir/run/slurmctld.pid" || { echo "down ($dir)"; exit 1; }
  sinfo -N -p debug -o "%N %T %c CPUs %m MB %G"
  squeue -o "%.12i %.9P %.24j %.10T %.10M %R"
}

case ${1:-} in
  up | down | status) "$1" ;;
  start) start "${2:?which: slurmctld or node1..node$nodes}" ;;
  env) echo "export SLURM_CONF=$SLURM_CONF" ;;
  *) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
