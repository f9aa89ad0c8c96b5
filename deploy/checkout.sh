#!/bin/sh
# checkout.sh IMAGE VOLUME: bring the volume that the workers clone from to the commit of this image. Commits of runs under
# way stay: refs keep them.
set -eu
image=$1 volume=$2
rm -rf "$volume/.clone" # left by a clone that was killed
if [ ! -d "$volume/.git" ]; then # the root of a volume cannot be renamed, so its .git is
    git clone --quiet --no-checkout "$image" "$volume/.clone"
    mv "$volume/.clone/.git" "$volume/.git"
    rmdir "$volume/.clone"
fi
# Left by a git that was killed. Workers may be at work, and their git holds a lock for a moment only.
find "$volume/.git" -name '*.lock' ! -newermt '10 seconds ago' -delete
git -C "$volume" fetch --quiet "$image" HEAD
git -C "$volume" checkout --quiet --force --detach FETCH_HEAD
echo "the checkout is at $(git -C "$volume" rev-parse --short HEAD)"
