#!/usr/bin/env python3
"""Load, kill, memory and throughput of `scripts/serve.py`, a process of its own, on `scenes-64`.

    python benchmarks/service.py [--only load kill memory cancel slow equal throughput] [--name service]

Every request has a prompt and a seed of its own, which are read back from the file that answers it. A client
that is turned away comes back after the seconds of Retry-After, one whose connection broke at once. The last
results are in benchmarks/results/service.md, every reading in service.json.
"""

import asyncio
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from report import RESULTS, Row, machine, write_results

from ldm.cli.entry import run
from ldm.cli.parser import Parser, number
from ldm.errors import InputError
from ldm.weights.loading import ROOT, SMALL_WEIGHTS

CLIENTS, QUEUE = 200, 64
STEPS = 4  # of images whose number counts, not their looks
START = 120.0  # seconds that the service may take to start
LIMIT = 900.0  # seconds of one measurement
BATCH = 8
WARM = 1000  # requests after which memory has to stay: as many finished jobs are kept
FLAT = 0.05  # of the memory, that it may grow by in the requests after those
TARGET = 0.95  # of txt2img.py's images a second
THROUGHPUT_STEPS = 20
HEADER, BODY = 10.0, 20.0  # seconds in which headers have to arrive, and a body has to begin to


class Service:
    """`serve.py` as a process: its address, and its memory. `clients` names have a token each, if any."""

    def __init__(self, folder: Path, *arguments: str, port: int = 0, clients: int = 0):
        self.log = folder / f"serve-{time.monotonic_ns()}.log"
        command = [sys.executable, str(ROOT / "scripts/serve.py"), "--port", str(port)]
        command += ["--model", f"small={ROOT / SMALL_WEIGHTS}"]
        if clients:
            tokens = folder / "tokens"
            tokens.write_text("".join(f"client{k}:{token(k)}\n" for k in range(clients)))
            command += ["--token_file", str(tokens)]
        start = time.perf_counter()
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*command, *arguments], stdout=log, stderr=log)
        self.url = self._wait(start + START)
        self.port = urlsplit(self.url).port
        self.started_in = time.perf_counter() - start

    def _wait(self, end: float) -> str:
        while time.perf_counter() < end:
            if found := re.search(r"http://\S+?:\d+", self.log.read_text()):
                with suppress(OSError):
                    connection = HTTPConnection(urlsplit(found[0]).netloc, timeout=5)
                    connection.request("GET", "/ready")
                    if connection.getresponse().status == 200:
                        return found[0]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.process.kill()
        raise InputError(f"the service did not start: {self.log.read_text()[-500:]}")

    @property
    def resident(self) -> int:
        """Bytes of memory that the process has now (Linux)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * 1024

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(90)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise InputError("the service did not end within 90 s of SIGTERM") from None


@contextmanager
def serving(folder: Path, *arguments: str, **choices: Any) -> Iterator[Service]:
    service = Service(folder, *arguments, **choices)
    try:
        yield service
    finally:
        if service.process.poll() is None:
            service.end()


def token(k: int) -> str:
    return f"token-of-client-{k}"


def request(k: int, steps: int = STEPS) -> dict[str, Any]:
    """Request number k, with a prompt and a seed that no other one has."""
    return {"prompt": f"a red cube on top of a blue sphere, number {k}", "seed": 10_000 + k, "steps": steps}


def mismatch(asked: dict[str, Any], png: bytes) -> str | None:
    """How an answer's settings differ from what was asked for; None if they do not."""
    from PIL import Image

    from ldm.images.metadata import METADATA_KEYWORD

    settings = json.loads(Image.open(io.BytesIO(png)).text[METADATA_KEYWORD])
    wrong = {name: settings.get(name) for name, value in asked.items() if settings.get(name) != value}
    return f"asked for {asked}, got {wrong}" if wrong else None


@asynccontextmanager
async def connections(limit: float = LIMIT) -> AsyncIterator[Any]:
    """An HTTP client with as many connections as are wanted. TimeoutError after `limit` seconds."""
    import httpx2

    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with asyncio.timeout(limit), httpx2.AsyncClient(timeout=None, limits=limits) as client:
        yield client


async def answer(client: Any, url: str, asked: dict[str, Any], k: int, tally: Counter) -> bytes:
    """The file that answers a request, however often it has to be sent; `tally` counts what happens."""
    import httpx2

    headers = {"Authorization": f"Bearer {token(k)}", "Accept": "image/png"}
    while True:
        tally["sent"] += 1
        try:
            found = await client.post(f"{url}/generate", json=asked, headers=headers)
        except httpx2.TransportError:
            tally["connection lost"] += 1
            await asyncio.sleep(0.2)
            continue
        tally[str(found.status_code)] += 1
        if found.status_code == 200:
            return found.content
        if found.status_code not in (429, 503):
            raise InputError(f"status {found.status_code}: {found.text[:300]}")
        await asyncio.sleep(float(found.headers.get("Retry-After", 0.5)) * random.uniform(1, 1.25))


