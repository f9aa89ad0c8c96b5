#!/bin/sh
# compose_backup.sh FOLDER COMPOSE…: all that cannot be made again, into a new folder; whole or not there at all.
# In this order, as each refers to the ones after it: the ledger to versions, versions to artifacts and data, a run's refs
# to data.
set -eu
into=$1
shift
[ ! -e "$into" ] || { echo "error: $into is there already. Name another: make compose-backup BACKUP=FOLDER" >&2; exit 1; }
umask 077
part=$into.part
paused=
trap '[ -z "$paused" ] || "$@" --profile travel unpause git; rm -rf "$part"' EXIT
trap 'exit 130' HUP INT TERM
pack='tar -C "$0" "$@" -c . || [ $? -eq 1 ]' # 1: a file changed or went meanwhile; what counts is written whole
rm -rf "$part"
mkdir -p "$part"
for database in ballast mlflow mlflow_auth airflow; do
    "$@" exec -T postgres pg_dump --username=postgres --format=custom "$database" >"$part/$database.dump"
done
"$@" run --rm -T --no-deps storage-init python /opt/ballast/deploy/objects.py out >"$part/objects.tar"
# All of the volume but what runs can make again: their workspaces and DVC's notes.
"$@" run --rm -T --no-deps project sh -c "$pack" /var/lib/ballast --exclude=./runs --exclude=./dvc-site >"$part/var.tar"
git=$("$@" --profile travel ps --quiet git) # workspaces travel: deploy/travel.yml
[ -z "$git" ] || { paused=yes && "$@" --profile travel pause git; }
"$@" run --rm -T --no-deps project sh -c "$pack" /project >"$part/project.tar"
if [ -n "$git" ]; then
    "$@" --profile travel unpause git && paused=
    "$@" --profile travel run --rm -T --no-deps s3-data-init python /opt/ballast/deploy/objects.py out >"$part/data.tar"
fi
(cd "$part" && sha256sum -- *.dump *.tar >SHA256SUMS)
mv "$part" "$into"
echo "backed up to $into ($(du -sh "$into" | cut -f1)). The secrets are not in it: keep deploy/secrets/stack.env too."
