"""Make the workers' account in MLflow, with the password of the secrets file."""

import base64
import json
import os
from http import HTTPStatus
from urllib.error import HTTPError
from urllib.request import Request, urlopen

URL = os.environ["MLFLOW_TRACKING_URI"] + "/api/2.0/mlflow/users/"
ADMIN = "admin:" + os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"]


def call(method: str, path: str, body: dict[str, str]) -> int:
    """The status that MLflow answers the admin's request with."""
    login = base64.b64encode(ADMIN.encode()).decode()
    headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
    try:
        with urlopen(Request(URL + path, json.dumps(body).encode(), headers, method=method), timeout=20) as answer:
            return int(answer.status)
    except HTTPError as error:
        if error.code != HTTPStatus.BAD_REQUEST:  # it answers so where the user is there already
            raise
        return error.code


def main() -> None:
    """Make the account, or set its password."""
    account = {"username": "worker", "password": os.environ["MLFLOW_WORKER_PASSWORD"]}
    if call("POST", "create", account) == HTTPStatus.BAD_REQUEST:
        call("PATCH", "update-password", account)
    print("the account worker is there")


if __name__ == "__main__":
    main()
