#!/usr/bin/env bash
# A container of the development cluster: this machine's files, with BUNDLE/rootfs as /mnt, which nobody outside sees there.
#   container.sh BUNDLE ENVIRONMENT_FILE COMMAND...      (called by Slurm, see oci.conf)
set -euo pipefail
bundle=$1 file=$2
shift 2
mapfile -d '' -t variables < "$file"
# Like the plugins of clusters (Pyxis) no process stays in between: signals reach the command.
root=$([ "$(id -u)" = 0 ] || echo --map-current-user --keep-caps)
exec env -i "${variables[@]}" unshare --mount $root sh -c 'mount --bind "$0" /mnt && exec "$@"' "$bundle/rootfs" "$@"
