#!/bin/sh
# Make the locked environment in .venv, once: later calls return at once while pyproject.toml and uv.lock stay as they
# are. Everything lands in this folder (.venv, .tools) but uv's download cache.
set -eu
cd "$(dirname "$0")/.."

UV_VERSION=0.13.8
NEEDED_MB=8000
LOG=var/logs/setup.log

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

stamp() { { pwd; cat pyproject.toml uv.lock; } | cksum; }

if [ -x .venv/bin/python ] && [ "$(stamp)" = "$(cat .venv/ballast-stamp 2>/dev/null)" ]; then
    exit 0
fi

is_311() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; }

python=
for candidate in ${PYTHON:-} python3.11 python3; do
    if is_311 "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    found=$(python3 --version 2>&1) || found='no python3 at all'
    fail "Ballast needs Python 3.11 (found: $found). On Debian 12: sudo apt-get install python3.11 python3.11-venv.
       Elsewhere install a python3.11 and put it on the PATH, or name it: make PYTHON=/path/to/python3.11 …"
fi
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python has no venv module. On Debian 12: sudo apt-get install python3.11-venv"
command -v git >/dev/null ||
    fail 'git is missing: every run works in a clone at a pinned commit. On Debian: sudo apt-get install git'
git rev-parse --verify --quiet HEAD >/dev/null 2>&1 ||
    fail 'This folder is no git clone with a commit: every run works in a clone of it. Clone the repository with git.'

free_mb=$(df -Pm . | awk 'NR == 2 { print $4 }')
if [ ! -e .venv ] && [ "$free_mb" -lt "$NEEDED_MB" ]; then
    fail "The environment needs about $NEEDED_MB MB (free here: $free_mb MB). Make room, or clone to a larger disk."
fi

unset PYTHONDONTWRITEBYTECODE PYTHONSAFEPATH PYTHONPATH PYTHONHOME VIRTUAL_ENV
export UV_PYTHON_DOWNLOADS=never UV_PROJECT_ENVIRONMENT=.venv UV_NO_MODIFY_PATH=1
began=$(date +%s)
mkdir -p var/logs

fetch() { # fetch WHAT COMMAND…: run it, in sight at a terminal, else into the log; explain a failure
    what=$1
    shift
    if [ -t 2 ]; then
        "$@" || code=$?
    else
        "$@" >"$LOG" 2>&1 || code=$?
        [ "${code:-0}" = 0 ] || tail -n 15 "$LOG" >&2
    fi
    [ "${code:-0}" = 0 ] || fail "$what failed, see above. If the package index could not be reached: this step
       needs the network once. Behind a proxy set HTTPS_PROXY; for a mirror set UV_DEFAULT_INDEX and PIP_INDEX_URL.
       Then run the same command again: what was fetched is kept."
}

if [ "$(.tools/uv/bin/uv --version 2>/dev/null | cut -d' ' -f2)" != "$UV_VERSION" ]; then
    rm -rf .tools/uv
    fetch 'Making a private folder for uv' "$python" -m venv .tools/uv
    fetch 'Fetching uv' .tools/uv/bin/python -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION"
fi
# A folder that was moved or copied: its scripts name the old place.
if [ -e .venv/ballast-home ] && [ "$(cat .venv/ballast-home)" != "$PWD" ]; then
    rm -rf .venv
fi
fetch 'Installing the locked packages' .tools/uv/bin/uv sync --locked --compile-bytecode --python "$python"
pwd >.venv/ballast-home
cp uv.lock .venv/uv.lock # which lock this environment is: a run on a commit with another is refused
stamp >.venv/ballast-stamp
printf '  %-13s %-43s %3d s\n' environment ready $(($(date +%s) - began))
