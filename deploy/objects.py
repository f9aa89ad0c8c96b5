"""The objects of a bucket as one tar: ``python objects.py out >FILE`` and ``python objects.py in <FILE``."""

import io
import os
import sys
import tarfile
from typing import Any

import boto3


def out(store: Any, bucket: str) -> int:
    """Write every object to standard output."""
    count = 0
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
        for page in store.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for found in page.get("Contents", []):
                body = store.get_object(Bucket=bucket, Key=found["Key"])["Body"].read()
                member = tarfile.TarInfo(found["Key"])
                member.size, member.mtime = len(body), int(found["LastModified"].timestamp())
                tar.addfile(member, io.BytesIO(body))
                count += 1
    return count


def back(store: Any, bucket: str) -> int:
    """Put what comes by standard input. Objects that are there and not in it stay: nothing refers to them."""
    count = 0
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as tar:
        for member in tar:
            if body := tar.extractfile(member):
                store.put_object(Bucket=bucket, Key=member.name, Body=body.read())
                count += 1
    return count


if __name__ == "__main__":
    moved = {"out": out, "in": back}[sys.argv[1]](boto3.client("s3"), os.environ["BALLAST_BUCKET"])
    print(f"{moved} objects", file=sys.stderr)
