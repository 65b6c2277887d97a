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
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".matrix" / "records.jsonl"
PAGE = ROOT / "docs" / "coverage.md"
Record = dict[str, Any]

TITLES = {
    "tv": "torchvision, classification",
    "tvx": "torchvision, detection, segmentation, video",
    "timm": "timm, every family",
    "hf": "transformers",
    "shape": "shapes of nets",
}


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
        while chunk := self._take(12):
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
            why = (
                f"no answer in {self.timeout:.0f} s"
                if timed_out.is_set()
                else f"exit status {code}: {log.read()[-300:]}"
            )
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


# -- the page ----------------------------------------------------------------------------------------------------------


def judged_by_oracle(record: Record) -> str:
    """What the oracle says: exact, differs, or unjudged."""
    found = [record.get("oracle 0.5"), record.get("oracle 0.9")]
    if any(isinstance(f, float) and f > (1e-4 if record.get("precision") == "single" else 1e-9) for f in found):
        return "differs"
    return "exact" if all(isinstance(f, float) for f in found) else "unjudged"


def forwards(record: Record) -> float:
    """Time of trace, analyze, plan and rewrite in forwards of the model."""
    return (record["trace"] + record["analyze"] + record["rewrite"]) / max(record["forward"], 1e-9)


def _median(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.median(found) if found else float("nan")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


SUMMARY = """# Coverage

Written by `make matrix` (`python -m tests.matrix`); do not edit. Each model is captured, pruned to 50 % and to 90 % of
its channels without any option, and compared in double precision with the masked dense graph (at most 1e-9 relative
difference) and with an oracle that knows no labels (`tests/kept_means.py`).

- **exact**: both sparsities agree with the masked reference, and the traced graph with the model.
- **refused**: an error with its reason; nothing was changed. **mismatch**: `verify` found a difference and raised.
- **can shrink**: share of the parameters that some plan makes smaller. **but for outputs**: the same, and those counted
  too that only keep their size because an output of the model has it, or that the forward never uses.
- **time**: trace, analyze, plan and rewrite, in forwards of the same model and inputs (tiny models: mostly overhead).

Medians are over the exact models."""

HEAD = (
    "corpus", "models", "exact", "refused", "mismatch", "crashed", "oracle: exact / differs / unjudged", "left at 50 %",
    "left at 90 %", "can shrink", "but for outputs", "time",
)  # fmt: skip
MODEL = ("model", "parameters", "left at 50 %", "left at 90 %", "can shrink", "but for outputs", "time", "oracle")


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return [
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(_cell(str(cell)) for cell in row) + " |" for row in rows),
    ]


def page(records: dict[str, Record]) -> str:
    """docs/coverage.md."""
    corpora = {prefix: [r for n, r in records.items() if n.split(":")[0] == prefix] for prefix in TITLES}
    everything = [r for rs in corpora.values() for r in rs]
    lines = SUMMARY.splitlines()
    titled = [*((TITLES[p], rs) for p, rs in corpora.items()), ("**all**", everything)]
    lines += _table(HEAD, [_summary(title, rs) for title, rs in titled])
    _not_exact(lines, everything)
    _remarks(lines, [r for r in everything if r["state"] == "exact"])
    for prefix, rs in corpora.items():
        exact = sorted((r for r in rs if r["state"] == "exact"), key=lambda r: r["name"])
        if exact:
            lines += ["", f"## {TITLES[prefix]}"]
            lines += _table(MODEL, map(_model, exact))
    return "\n".join(lines) + "\n"


def _summary(title: str, records: Sequence[Record]) -> tuple[object, ...]:
    states = Counter(r["state"] for r in records)
    exact = [r for r in records if r["state"] == "exact"]
    oracle = Counter(judged_by_oracle(r) for r in exact)
    broken = sum(states[s] for s in ("crashed", "timeout", "unbuilt"))
    return (
        title,
        len(records),
        *(states[s] for s in ("exact", "refused", "mismatch")),
        broken,
        f"{oracle['exact']} / {oracle['differs']} / {oracle['unjudged']}",
        f"{_median(r['left 0.5'] for r in exact):.2f}",
        f"{_median(r['left 0.9'] for r in exact):.3f}",
        f"{_median(r['prunable'] for r in exact):.3f}",
        f"{_median(r['free'] for r in exact):.3f}",
        f"{_median(map(forwards, exact)):.0f}",
    )


def _model(r: Record) -> tuple[object, ...]:
    return (
        r["name"].split(":", 1)[1],
        f"{r['parameters']:,}",
        f"{r['left 0.5']:.2f}",
        f"{r['left 0.9']:.3f}",
        f"{r['prunable']:.3f}",
        f"{r['free']:.3f}",
        f"{forwards(r):.0f}",
        judged_by_oracle(r),
    )


def _not_exact(lines: list[str], records: Sequence[Record]) -> None:
    bad = sorted((r for r in records if r["state"] != "exact"), key=lambda r: (r["state"], r["name"]))
    lines += ["", "## Not exact"]
    lines += _table(("model", "state", "reason"), [(r["name"], r["state"], r.get("reason", "")[:260]) for r in bad])


def _remarks(lines: list[str], exact: Sequence[Record]) -> None:
    oracle = [(r, f"{r.get('oracle 0.5')}; {r.get('oracle 0.9')}") for r in exact if judged_by_oracle(r) != "exact"]
    batch = [(r, r["batch"]) for r in exact if r.get("batch") not in ("ok", "fixed", None)]
    train = [(r, r["train"]) for r in exact if r.get("train") not in ("ok", None)]
    frozen = [
        (r, f"{r['free']:.2f}: {'; '.join((r['unknown'] or r['frozen'])[:2])}") for r in exact if r["free"] < 0.97
    ]
    parts = {
        "The oracle differs or can't judge": oracle,
        "Another batch size": batch,
        "Train mode: outputs, gradients, buffers": train,
        "Frozen for another reason than an output": frozen,
    }
    for title, found in parts.items():
        if found:
            rows = [(r["name"], str(text)[:260]) for r, text in sorted(found, key=lambda pair: pair[0]["name"])]
            lines += ["", f"## {title}", *_table(("model", ""), rows)]
    unknown = Counter(op for r in exact for op in {u.split(": ")[0] for u in r["unknown"]})
    if unknown:
        lines += ["", "## Operators that froze channels"]
        lines += _table(("operator", "models"), [(f"`{op}`", number) for op, number in unknown.most_common()])


# -- command line ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 1 if something that is judged is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="names or their beginnings")
    parser.add_argument("--again", action="store_true", help="judge what was not exact again")
    parser.add_argument("--report", action="store_true", help="judge nothing, write the page")
    parser.add_argument("--jobs", type=int, default=max(1, min(2, (os.cpu_count() or 2))))
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one model")
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
    options.page.write_text(page(judged))
    wrong = [name for name in wanted if judged.get(name, {}).get("state") not in ("exact", "refused")]
    exact = sum(record["state"] == "exact" for record in judged.values())
    sys.stdout.write(f"{len(judged)} models, {exact} exact; see {options.page}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
