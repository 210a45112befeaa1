#!/usr/bin/env bash
# A real Slurm on this machine: one controller, two small nodes on loopback. Needs Debian's slurm-wlm and munge, and root.
# usage: two_node_slurm.sh start DIR [PORT] | stop DIR     DIR holds configuration, spool and logs; clients want SLURM_CONF=DIR/slurm.conf
set -euo pipefail
what=$1; port=${3:-16817}; export PATH=$PATH:/usr/sbin; dir=$(mkdir -p "$2" && cd "$2" && pwd); conf=$dir/slurm.conf
stop() { for name in slurmd.n0 slurmd.n1 slurmctld munged; do [ -f "$dir/$name.pid" ] && kill "$(cat "$dir/$name.pid")" 2>/dev/null || true; done; }
case $what in
stop) stop; exit 0 ;;
start) ;;
*) exit 2 ;;
esac
mkdir -p "$dir"/{state,spool.n0,spool.n1,munge}
[ -s "$dir/munge/key" ] || dd if=/dev/urandom of="$dir/munge/key" bs=1 count=1024 status=none
chmod 700 "$dir/munge"; chmod 400 "$dir/munge/key"
munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munged.pid" --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
host=$(hostname -s); mem=$(($(grep MemTotal /proc/meminfo | tr -dc 0-9) / 1024 / 4))
cat >"$conf" <<C
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=30
MinJobAge=300
JobRequeue=1
MpiDefault=none
NodeName=n0 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=2 RealMemory=$mem State=UNKNOWN
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=2 RealMemory=$mem State=UNKNOWN
PartitionName=main Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
C
SLURM_CONF=$conf slurmctld
for n in n0 n1; do SLURM_CONF=$conf slurmd -N $n; done
for _ in $(seq 30); do SLURM_CONF=$conf sinfo -h -o %T 2>/dev/null | grep -q idle && exit 0; sleep 1; done
echo "nodes did not come up: $dir/slurmctld.log" >&2; exit 1
