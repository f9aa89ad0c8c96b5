"""The adapter `remote` against a real web server and a real S3 API on loopback."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from datetime import date
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from pipelines.errors import DataRejected, ParamsError, TryAgain
from pipelines.land import LandParams, land
from pipelines.sources import connect

MARCH = date(2024, 3, 1)
BASIC = f"Basic {base64.b64encode(b'me:hunter2').decode()}"


def remote(**tables: Any) -> Any:
    return connect("remote", tables)


class Site:
    """A web server of a folder. ``fails`` is what it answers instead; ``login`` has it ask for one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fails, self.login, self.asked = folder, 0, False, list[str]()
        self.silent, self.leads_to, self.heard = False, "", list[str | None]()
        site = self

        class Handler(SimpleHTTPRequestHandler):
            def send_head(self) -> Any:
                site.asked.append(f"{self.command} {self.path}")
                if site.login and self.headers["Authorization"] != BASIC:
                    return self.send_error(401)
                if site.leads_to:
                    self.send_response(302)
                    self.send_header("Location", site.leads_to + self.path)
                    return self.end_headers()
                site.heard.append(self.headers["Authorization"])
                return self.send_error(site.fails) if site.fails else super().send_head()

            def send_header(self, keyword: str, value: str) -> None:
                if not (site.silent and keyword == "Last-Modified"):
                    super().send_header(keyword, value)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def put(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path / "site")
    made.put("shops.csv", "shop,city\n007,\n")
    for month in ("2023-12", "2024-01", "2024-02", "2024-03"):
        made.put(f"visits-{month}.csv", f"id,at\n1,{month}-05T10:00:00Z\n")
    yield made
    made.stop()


def test_http_file_is_read_as_text_and_an_empty_field_is_null(site: Site) -> None:
    source = remote(shops=f"{site.url}/shops.csv")
    (piece,) = source.pieces("shops", MARCH)
    assert source.read("shops", piece).to_pylist() == [{"shop": "007", "city": None}]


def test_http_parquet_keeps_its_types(site: Site) -> None:
    rows = pa.table({"n": [1, None], "x": [0.5, 1.5]})
    pq.write_table(rows, site.folder / "a.parquet")
    assert remote(t=f"{site.url}/a.parquet").read("t", f"{site.url}/a.parquet").equals(rows)


def test_http_dates_are_filled_in_before_the_as_of_date_and_gaps_left_out(site: Site) -> None:
    (site.folder / "visits-2024-01.csv").unlink()
    url = f"{site.url}/visits-{{date:%Y-%m}}.csv"
    pieces = remote(visits={"url": url, "since": "2023-12-15"}).pieces("visits", MARCH)
    assert list(pieces) == [f"{site.url}/visits-2023-12.csv", f"{site.url}/visits-2024-02.csv"]
    assert len(remote(visits={"url": url, "since": "2024-02-15"}).pieces("visits", date(2024, 3, 2))) == 2


def test_http_listing_reads_no_rows(site: Site) -> None:
    remote(shops=f"{site.url}/shops.csv").pieces("shops", MARCH)
    assert site.asked == ["HEAD /shops.csv"]


def test_http_revision_changes_with_the_file_and_only_then(site: Site) -> None:
    source = remote(shops=f"{site.url}/shops.csv")
    before = source.pieces("shops", MARCH)
    assert source.pieces("shops", MARCH) == before
    site.put("shops.csv", "shop,city\n008,Rome\n")
    assert source.pieces("shops", MARCH) != before


def test_http_file_without_tags_is_read_every_time(site: Site) -> None:
    site.silent = True
    source = remote(shops=f"{site.url}/shops.csv")
    assert source.pieces("shops", MARCH) != source.pieces("shops", MARCH)


def test_http_no_file_is_rejected_by_url(site: Site) -> None:
    with pytest.raises(DataRejected, match=r"`land.options.t`: there is no file http://.*/none.csv"):
        remote(t=f"{site.url}/none.csv").pieces("t", MARCH)
    with pytest.raises(DataRejected, match=r"shops.txt is neither .csv nor .parquet"):
        site.put("shops.txt", "a\n")
        remote(t=f"{site.url}/shops.txt").pieces("t", MARCH)


