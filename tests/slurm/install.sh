#!/bin/sh
# Slurm for the tests, through apt where that is possible; the tests skip with the reason where it is not.
if command -v slurmctld >/dev/null; then exit 0; fi
set -- slurmctld slurmd slurm-client munge
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "Slurm is not installed here, and installing it takes root and apt-get: $*" >&2
    exit 0
fi
apt-get install --yes --no-install-recommends "$@" >/dev/null 2>&1 ||
    { apt-get update >/dev/null && apt-get install --yes --no-install-recommends "$@" >/dev/null; } ||
    echo "apt-get cannot install $*" >&2
exit 0
