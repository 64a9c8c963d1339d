"""A headless Chromium that tells what a page asked for, complained about and shows.

It speaks the DevTools protocol over a pair of pipes (messages are JSON, ended by a zero byte), so
nothing has to be installed beside the browser, and no port is opened.
"""

import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def executable() -> str | None:
    """The path of a Chromium, or nothing."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Page:
    """What was seen of a page.

    requests: addresses it asked for. complaints: errors on its console. value: what the expression
    that was evaluated in it came to.
    """

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    value: object = None


class Browser:
    """One browser process; `visit` opens a page in it."""

    def __init__(self, write: int, read: int, seconds: float) -> None:
        self._write, self._read, self._seconds = write, read, seconds
        self._buffer, self._count = b"", 0

    def visit(self, address: str, expression: str) -> Page:
        """Open a page, wait until it is loaded, evaluate an expression (promises are awaited)."""
        page = Page()
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attach = {"targetId": target, "flatten": True}
        session = self._call("Target.attachToTarget", attach)["sessionId"]
        for domain in ("Network", "Runtime", "Log", "Page"):
            self._call(f"{domain}.enable", session=session)
        self._call("Page.navigate", {"url": address}, session, page)
        self._wait(lambda m: m.get("method") == "Page.loadEventFired", page)
        ask = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        answer = self._call("Runtime.evaluate", ask, session, page)
        if "exceptionDetails" in answer:
            page.complaints.append(f"evaluating: {answer['exceptionDetails']['text']}")
        page.value = answer["result"].get("value")
        self._call("Target.closeTarget", {"targetId": target}, page=page)
        return page

    def _call(
        self,
        method: str,
        parameters: dict | None = None,
        session: str = "",
        page: Page | None = None,
    ) -> dict:
        self._count += 1
        number = self._count
        message = {"id": number, "method": method, "params": parameters or {}}
        message |= {"sessionId": session} if session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answer = self._wait(lambda m: m.get("id") == number, page)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _wait(self, wanted: Callable[[dict], bool], page: Page | None) -> dict:
        deadline = time.monotonic() + self._seconds
        while True:
            message = self._message(deadline)
            _note(message, page)
            if wanted(message):
                return message

    def _message(self, deadline: float) -> dict:
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                raise TimeoutError(f"the browser said nothing for {self._seconds} s")
            data = os.read(self._read, 1 << 20)
            if not data:
                raise RuntimeError("the browser has gone")
            self._buffer += data
        first, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(first)


def _note(message: dict, page: Page | None) -> None:
    """Keep what an event says about the page."""
    if page is None:
        return
    said = message.get("params", {})
    match message.get("method"):
        case "Network.requestWillBeSent":
            page.requests.append(said["request"]["url"])
        case "Network.loadingFailed":
            page.complaints.append(f"not loaded: {said['errorText']}")
        case "Runtime.exceptionThrown":
            page.complaints.append(str(said["exceptionDetails"].get("exception", said)))
        case "Runtime.consoleAPICalled" if said["type"] in ("error", "assert"):
            page.complaints.append(str(said["args"]))
        case "Log.entryAdded" if said["entry"]["level"] == "error":
            page.complaints.append(said["entry"]["text"])


@contextmanager
def open_browser(profile: Path, seconds: float = 60) -> Iterator[Browser]:
    """A browser with a profile of its own that lives as long as the block.

    Parameters
    ----------
    profile : Path
        Empty folder for what the browser keeps.
    seconds : float
        How long a page may be silent.
    """
    (their_read, write), (read, their_write) = os.pipe(), os.pipe()
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (their_read, their_write)]
    os.close(their_read)
    os.close(their_write)
    options = ["--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"]
    options += ["--disable-background-networking", "--disable-component-update", "--no-first-run"]
    options += ["--disable-dev-shm-usage", f"--user-data-dir={profile}"]
    # The browser reads from descriptor 3 and writes to descriptor 4; its own chatter is dropped.
    wiring = [(os.POSIX_SPAWN_DUP2, theirs[0], 3), (os.POSIX_SPAWN_DUP2, theirs[1], 4)]
    wiring += [(os.POSIX_SPAWN_OPEN, out, os.devnull, os.O_WRONLY, 0) for out in (1, 2)]
    program = executable()
    process = os.posix_spawn(
        program, [program, *options], os.environ, file_actions=wiring, setpgroup=0
    )
    for end in theirs:
        os.close(end)
    try:
        yield Browser(write, read, seconds)
    finally:
        os.close(write)
        os.close(read)
        os.killpg(process, signal.SIGKILL)  # it starts helpers, which end together with it
        os.waitpid(process, 0)
