"""Make a store's bucket, once it answers."""

import os
import sys
import time

import boto3
from botocore.exceptions import BotoCoreError, ClientError

PATIENCE_S = 60.0


def main() -> None:
    """Make the bucket; one that is there stays as it is."""
    store, bucket = boto3.client("s3"), os.environ["BALLAST_BUCKET"]
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            if bucket not in [found["Name"] for found in store.list_buckets()["Buckets"]]:
                store.create_bucket(Bucket=bucket)
            print(f"the bucket {bucket} is there")
            return
        except (BotoCoreError, ClientError) as error:
            if time.monotonic() > deadline:
                sys.exit(f"error: The S3 store at {os.environ['AWS_ENDPOINT_URL_S3']} does not serve: {error}")
            time.sleep(1)


if __name__ == "__main__":
    main()
