"""Take the README's pictures of the real thing, with the stack that `make run` left up.

    python docs/screenshots.py

Needs a Chromium and its driver (Debian: `apt-get install chromium chromium-driver`).
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from pathlib import Path

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.expected_conditions import text_to_be_present_in_element
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
AIRFLOW = f"http://localhost:{os.environ.get('AIRFLOW_PORT', '8080')}"
MLFLOW = f"http://localhost:{os.environ.get('MLFLOW_PORT', '5000')}"
WAIT_S = 30


def browser() -> webdriver.Chrome:
    """A headless Chromium that keeps its background traffic to itself."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    ):
        options.add_argument(argument)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))


def shoot(driver: webdriver.Chrome, name: str, url: str, text: str, size: tuple[int, int], click: str = "") -> None:
    """Open a page, wait until it shows ``text``, press the button labelled ``click``, and keep a picture."""
    driver.set_window_size(*size)
    driver.get(url)
    wait = WebDriverWait(driver, WAIT_S, ignored_exceptions=[StaleElementReferenceException])
    wait.until(text_to_be_present_in_element((By.TAG_NAME, "body"), text), f"{url} does not show {text!r}")
    if click:
        driver.find_element(By.XPATH, f"//button[starts-with(@aria-label, {click!r})]").click()
    ActionChains(driver).pause(3).perform()  # graphs settle after their text is there
    IMAGES.mkdir(exist_ok=True)
    driver.save_screenshot(str(IMAGES / f"{name}.png"))
    print(f"docs/images/{name}.png")


def remember(driver: webdriver.Chrome, url: str, **settings: str) -> None:
    """Set what a page would remember of an earlier visit."""
    driver.get(url)
    for key, value in settings.items():
        driver.execute_script("localStorage.setItem(arguments[0], arguments[1])", key, value)


def sign_in(driver: webdriver.Chrome) -> str:
    """Sign in to Airflow as the user that the stack made; return an API token."""
    (passwords,) = (ROOT / "var" / "airflow").glob("simple_auth_manager_passwords*.json*")
    user, password = next(iter(json.loads(passwords.read_text()).items()))
    body = json.dumps({"username": user, "password": password}).encode()
    request = urllib.request.Request(f"{AIRFLOW}/auth/token", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        token = str(json.load(answer)["access_token"])
    driver.get(f"{AIRFLOW}/auth/login")
    driver.add_cookie({"name": "_token", "value": token, "path": "/"})
    return token


def newest_run(token: str, dag_id: str) -> str:
    """The id of the newest run of a DAG."""
    url = f"{AIRFLOW}/api/v2/dags/{dag_id}/dagRuns?order_by=-run_after&limit=1"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request) as answer:
        runs = json.load(answer)["dag_runs"]
    return str(runs[0]["dag_run_id"]) if runs else sys.exit(f"{dag_id} has no run yet: `make run` first.")


def main() -> None:
    """All pictures."""
    driver = browser()
    try:
        token = sign_in(driver)
        wide = {"details-panel,main-panel": {"expandToSizes": {}, "layout": [82, 18]}}
        remember(driver, AIRFLOW, **{"react-resizable-panels:graph-ltr": json.dumps(wide)})
        run = f"{AIRFLOW}/dags/retrain_scheduled/runs/{newest_run(token, 'retrain_scheduled')}"
        shoot(driver, "airflow", run, "challenger_ready", (1600, 700), click="Show Graph")
        shoot(driver, "mlflow", f"{MLFLOW}/#/models/flight_delays", "champion", (1500, 900), click="Close")
        report = max((ROOT / "var" / "reports" / "monitor").iterdir())
        shoot(driver, "monitor", (report / "index.html").as_uri(), "Is the model worse?", (1440, 1130))
    finally:
        driver.quit()


if __name__ == "__main__":
    main()
