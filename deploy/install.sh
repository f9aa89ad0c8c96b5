#!/bin/sh
# Install the whole lock into the image. With an index as argument torch comes from there, in the locked version and
# without the libraries of CUDA: those are the packages that only torch asks for.
set -eu
index=${1:-}
if [ -z "$index" ]; then
    /opt/uv/bin/uv sync --frozen --no-dev --no-install-project
else
    cuda=$(sed -n 's/^name = "\(nvidia-[^"]*\|cuda-[^"]*\|triton\|torch\)"$/\1/p' uv.lock | grep -v nvidia-ml-py)
    version=$(sed -n '/^name = "torch"$/{n;s/version = "\(.*\)"/\1/p}' uv.lock)
    # shellcheck disable=SC2046
    /opt/uv/bin/uv sync --frozen --no-dev --no-install-project $(printf ' --no-install-package %s' $cuda)
    /opt/uv/bin/uv pip install --no-deps --compile-bytecode --index-url "$index" "torch==$version"
fi
cp uv.lock /opt/venv/uv.lock # which lock this environment is: a run on a commit with another is refused
printf '#!/bin/sh\ncd /opt/ballast && exec python -m pipelines.cli "$@"\n' >/opt/venv/bin/ballast
chmod 755 /opt/venv/bin/ballast
