#!/bin/sh
# Write the secrets that must be files, NAME from SECRET_NAME, into memory (/tmp), and run the command without them.
set -eu
umask 077
mkdir -p /tmp/secrets
for name in $(env | sed -n 's/^SECRET_\([A-Z_]*\)=.*/\1/p'); do
    file=/tmp/secrets/$(echo "$name" | tr '[:upper:]' '[:lower:]')
    eval "printf %s \"\$SECRET_$name\"" >"$file"
    unset "SECRET_$name"
done
exec "$@"
