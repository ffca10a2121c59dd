"""Take the picture of docs/images: the graph of a backup that has run, in the UI of a real Airflow.

``python -m demo.screenshot`` needs Debian's chromium and the Python package playwright, without a browser of
its own. Chromium talks to this Airflow and to nothing else.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from demo.scene import DAG_ID, REPOSITORY, offer_standard_library, scene
from demo.sshd import ProviderServer
from demo.stack import AirflowStack
from demo.told import back_up, console

GRAPH = REPOSITORY / "docs" / "images" / "graph.png"
MARGIN = 24
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
    """Back up once, and take a picture of it."""
    with tempfile.TemporaryDirectory(prefix="mdbackup-") as name:
        folder = Path(name)
        with ProviderServer(folder / "server") as server:
            offer_standard_library(server.tree / "backups")
            with scene(folder, server) as both:
                run_id = back_up(both, "One run, for its picture").run_id
                picture_graph(both.airflow, run_id, folder / "chromium")
    console.print(f"\n{GRAPH.relative_to(REPOSITORY)}: {GRAPH.stat().st_size:,} bytes")
    return 0


def picture_graph(airflow: AirflowStack, run_id: str, profile: Path) -> None:
    """Write `GRAPH`, the graph view of a run, cut to the graph.

    :param profile: directory for what Chromium keeps; new.
    """
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=CHROMIUM,
            args=FLAGS,
            base_url=airflow.url,
            viewport={"width": 1900, "height": 700},
            device_scale_factor=1.5,
            color_scheme="light",
        )
        page = context.new_page()
        page.goto("/")
        page.fill("input[name=username]", airflow.user)
        page.fill("input[name=password]", airflow.password)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url(f"{airflow.url}/")
        page.evaluate("""localStorage.setItem("default_dag_view", '"graph"')""")
        page.goto(f"/dags/{DAG_ID}/runs/{run_id}")
        page.get_by_text("commit_backup", exact=True).first.wait_for()
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(2000)  # until the graph has moved to its place
        GRAPH.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=GRAPH, clip=_surroundings(page), animations="disabled")
        context.close()


def _surroundings(page: Page) -> dict[str, float]:
    """Return the rectangle around all tasks of the graph, in pixels of the page."""
    boxes = [box for node in page.locator(".react-flow__node").all() if (box := node.bounding_box())]
    left = min(box["x"] for box in boxes) - MARGIN
    top = min(box["y"] for box in boxes) - MARGIN
    right = max(box["x"] + box["width"] for box in boxes) + MARGIN
    bottom = max(box["y"] + box["height"] for box in boxes) + MARGIN
    return {"x": left, "y": top, "width": right - left, "height": bottom - top}


if __name__ == "__main__":
    sys.exit(main())