@pytest.mark.parametrize("status", [403, 500, 503])
def test_http_server_in_trouble_asks_to_try_again(site: Site, status: int) -> None:
    source, site.fails = remote(t=[f"{site.url}/shops.csv"]), status
    with pytest.raises(TryAgain, match=rf"shops.csv cannot be reached: {status} "):
        source.pieces("t", MARCH)
    with pytest.raises(TryAgain, match=rf"shops.csv cannot be reached: {status} "):
        source.read("t", f"{site.url}/shops.csv")


def test_http_server_away_asks_to_try_again(site: Site) -> None:
    site.stop()
    source = remote(t=f"{site.url}/shops.csv")
    for ask in (lambda: source.pieces("t", MARCH), lambda: source.read("t", f"{site.url}/shops.csv")):
        with pytest.raises(TryAgain, match=r"shops.csv cannot be reached: .*Connect call failed"):
            ask()


def test_http_login_comes_from_the_environment(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.login = True
    with pytest.raises(TryAgain, match="401"):
        remote(t=f"{site.url}/shops.csv").pieces("t", MARCH)
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password hunter2\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    source = remote(t=f"{site.url}/shops.csv")
    assert list(source.pieces("t", MARCH)) == [f"{site.url}/shops.csv"]
    assert source.read("t", f"{site.url}/shops.csv").num_rows == 1


def connection(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_LAKE", json.dumps({"conn_type": "generic", **fields}))


def test_http_login_of_a_connection_is_told_to_its_host_alone(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection(monkeypatch, host="http://127.0.0.1", login="me", password="hunter2")
    site.login = True
    source = remote(connection="lake", t=f"{site.url}/shops.csv")
    assert source.read("t", *source.pieces("t", MARCH)).num_rows == 1
    other = Site(tmp_path / "other")
    other.put("shops.csv", "shop\n1\n")
    by_name = other.url.replace("127.0.0.1", "localhost")
    assert remote(connection="lake", t=f"{by_name}/shops.csv").pieces("t", MARCH)
    site.leads_to = by_name
    assert remote(connection="lake", t=f"{site.url}/shops.csv").pieces("t", MARCH)
    other.stop()
    assert set(other.heard) == {None}


def test_http_extra_of_a_connection_is_headers(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    connection(monkeypatch, host="127.0.0.1", extra={"Authorization": "Bearer hunter2"})
    remote(connection="lake", t=f"{site.url}/shops.csv").pieces("t", MARCH)
    assert site.heard == ["Bearer hunter2"]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, r"`land.options.connection`: make `lake` in Airflow, or set AIRFLOW_CONN_LAKE .found neither"),
        ("http://me:hunter2@example.org", r"AIRFLOW_CONN_LAKE must be a connection of Airflow as JSON"),
        ('{"password": "hunter2", "extra": "hunter2"}', r"AIRFLOW_CONN_LAKE must be a connection of Airflow as JSON"),
        ('{"password": "hunter2", "extra": {"role_arn": "r"}}', r"aws_session_token \(found role_arn\)"),
    ],
)
def test_connection_that_cannot_be_used_is_refused_and_shows_no_password(
    monkeypatch: pytest.MonkeyPatch, found: str | None, message: str
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_LAKE", found) if found else monkeypatch.delenv("AIRFLOW_CONN_LAKE", raising=False)
    with pytest.raises(ParamsError, match=message) as error:
        remote(connection="lake", t="s3://warehouse/a.csv")
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("https://me:hunter2@example.org/a.csv", r"`land.options.t` has a password in it \(found https://me:\*\*\*@ex"),
        ("https://example.org/a.csv?sig=hunter2", r"has a password in it"),
        ({"url": "https://me:hunter2@example.org/a.csv"}, r"me:\*\*\*@"),
        ("https://example.org:8443/*@x.csv", r"a web server lists nothing"),
        ("inbox/a.csv", r"must begin with https://, http:// or s3:// \(found inbox/a.csv\)"),
        ({"url": "https://example.org/a.csv", "since": "2024-01-01"}, r"`land.options.t` has no date in it"),
        ({"url": "https://example.org/{day}.csv", "since": "2024-01-01"}, r"`land.options.t` has no date in it"),
        ({"url": "https://example.org/{date.foo}.csv", "since": "2024-01-01"}, r"has no date in it"),
        (7, r"land.options.t.*found 7"),
    ],
)
def test_wrong_settings_are_refused_and_show_no_password(where: Any, message: str) -> None:
    with pytest.raises(ParamsError, match=message) as error:
        remote(t=where)
    assert "hunter2" not in str(error.value)


