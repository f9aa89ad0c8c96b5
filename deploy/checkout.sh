#!/bin/sh
# Bring the volume that the workers clone from to the commit of this image. Commits of runs under way stay: refs keep them.
set -eu
[ -d /project/.git ] || git clone --quiet /opt/ballast /project
git -C /project fetch --quiet /opt/ballast HEAD
git -C /project checkout --quiet --force --detach FETCH_HEAD
echo "the checkout is at $(git -C /project rev-parse --short HEAD)"
