"""Take the pictures of docs/images that show the UI, of backups in a real Airflow.

``python -m demo.screenshot`` needs Debian's chromium and the Python package playwright, without a browser of
its own. Chromium talks to this Airflow and to nothing else.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Locator, Page, sync_playwright

from airflow_mdbackup.dags.restore import RESTORE
from demo.run_report import console
from demo.scene import DAG_ID, REPOSITORY, Scene, offer_standard_library, scene
from demo.sshd import ProviderServer
from demo.stack import AirflowStack

IMAGES = REPOSITORY / "docs" / "images"
MARGIN = 12
CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",  # which root cannot have
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


def main() -> int:
    """Back up, have a run fail and another one wait for a person, and take a picture of each."""
    with tempfile.TemporaryDirectory(prefix="mdbackup-") as name:
        folder = Path(name)
        with ProviderServer(folder / "server") as server:
            offer_standard_library(server.tree / "backups")
            below = {"AIRFLOW__MDBACKUP__RESTORE_BELOW": str(folder / "restored")}
            with (
                scene(folder, server, env=below) as both,
                signed_in(both.airflow, folder / "chromium") as page,
            ):
                picture_graph(page, run(both.airflow, "success"))
                picture_restore(page, both, folder / "restored")
                picture_failure(page, both)
            asking = folder / "asking"
            asking.mkdir()
            with (
                scene(asking, server, keys={"on_guard": "approve"}) as both,
                signed_in(both.airflow, asking / "chromium") as page,
            ):
                picture_form(page)
                picture_approval(page, both)
    return 0


@contextmanager
def signed_in(airflow: AirflowStack, profile: Path) -> Iterator[Page]:
    """Give a page of Airflow's UI, as its administrator sees it.

    :param profile: directory for what Chromium keeps; new.
    """
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=CHROMIUM,
            args=FLAGS,
            base_url=airflow.url,
            viewport={"width": 1900, "height": 1200},
            device_scale_factor=1.25,
            color_scheme="light",
        )
        page = context.new_page()
        page.goto("/")
        page.fill("input[name=username]", airflow.user)
        page.fill("input[name=password]", airflow.password)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url(f"{airflow.url}/")
        yield page
        context.close()


def run(airflow: AirflowStack, wanted: str) -> str:
    """Run the DAG, and return the run's id.

    :raises SystemExit: its end is not the wanted one.
    """
    run_id = airflow.trigger(DAG_ID)
    state = airflow.wait_for_run(DAG_ID, run_id, timeout=600)
    if state != wanted:
        raise SystemExit(f"The run is {state}: {airflow.task_states(DAG_ID, run_id)}")
    return run_id


# --- the pictures -----------------------------------------------------------------------------------


def picture_graph(page: Page, run_id: str) -> None:
    """Take graph.png: the graph of a run that pulled in two shards."""
    page.evaluate("""localStorage.setItem("default_dag_view", '"graph"')""")
    page.goto(f"/dags/{DAG_ID}/runs/{run_id}")
    tasks = page.locator(".react-flow__node")
    tasks.filter(has_text="commit_backup").wait_for()
    page.evaluate("""localStorage.setItem("default_dag_view", '"grid"')""")
    take("graph.png", page, tasks)


def picture_failure(page: Page, both: Scene) -> None:
    """Take failure.png: a run that failed and one that is good again, and what the log says."""
    locked = both.source / "bisect.py"
    locked.chmod(0)
    failed = run(both.airflow, "failed")
    locked.chmod(0o644)
    run(both.airflow, "success")
    page.set_viewport_size({"width": 1400, "height": 800})
    page.goto(f"/dags/{DAG_ID}/runs/{failed}/tasks/commit_backup")
    said = page.get_by_text("1 file could not be backed up")
    said.click()  # which folds up where that is in the code
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("w")  # wraps long lines
    corners = page.get_by_test_id("breadcrumb-stats"), page.get_by_text("Dag Version")
    take("failure.png", page, *corners, said, page.get_by_text("Post Execute"))


def picture_form(page: Page) -> None:
    """Take form.png: the form of a run that a person starts."""
    page.set_viewport_size({"width": 1300, "height": 1200})
    page.goto(f"/dags/{DAG_ID}")
    page.get_by_role("button", name="Trigger").first.click()
    page.get_by_text("Override the guard").wait_for()
    take("form.png", page, page.get_by_role("dialog"), margin=0)


def picture_restore(page: Page, both: Scene, below: Path) -> None:
    """Take restore.png: the form by which a person gets files back; and have it bring some.

    :raises SystemExit: they did not come.
    """
    below.mkdir()
    both.airflow.wait_for_dag(RESTORE)
    page.set_viewport_size({"width": 1300, "height": 1500})
    page.goto(f"/dags/{RESTORE}")
    page.get_by_role("button", name="Trigger").first.click()
    form = page.get_by_role("dialog").filter(has_text="Run Parameters")
    form.get_by_text("Only show what would be restored.").wait_for()
    form.locator("#element_paths").fill(f"{both.server.prefix}/backups/json")
    form.locator("#element_as_of").fill("1 second ago")
    take("restore.png", page, form, margin=0)
    form.get_by_role("button", name="Trigger").click()
    page.wait_for_timeout(2000)
    (last,) = both.airflow.get(f"/dags/{RESTORE}/dagRuns")["dag_runs"]
    state = both.airflow.wait_for_run(RESTORE, last["dag_run_id"])
    if state != "success" or not list(below.rglob("decoder.py")):
        raise SystemExit(f"The restore is {state}.")


def picture_approval(page: Page, both: Scene) -> None:
    """Take approval.png: what a person is asked when the guard has tripped."""
    run(both.airflow, "success")
    for directory in both.source.iterdir():
        if directory.is_dir():
            shutil.rmtree(directory)
    waiting = both.airflow.trigger(DAG_ID)
    for _ in range(600):
        if both.airflow.task_states(DAG_ID, waiting).get("approve") == "awaiting_input":
            break
        page.wait_for_timeout(500)
    page.set_viewport_size({"width": 1300, "height": 800})
    page.goto(f"/dags/{DAG_ID}/runs/{waiting}/tasks/approve/required_actions")
    reject = page.get_by_role("button", name="Reject")
    reject.wait_for()
    texts = (page.get_by_text(text) for text in ("Awaiting Input", "ApproveChanges", "Dag Version"))
    take("approval.png", page, *texts, reject)


def take(name: str, page: Page, *parts: Locator, margin: int = MARGIN) -> None:
    """Take a picture of the rectangle around some parts of the page."""
    page.wait_for_timeout(2000)  # until everything has moved to its place
    boxes = [box for part in parts for one in part.all() if (box := one.bounding_box())]
    left = min(box["x"] for box in boxes) - margin
    top = min(box["y"] for box in boxes) - margin
    right = max(box["x"] + box["width"] for box in boxes) + margin
    bottom = max(box["y"] + box["height"] for box in boxes) + margin
    IMAGES.mkdir(parents=True, exist_ok=True)
    clip = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    page.screenshot(path=IMAGES / name, clip=clip, animations="disabled")
    console.print(f"docs/images/{name}: {(IMAGES / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