async def load(
    url: str, clients: int, each: int, *, during: Callable[[], Any] | None = None
) -> dict[str, Any]:
    """Many clients, each with so many requests after another. What happened, and all wrong answers.

    `during` is called in a thread after the first answers.
    """
    tally, wrong, answers = Counter(), [], Counter()
    start = time.perf_counter()
    async with connections() as client:

        async def ask(k: int) -> None:
            for i in range(each):
                asked = request(k * each + i)
                png = await answer(client, url, asked, k, tally)
                answers[asked["seed"]] += 1
                if difference := mismatch(asked, png):
                    wrong.append(difference)

        async def disturb() -> None:
            while during and sum(answers.values()) < min(16, clients * each):
                await asyncio.sleep(0.02)
            if during:
                await asyncio.to_thread(during)

        await asyncio.gather(disturb(), *(ask(k) for k in range(clients)))
    return {
        "requests": clients * each,
        "answered": len(answers),
        "answered twice": sum(n > 1 for n in answers.values()),
        "wrong": wrong,
        "tally": dict(tally),
        "seconds": time.perf_counter() - start,
    }


def figures(url: str, k: int = 0) -> dict[str, float]:
    """The service's figures without labels, from /metrics."""
    status, text = plain(url, "GET", "/metrics", k=k)
    assert status == 200, text
    return {name: float(value) for name, value in re.findall(r"^(sd_\w+) (\S+)$", text.decode(), re.M)}


