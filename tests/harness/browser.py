"""A headless browser: content of a page after its scripts, and console messages."""

import re
import shutil
import subprocess

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


def load(path, script=""):
    """Loads a page in Chromium without a network.

    Args:
      path: HTML file.
      script: run when the page is loaded; may be asynchronous. Its result becomes the
        title of the page.

    Returns:
      The title as text, and the lines of the console.
    """
    page = path.with_name(f"scripted-{path.name}")
    run = (
        "<script>window.addEventListener('load', async () => {"
        f"document.title = await (async () => {{{script}}})();"
        "});</script></body>"
    )
    page.write_text(path.read_text().replace("</body>", run))
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu"),
            *("--enable-logging=stderr", "--virtual-time-budget=20000"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1300,2000"),
            *(
                "--dump-dom",
                f"--user-data-dir={path.parent / 'profile'}",
                page.as_uri(),
            ),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return title and title[1], console
