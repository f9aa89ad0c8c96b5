#!/bin/sh
# compose_wait.sh COMPOSE…: wait until every service is healthy; say how long it took, or who is not and what it says.
set -eu
began=$(date +%s)
within=${COMPOSE_WAIT_S:-300}
while :; do
    all=$("$@" ps --all --format '{{.Service}} {{.State}} {{.Health}} {{.ExitCode}}')
    lacking=$(echo "$all" | awk '!($2 == "running" && $3 == "healthy") && !($2 == "exited" && $NF == 0) { print $1 }' | sort -u)
    [ -n "$lacking" ] || [ -z "$all" ] || break
    if [ $(($(date +%s) - began)) -gt "$within" ]; then
        for service in $lacking; do
            "$@" logs --no-color --tail 15 "$service" >&2
        done
        echo "error: not healthy after $within s: $(echo ${lacking:-nothing was started})" >&2
        exit 1
    fi
    sleep 1
done
echo "all services are healthy, $(($(date +%s) - began)) s after they were started"