def plain(url: str, method: str, path: str, content: Any = None, k: int = 0) -> tuple[int, bytes]:
    """One request, without retries: status and body."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=60)
    headers = {"Authorization": f"Bearer {token(k)}", "Content-Type": "application/json"}
    connection.request(method, path, None if content is None else json.dumps(content), headers)
    response = connection.getresponse()
    try:
        return response.status, response.read()
    finally:
        connection.close()


# Load


def measure_load(folder: Path, clients: int = CLIENTS, queue: int = QUEUE, each: int = 2) -> Iterator[Row]:
    with serving(folder, "--queue_size", str(queue), clients=clients) as service:
        found = asyncio.run(load(service.url, clients, each))
        found["images made"] = figures(service.url)["sd_images_total"]
    turned_away = found["tally"].get("429", 0)
    met = (
        found["answered"] == found["images made"] == found["requests"]
        and turned_away > 0
        and not found["wrong"]
    )
    yield Row(
        f"{clients} clients at once, {each} requests each, a queue of {queue}: none lost, none twice, "
        "every answer the image that was asked for",
        "all, 429 where the queue is full",
        f"{found['answered']} of {found['requests']} answered, {len(found['wrong'])} wrong, "
        f"{found['images made']:.0f} images made, {turned_away} times 429; {found['seconds']:.1f} s",
        met,
        found,
    )


def measure_kill(folder: Path, *arguments: str, clients: int = 50, each: int = 4) -> Iterator[Row]:
    kept, services = folder / "kept", []
    arguments = (*arguments, "--keep", str(kept))
    services.append(Service(folder, *arguments, clients=clients))

    def again() -> None:
        services[0].kill()
        services.append(Service(folder, *arguments, port=services[0].port, clients=clients))

    try:
        found = asyncio.run(load(services[0].url, clients, each, during=again))
    finally:
        code = services[-1].end() if services[-1].process.poll() is None else None
    found |= {"exit code": code, "start": [one.started_in for one in services], **kept_files(kept)}
    met = found["answered"] == found["requests"] and not found["wrong"] and not found["damaged"]
    yield Row(
        f"SIGKILL under the load of {clients} clients, and a new start on the same port",
        "all answered by their own images; kept files whole, each with its line",
        f"{found['answered']} of {found['requests']} answered, {len(found['wrong'])} wrong, "
        f"{found['tally'].get('connection lost', 0)} connections lost, up again in "
        f"{found['start'][-1]:.1f} s; {found['files']} kept files, {found['damaged']} damaged",
        met and code == 0,
        found,
    )


def kept_files(folder: Path) -> dict[str, int]:
    """How many image files a folder of kept images has, and how many are damaged or lines without a file."""
    from PIL import Image

    files = {path: path for path in folder.rglob("*.png")}
    damaged = 0
    for path in files:
        try:
            Image.open(path).load()
        except Exception:  # whatever Pillow raises for half a file
            damaged += 1
    for line in (folder / "manifest.jsonl").read_text().splitlines():
        try:
            damaged += not (folder / json.loads(line)["file"]).exists()
        except ValueError:
            damaged += 1
    return {"files": len(files), "damaged": damaged}


# Memory


def measure_memory(folder: Path, requests: int = 2000, clients: int = BATCH) -> Iterator[Row]:
    readings: list[tuple[int, int]] = []
    with serving(folder, clients=clients) as service:

        async def ask_all() -> dict[str, Any]:
            tally, wrong, numbers = Counter(), [], iter(range(requests))
            async with connections() as client:

                async def ask(k: int) -> None:
                    for i in numbers:
                        # few prompts: the embeddings of the last 2,048 are kept, which is meant
                        asked = request(i, steps=2) | {"prompt": request(i % 50)["prompt"]}
                        if difference := mismatch(asked, await answer(client, service.url, asked, k, tally)):
                            wrong.append(difference)
                        if not i % 20:
                            readings.append((i, service.resident))

                await asyncio.gather(*(ask(k) for k in range(clients)))
            return {"tally": dict(tally), "wrong": wrong}

        start = time.perf_counter()
        found = asyncio.run(ask_all()) | {"resident": readings}
        found["seconds"] = time.perf_counter() - start
    readings.sort()
    warm = min(WARM, requests // 2)
    before = median(size for i, size in readings if warm <= i < warm + requests // 5)
    after = median(size for i, size in readings if i >= requests - requests // 5)
    growth = found["growth"] = after / before - 1
    with suppress(ImportError):
        plot_memory(readings, RESULTS / "service-memory.png")
    yield Row(
        f"{requests:,} requests of {clients} clients, 50 prompts: memory of the process, requests {warm} to "
        f"{warm + requests // 5} and the last {requests // 5}",
        f"grows by less than {FLAT:.0%}",
        f"{before / 2**20:.0f} MiB, {after / 2**20:.0f} MiB ({growth:+.1%}); {found['seconds']:.0f} s",
        growth < FLAT and not found["wrong"],
        found,
    )


def plot_memory(readings: Sequence[tuple[int, int]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    axes.plot([i for i, _ in readings], [size / 2**20 for _, size in readings], color="#1f6f8b")
    axes.set(xlabel="requests", ylabel="resident memory (MiB)", ylim=(0, None), xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# Cancelling


def measure_cancel(folder: Path, queue: int = QUEUE, steps: int = 150) -> Iterator[Row]:
    with serving(folder, "--queue_size", str(queue), "--max_images", str(min(16, queue))) as service:
        jobs, status = [], 202
        while status == 202 and len(jobs) < 4 * queue:
            status, body = plain(
                service.url, "POST", "/generate", request(len(jobs), steps) | {"wait": False}
            )
            if status == 202:
                jobs.append(json.loads(body)["id"])
        full, accepted = status, len(jobs)
        states = [json.loads(plain(service.url, "DELETE", f"/jobs/{id}")[1])["state"] for id in jobs]
        start = time.perf_counter()
        again, body = plain(service.url, "POST", "/generate", request(0, steps=2))
        seconds = time.perf_counter() - start
        gone = abandoned(service, steps)
    found = {
        "accepted": accepted,
        "then": full,
        "states": dict(Counter(states)),
        "after": again,
        "seconds": seconds,
        "left waiting by clients that went away": gone,
    }
    yield Row(
        f"{accepted} jobs fill the queue of {queue}; all are cancelled, and the next request is answered",
        "429, then 200; nothing waits for clients that went away",
        f"{full}, then {again} after {seconds:.2f} s; {gone} images wait",
        (full, again, gone) == (429, 200, 0),
        found,
    )


def abandoned(service: Service, steps: int, clients: int = 12) -> int:
    """Images that wait after clients have sent requests and closed their connections; at most 10 s after."""
    content = json.dumps(request(0, steps)).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token(0)}\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    ).encode()
    sockets = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(clients)]
    for one in sockets:
        one.sendall(head + content)
    end = time.monotonic() + 10
    while not busy(service.url) and time.monotonic() < end:  # all of them may be sampled at once
        time.sleep(0.02)
    for one in sockets:
        one.close()
    end = time.monotonic() + 10
    while (left := busy(service.url)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def busy(url: str) -> int:
    """Images that wait or are being sampled."""
    found = figures(url)
    return int(found["sd_waiting_images"] + found.get("sd_running_images", 0))


# Connections that are meant to harm


def measure_slow(folder: Path, connections: int = 50) -> Iterator[Row]:
    with serving(folder, "--max_body", "1") as service:
        trickling = {
            "headers": (b"POST /generate HTTP/1.1\r\nHost: localhost\r\n", b"X: y\r\n"),
            "body": (b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n{", b" "),
        }
        found: dict[str, Any] = {}
        threads = [
            threading.Thread(
                target=lambda name=name: found.update(
                    {name: trickle(service.port, *trickling[name], connections)}
                )
            )
            for name in trickling
        ]
        for thread in threads:
            thread.start()
        time.sleep(1)
        start = time.perf_counter()
        found["meanwhile"] = plain(service.url, "POST", "/generate", request(0))[0]
        found["meanwhile seconds"] = time.perf_counter() - start
        found["giant body"] = giant(service.port, b"Content-Length: 10000000000\r\n", 2)
        found["giant body in chunks"] = giant(service.port, b"Transfer-Encoding: chunked\r\n", 64)
        for thread in threads:
            thread.join()
        found["afterwards"] = plain(service.url, "POST", "/generate", request(1))[0]
    longest = max(found["headers"]["last"], found["body"]["last"])
    open_still = found["headers"]["open"] + found["body"]["open"]
    giants = found["giant body"], found["giant body in chunks"]
    yield Row(
        f"{connections} connections whose headers trickle in, and {connections} whose body does",
        "all cut off; others are served meanwhile",
        f"headers after {found['headers']['last']:.0f} s, bodies after {found['body']['last']:.0f} s; "
        f"{open_still} left open; meanwhile {found['meanwhile']} in {found['meanwhile seconds']:.2f} s",
        open_still == 0 and found["meanwhile"] == found["afterwards"] == 200 and longest < BODY + 10,
        found,
    )
    yield Row(
        "bodies of 10 GB, declared or in chunks without end",
        "413, or the connection is closed",
        f"{giants[0]}, {giants[1]}",
        all(answer in ("413", "closed") for answer in giants),
    )


def trickle(port: int, start: bytes, more: bytes, number: int) -> dict[str, float]:
    """Connections that send `start`, then `more` every half second: seconds to the last one's end."""
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(number)]
    began = last = time.perf_counter()
    for one in sockets:
        one.sendall(start)
        one.setblocking(False)
    while sockets and time.perf_counter() - began < BODY + 20:
        time.sleep(0.5)
        for one in [*sockets]:
            try:
                one.send(more)
                ended = one.recv(65_536) == b"" or True  # an answer, too: it ends the connection
            except BlockingIOError:
                ended = False
            except OSError:
                ended = True
            if ended:
                one.close()
                sockets.remove(one)
                last = time.perf_counter()
    for one in sockets:
        one.close()
    return {"open": len(sockets), "last": last - began}