# --- S3


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(moto: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3")
    client.create_bucket(Bucket="warehouse")
    yield client
    for found in client.list_objects_v2(Bucket="warehouse").get("Contents", []):
        client.delete_object(Bucket="warehouse", Key=found["Key"])
    client.close()


def put(bucket: Any, key: str, text: str) -> None:
    bucket.put_object(Bucket="warehouse", Key=key, Body=text.encode())


def test_s3_pattern_matches_what_is_there_now(bucket: Any) -> None:
    put(bucket, "visits/a.csv", "id\n1\n")
    source = remote(visits="s3://warehouse/visits/*.csv")
    before = source.pieces("visits", MARCH)
    assert list(before) == ["s3://warehouse/visits/a.csv"]
    assert source.pieces("visits", MARCH) == before
    put(bucket, "visits/b.csv", "id\n2\n")
    put(bucket, "visits/deep/c.csv", "id\n3\n")
    put(bucket, "visits/a.csv", "id\n7\n")
    after = source.pieces("visits", MARCH)
    assert list(after) == ["s3://warehouse/visits/a.csv", "s3://warehouse/visits/b.csv"]
    assert after["s3://warehouse/visits/a.csv"] != before["s3://warehouse/visits/a.csv"]
    assert source.read("visits", "s3://warehouse/visits/a.csv").to_pylist() == [{"id": "7"}]


def test_s3_keys_and_endpoint_of_a_connection_go_before_the_environment_s(
    bucket: Any, moto: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bucket, "a.csv", "id\n1\n")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    extra = json.dumps({"endpoint_url": moto, "region_name": "us-east-1"})
    connection(monkeypatch, login="me", password="hunter2", extra=extra)
    assert list(remote(connection="lake", t="s3://warehouse/*.csv").pieces("t", MARCH)) == ["s3://warehouse/a.csv"]


def test_s3_dates_are_filled_in(bucket: Any) -> None:
    for day in ("2024/02/28", "2024/02/29", "2024/03/01"):
        put(bucket, f"visits/{day}/part-0.csv", "id\n1\n")
    where = {"url": "s3://warehouse/visits/{date:%Y/%m/%d}/*.csv", "since": "2024-02-27"}
    days = [piece.split("/visits/")[1] for piece in remote(visits=where).pieces("visits", MARCH)]
    assert days == ["2024/02/28/part-0.csv", "2024/02/29/part-0.csv"]


def test_s3_nothing_there_is_rejected(bucket: Any) -> None:
    for url in ("s3://warehouse/none.csv", "s3://warehouse/none/*.csv", "s3://no-such-bucket/*.csv"):
        with pytest.raises(DataRejected, match=r"there is no file s3://"):
            remote(t=url).pieces("t", MARCH)


def test_s3_server_away_or_no_keys_ask_to_try_again(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(TryAgain, match=r"s3://warehouse/a.csv cannot be reached: Could not connect"):
        remote(t="s3://warehouse/a.csv").pieces("t", MARCH)


def test_land_from_s3_reads_a_file_once_and_again_when_it_was_written_again(bucket: Any, tmp_path: Path) -> None:
    for month in ("2024-01", "2024-02", "2024-03"):
        put(bucket, f"visits/{month}.csv", f"id,at\n1,{month}-05T10:00:00Z\n")
    options = {"visits": "s3://warehouse/visits/*.csv"}
    table = {"columns": {"id": "int", "at": "timestamp"}, "key": ["id"], "time": "at"}
    params = LandParams(source="remote", options=options, partition="month", tables={"visits": table})  # type: ignore[dict-item]

    def landed() -> tuple[int, int, list[str]]:
        found = land(connect("remote", options), MARCH, tmp_path / "landing", tmp_path / "out", params)
        return found.read, found.new, list(found.manifest["visits"])

    assert landed() == (3, 2, ["2024-01", "2024-02"])
    assert landed() == (0, 0, ["2024-01", "2024-02"])
    put(bucket, "visits/2024-02.csv", "id,at\n8,2024-02-05T10:00:00Z\n")
    assert landed() == (1, 1, ["2024-01", "2024-02"])
