#!/bin/sh
# compose_restore.sh FOLDER COMPOSE…: put the stack back as it was. What has happened since is lost.
set -eu
from=$1
shift
[ -n "$from" ] && [ -e "$from/SHA256SUMS" ] ||
    { echo "error: '$from' is no backup. Name one: make compose-restore BACKUP=backups/…" >&2; exit 1; }
(cd "$from" && sha256sum --quiet --check SHA256SUMS)
"$@" --profile '*' down
"$@" up --detach --no-build --wait postgres s3
"$@" run --rm storage-init
for database in ballast mlflow mlflow_auth airflow; do
    owner=${database%_auth}
    sql="SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '$database'"
    "$@" exec -T postgres psql --username=postgres --quiet --output=/dev/null --command="$sql"
    "$@" exec -T postgres dropdb --username=postgres --if-exists "$database"
    "$@" exec -T postgres createdb --username=postgres --owner="$owner" "$database"
    "$@" exec -T postgres psql --username=postgres --quiet --command="REVOKE ALL ON DATABASE $database FROM PUBLIC"
    "$@" exec -T postgres pg_restore --username=postgres --exit-on-error --dbname="$database" <"$from/$database.dump"
done
"$@" run --rm -T --no-deps storage-init python /opt/ballast/deploy/objects.py in <"$from/objects.tar"
if [ -e "$from/data.tar" ]; then # of workspaces that travel: deploy/travel.yml
    "$@" --profile travel run --rm -T s3-data-init
    "$@" --profile travel run --rm -T --no-deps s3-data-init python /opt/ballast/deploy/objects.py in <"$from/data.tar"
fi
for pair in var:/var/lib/ballast project:/project; do
    folder=${pair#*:}
    "$@" run --rm -T --no-deps project sh -c "find $folder -mindepth 1 -delete && tar -C $folder -x" <"$from/${pair%%:*}.tar"
done
echo "restored from $from. Start it: make compose-up"