def giant(port: int, header: bytes, megabytes: int) -> str:
    """The status of a body that is larger than it may be, or how its connection ended."""
    chunk = b"100000\r\n" + bytes(2**20) + b"\r\n" if header.startswith(b"Transfer") else bytes(2**20)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as one:
        try:
            one.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\n" + header + b"\r\n")
            with suppress(OSError):  # the answer may be there before all is sent
                for _ in range(megabytes):
                    one.sendall(chunk)
            found = one.recv(65_536)
        except TimeoutError:
            return "open"
        except OSError:
            return "closed"
    return found.split(b" ")[1].decode() if found.startswith(b"HTTP/") else "closed"


# Batched answers and single ones


def measure_equal(folder: Path, images: int = BATCH, steps: int = THROUGHPUT_STEPS) -> Iterator[Row]:
    import numpy as np
    from PIL import Image

    def pixels(png: bytes) -> Any:
        return np.asarray(Image.open(io.BytesIO(png))).astype(int)

    with serving(folder) as service:

        async def ask(together: bool) -> list[bytes]:
            async with connections() as client:
                asked = [answer(client, service.url, request(k, steps), 0, Counter()) for k in range(images)]
                return list(await asyncio.gather(*asked)) if together else [await one for one in asked]

        before = figures(service.url)["sd_batches_total"]
        single = asyncio.run(ask(False))
        middle = figures(service.url)["sd_batches_total"]
        batched = asyncio.run(ask(True))
        after = figures(service.url)["sd_batches_total"]
    largest = max(int(abs(pixels(a) - pixels(b)).max()) for a, b in zip(single, batched, strict=True))
    found = {"batches": {"single": middle - before, "together": after - middle}, "largest": largest}
    yield Row(
        f"{images} requests one after another, and all together: the largest difference of a value",
        "one level of 255, in fewer batches",
        f"{largest}; {found['batches']['single']:.0f} batches, {found['batches']['together']:.0f} batches",
        largest <= 1 and found["batches"]["together"] < images,
        found,
    )


