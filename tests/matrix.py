"""Judge every model of the corpora and write docs/coverage.md.

    python -m tests.matrix                    every model; what an earlier run judged with the same code is not repeated
    python -m tests.matrix --only hf:bert tv  names, or the beginnings of names
    python -m tests.matrix --again            those that were not exact, whatever the code
    python -m tests.matrix --report           only write the page

Models are judged by worker processes, one after the other, so that a crash, a hang or a lack of memory costs one model
and no more: its record says so, and the rest goes on in a fresh process. Records are JSON lines in ``.matrix/``.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO

from tests.coverage_page import Record, complaints, page

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".matrix" / "records.jsonl"
PAGE = ROOT / "docs" / "coverage.md"


def digest() -> str:
    """Fingerprint of the code that is judged and of the versions that it runs with."""
    import torch

    h = hashlib.sha256(torch.__version__.encode())
    for folder in ("chase_fx", "graphs", "passes"):
        for path in sorted((ROOT / folder).glob("**/*.py")):
            h.update(path.read_bytes())
    return h.hexdigest()[:16]


def load(cache: Path) -> dict[str, Record]:
    """The newest record of each model."""
    if not cache.exists():
        return {}
    records = (json.loads(line) for line in cache.read_text().splitlines() if line.strip())
    return {record["name"]: record for record in records}


# -- workers -----------------------------------------------------------------------------------------------------------


def work(names: Iterable[str]) -> None:
    """The worker: a JSON line for each model on stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a model prints is not a record
    faulthandler.register(signal.SIGUSR1)  # where it is when its time is over
    from tests.judge import judge

    judge("shape:conv1d")  # imports and first calls are nobody's prune time
    for name in names:
        out.write(json.dumps({"name": name, "state": "started"}) + "\n")
        out.flush()
        out.write(json.dumps(judge(name)) + "\n")
        out.flush()


class Worker(threading.Thread):
    """Keeps one worker process busy with models of a queue."""

    def __init__(self, todo: SimpleQueue[str], done: SimpleQueue[Record], timeout: float) -> None:
        super().__init__(daemon=True)
        self.todo, self.done, self.timeout = todo, done, timeout

    def run(self) -> None:
        # Smaller ones towards the end, so that no process is left alone with many.
        while chunk := self._take(max(1, min(12, self.todo.qsize() // 8))):
            while chunk:
                judged = self._process(chunk)
                chunk = chunk[judged:]

    def _take(self, number: int) -> list[str]:
        taken = []
        for _ in range(number):
            try:
                taken.append(self.todo.get_nowait())
            except Empty:
                break
        return taken

    def _process(self, names: Sequence[str]) -> int:
        """Judge ``names`` in a process of their own; how many have a record when it ends."""
        with tempfile.TemporaryFile("w+") as log:
            return self._converse(names, log)

    def _converse(self, names: Sequence[str], log: IO[str]) -> int:
        judged = 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "tests.matrix", "--worker", *names]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=environment
        ) as process:
            assert process.stdout is not None
            timed_out = threading.Event()

            def stop() -> None:
                timed_out.set()
                process.send_signal(signal.SIGUSR1)
                time.sleep(2)
                process.kill()

            timer = threading.Timer(self.timeout * 2, stop)
            timer.start()
            for line in process.stdout:
                record = json.loads(line)
                timer.cancel()
                timer = threading.Timer(self.timeout, stop)
                timer.start()
                if record["state"] != "started":
                    self.done.put(record)
                    judged += 1
            timer.cancel()
            code = process.wait()
        if judged < len(names):
            log.seek(0)
            why = f"no answer in {self.timeout:.0f} s" if timed_out.is_set() else f"exit status {code}"
            why += f": {log.read()[-1000:]}"
            self.done.put(
                {"name": names[judged], "state": "timeout" if timed_out.is_set() else "crashed", "reason": why}
            )
            judged += 1
        return judged


def run(names: Sequence[str], cache: Path, jobs: int, timeout: float) -> None:
    """Judge ``names`` and append their records to the cache."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    todo: SimpleQueue[str] = SimpleQueue()
    done: SimpleQueue[Record] = SimpleQueue()
    for name in names:
        todo.put(name)
    code, start = digest(), time.monotonic()
    workers = [Worker(todo, done, timeout) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    for number in range(1, len(names) + 1):
        record = {**done.get(), "code": code}
        with cache.open("a") as f:
            f.write(json.dumps(record) + "\n")
        left = (time.monotonic() - start) / number * (len(names) - number) / 60
        line = f"{number}/{len(names)} {record['state']:9}{record['name']}  {record.get('reason', '')[:150]}"
        sys.stdout.write(f"{line}  ({left:.0f} min left)\n")
        sys.stdout.flush()


# -- command line ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 1 if something that is judged is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="names or their beginnings")
    parser.add_argument("--again", action="store_true", help="judge what was not exact again")
    parser.add_argument("--report", action="store_true", help="judge nothing, write the page")
    parser.add_argument("--jobs", type=int, default=max(1, min(2, (os.cpu_count() or 2))))
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one model")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--worker", nargs="+", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        work(options.worker)
        return 0
    from tests.zoo import names

    wanted = [name for name in names() if name.startswith(tuple(options.only))]
    records = load(options.cache)
    if not options.report:
        code = digest()
        if options.again:
            todo = [name for name in wanted if records.get(name, {}).get("state") != "exact"]
        else:
            todo = [name for name in wanted if records.get(name, {}).get("code") != code]
        run(todo, options.cache, options.jobs, options.timeout)
        records = load(options.cache)
    known = set(names())
    judged = {name: record for name, record in records.items() if name in known}
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(page(judged, len(known - set(judged))))
    wrong = [name for name in wanted if name not in judged or complaints(judged[name])]
    for name in wrong:
        sys.stdout.write(f"{name}: {'; '.join(complaints(judged[name]))[:200] if name in judged else 'not judged'}\n")
    exact = sum(record["state"] == "exact" for record in judged.values())
    sys.stdout.write(f"{len(judged)} models, {exact} exact; see {options.page}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
