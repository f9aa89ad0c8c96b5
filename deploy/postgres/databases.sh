#!/bin/bash
# Run once, when the volume is empty: a database for each, and nobody but its owner may connect to it.
set -euo pipefail
run() { psql -v ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres "$@"; }
own() { # own ROLE PASSWORD DATABASE…
    local role=$1 password=$2 database
    shift 2
    run -v password="$password" <<<"CREATE ROLE $role LOGIN PASSWORD :'password'"
    for database in "$@"; do
        run -c "CREATE DATABASE $database OWNER $role"
        run -c "REVOKE ALL ON DATABASE $database FROM PUBLIC"
    done
}
own airflow "$AIRFLOW_DB_PASSWORD" airflow
own mlflow "$MLFLOW_DB_PASSWORD" mlflow mlflow_auth
own ballast "$BALLAST_DB_PASSWORD" ballast