# Throughput


def measure_throughput(
    folder: Path, images: int = 96, steps: int = THROUGHPUT_STEPS, rounds: int = 8, clients: int = BATCH
) -> Iterator[Row]:
    ours, command = [], []
    with serving(folder) as service:
        service_rate(service.url, 2 * clients, steps, clients)
        for _ in range(rounds):
            # the one that waits takes nothing of the machine: no request, no work
            command.append(command_rate(folder, images, steps))
            ours.append(service_rate(service.url, images, steps, clients))
    ratio = median(ours) / median(command)
    yield Row(
        f"images a second of {clients} clients, {steps} steps, against `txt2img.py --batch_size {BATCH}`, "
        f"in turn, medians of {rounds}, OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')}",
        f">= {TARGET} of it",
        f"{median(ours):.2f} and {median(command):.2f}: {ratio:.3f}",
        ratio >= TARGET,
        {"service": ours, "command": command},
    )


def service_rate(url: str, images: int, steps: int, clients: int) -> float:
    """Images a second of clients that ask again as soon as they are answered, after the first batch."""
    numbers, times, lock = iter(range(images)), [], threading.Lock()

    def client() -> None:
        connection = HTTPConnection(urlsplit(url).netloc, timeout=LIMIT)
        headers = {"Content-Type": "application/json", "Accept": "image/png"}
        while True:
            with lock:
                k = next(numbers, None)
            if k is None:
                return connection.close()
            connection.request("POST", "/generate", json.dumps(request(k, steps)), headers)
            response = connection.getresponse()
            body = response.read()
            if response.status != 200 or mismatch(request(k, steps), body):
                raise InputError(f"status {response.status} for {request(k, steps)}")
            with lock:
                times.append(time.perf_counter())

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(times) != images:
        raise InputError(f"{images - len(times)} of {images} requests failed")
    return rate(times)


def command_rate(folder: Path, images: int, steps: int) -> float:
    """Images a second of txt2img.py, without its start and its first batch: by the lines that it prints."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(request(k, steps)) + "\n" for k in range(images)))
    command = [sys.executable, "-u", str(ROOT / "scripts/txt2img.py"), "--from-file", str(prompts)]
    command += ["--ckpt", str(ROOT / SMALL_WEIGHTS)]
    command += ["--n_iter", "1", "--batch_size", str(BATCH), "--skip_grid", "--quiet", "--json"]
    command += ["--outdir", str(folder / f"command-{time.monotonic_ns()}")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        times = [time.perf_counter() for line in process.stdout if line.startswith("{")]
    if process.returncode or len(times) != images:
        raise InputError(f"txt2img.py ended with {process.returncode} and {len(times)} images")
    return rate(times)


def rate(times: list[float]) -> float:
    """Things a second, from the end of the first batch to the end of the last one."""
    times = sorted(times)
    return (len(times) - BATCH) / (times[-1] - times[BATCH - 1])


PARTS = {
    "load": measure_load,
    "kill": measure_kill,
    "memory": measure_memory,
    "cancel": measure_cancel,
    "slow": measure_slow,
    "equal": measure_equal,
    "throughput": measure_throughput,
}


def parser() -> Parser:
    parser = Parser(prog="service.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, help="measure only these")
    add("--requests", type=number(int, 100), default=2000, help="of `memory` (2000)")
    add("--name", default="service", help="results go to benchmarks/results/NAME.json and .md (service)")
    return parser


def earlier(name: str, facts: dict[str, Any]) -> dict[str, list[Row]]:
    """The rows of the last results, which parts that are not measured now keep, if this is their machine."""
    path = RESULTS / f"{name}.json"
    record = json.loads(path.read_text()) if path.exists() else {"machine": {}, "parts": {}}
    same = all(record["machine"].get(key) == facts[key] for key in ("CPU", "cores", "torch"))
    return {part: [Row(**row) for row in rows] for part, rows in record["parts"].items()} if same else {}


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    facts = machine()
    rows = earlier(options.name, facts)
    for name in options.only or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            choices = {"requests": options.requests} if name == "memory" else {}
            rows[name] = list(PARTS[name](Path(folder), **choices))
        rows = {name: rows[name] for name in PARTS if name in rows}
        table = write_results(options.name, facts, rows)  # every time: what is interrupted keeps its rows
    print(table, end="")
    return 0 if all(row.met is not False for part in rows.values() for row in part) else 1


if __name__ == "__main__":
    sys.exit(run(main))
