#!/bin/sh
# compose_clean.sh DAYS COMPOSE…: remove what Airflow keeps of runs and tasks that is older: logs, and rows of its database.
set -eu
days=$1
shift
case $days in
    '' | 0* | *[!0-9]*) echo "error: DAYS must be a number above 0 (found '$days'): make compose-clean DAYS=90" >&2; exit 1 ;;
esac
"$@" exec -T api-server find /var/log/airflow -type f -mtime "+$days" -delete
# Those that this has emptied go the next time: they count as new.
"$@" exec -T api-server find /var/log/airflow -mindepth 1 -type d -empty -mmin +60 -delete
"$@" exec -T api-server sh -c \
    'airflow db clean --clean-before-timestamp "$(date -u -d "$0 days ago" +%Y-%m-%d)" --skip-archive --yes \
    --error-on-cleanup-failure' "$days"
echo "logs and rows of Airflow older than $days days are gone; the ledger, MLflow and all data are as they were"
