"""The objects of a bucket as one tar: ``python objects.py out >FILE`` and ``python objects.py in <FILE``."""

import os
import sys
import tarfile
from collections.abc import Callable
from typing import Any, NamedTuple

import boto3


class OnlyRead(NamedTuple):
    """A stream that says that it cannot be sought in: of tarfile's, boto3 would believe that it can."""

    read: Callable[[int], bytes]


def out(store: Any, bucket: str) -> int:
    """Write every object to standard output."""
    count = 0
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
        for page in store.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for found in page.get("Contents", []):
                object_ = store.get_object(Bucket=bucket, Key=found["Key"])
                member = tarfile.TarInfo(found["Key"])
                member.size, member.mtime = object_["ContentLength"], int(object_["LastModified"].timestamp())
                tar.addfile(member, object_["Body"])
                count += 1
    return count


def back(store: Any, bucket: str) -> int:
    """Put what comes by standard input. Objects that are there and not in it stay: nothing refers to them."""
    count = 0
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as tar:
        for member in tar:
            if body := tar.extractfile(member):
                store.upload_fileobj(OnlyRead(body.read), bucket, member.name)
                count += 1
    return count


if __name__ == "__main__":
    moved = {"out": out, "in": back}[sys.argv[1]](boto3.client("s3"), os.environ["BALLAST_BUCKET"])
    print(f"{moved} objects", file=sys.stderr)
