"""What clients that misbehave do to the others, and how the server comes back after it was killed.

    python -m cnpp_trt.developer.service_abuse [--aborts 1000] [--seconds 15]

Starts `cnpp-trt serve` on the embedded miniature. One honest client asks for a picture again and again while others
abort their requests, send them a byte at a time, or send a GiB. Each of its pictures is compared with the pipeline's.
Prints a table in Markdown.
"""

import asyncio
import contextlib
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

import httpx
import typer

from ..bundles.bundle import Bundle
from ..errors import CnppError
from ..runtime.pipeline import Pipeline
from .service_load import Case, Child, make_cases, same_picture

_PATH = "/v1/images/generations"
_MIB = 1 << 20


def main(aborts: int = 1000, slow: int = 200, senders: int = 8, seconds: float = 15.0, threads: int = 2) -> None:
    """Measures and prints."""
    bundle = Bundle.find("miniature").folder
    line = [sys.executable, "-m", "cnpp_trt", "serve", "--bundle", str(bundle), "--threads", str(threads), "--port"]
    with Pipeline.open(bundle, threads=threads) as pipeline:
        cases = make_cases(pipeline, 4)
    abuses: dict[str, Callable[[Child, asyncio.Event], Awaitable[str]]] = {
        "nobody else": _nobody,
        f"{aborts:,} requests, aborted in the queue and while they are drawn": lambda c, e: _abort(c, cases[0], aborts),
        f"{slow} clients that send a byte a second": lambda c, e: _drip(c, e, slow),
        f"{senders} clients that send 1 GiB each, again and again": lambda c, e: _flood(c, e, senders),
    }
    print("| beside | pictures | wrong or refused | median | longest | memory of the server |")
    print("|---|---:|---:|---:|---:|---:|")
    with Child("cnpp-trt serve", [*line, "0"]) as child:
        for name, abuse in abuses.items():
            spent, wrong, memory, told = asyncio.run(_beside(child, abuse, cases, seconds))
            what = f"{name}: {told}" if told else name
            row = f"| {what} | {len(spent)} | {wrong} | {statistics.median(spent):.3f} s | {max(spent):.3f} s "
            print(f"{row}| {memory:.0f} MiB |", flush=True)
        port = str(urlsplit(child.url).port)
        child.process.send_signal(signal.SIGKILL)
        child.process.wait(60)
    began = time.perf_counter()
    with Child("cnpp-trt serve", [*line, port]) as child:
        answer = httpx.post(child.url + _PATH, json=cases[0].body, timeout=600, trust_env=False)
        right = same_picture(answer, cases[0])
        print(f"\nKilled with SIGKILL and started again on the same port: a picture after "
              f"{time.perf_counter() - began:.1f} s, {'the same' if right else 'another'}; ", end="")  # fmt: skip
        print(f"SIGTERM ended it with status {child.stop()}.")
    if not right:
        raise CnppError("the picture after the restart was wrong")


async def _beside(
    child: Child, abuse: Callable[[Child, asyncio.Event], Awaitable[str]], cases: list[Case], seconds: float
) -> tuple[list[float], int, float, str]:
    """An honest client beside an abuse: seconds of its pictures, those that are wrong, MiB of the server at most."""
    ends = asyncio.Event()
    abusing = asyncio.create_task(_named(abuse, child, ends))
    spent: list[float] = []
    wrong, memory, until = 0, 0.0, time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=child.url, timeout=600, trust_env=False) as client:
        while time.monotonic() < until or not (abusing.done() or ends.is_set()) or len(spent) < 3:
            case, began = cases[len(spent) % len(cases)], time.perf_counter()
            answer = await client.post(_PATH, json=case.body)
            spent.append(time.perf_counter() - began)
            wrong += not same_picture(answer, case)
            memory = max(memory, child.memory())
            if time.monotonic() >= until:
                ends.set()
    return spent, wrong, memory, await abusing


async def _named(abuse: Callable[[Child, asyncio.Event], Awaitable[str]], child: Child, ends: asyncio.Event) -> str:
    return await abuse(child, ends)


async def _nobody(child: Child, ends: asyncio.Event) -> str:
    return ""


async def _abort(child: Child, case: Case, count: int) -> str:
    """Sends whole requests and closes the connection at once, or within half a second."""
    import json

    body = json.dumps(case.body | {"num_inference_steps": 20}).encode()
    head = _head(f"Content-Length: {len(body)}")
    for number in range(count):
        _, writer = await _connect(child)
        writer.write(head + body)
        await writer.drain()
        await asyncio.sleep((0, 0.005, 0.02, 0.5)[3 if number % 50 == 0 else number % 3])
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return ""


async def _drip(child: Child, ends: asyncio.Event, count: int) -> str:
    """Half of them never end the head, half never end the body."""

    async def one(number: int) -> bool:
        head = _head("Content-Length: 1000")
        reader, writer = await _connect(child)
        data = head[:-4] + b"\r\nX-A: " if number % 2 else head
        writer.write(data)
        try:
            while not ends.is_set():
                writer.write(b"a")
                await writer.drain()
                with contextlib.suppress(TimeoutError):
                    if await asyncio.wait_for(reader.read(1), 1) == b"":
                        return True
        except OSError:
            return True
        finally:
            writer.close()
        return False

    closed = await asyncio.gather(*(one(number) for number in range(count)))
    return f"{sum(closed)} were closed by the server meanwhile"


async def _flood(child: Child, ends: asyncio.Event, count: int) -> str:
    """Half of them say how much they send; all try to send it."""
    sent = ended = 0
    block = b"x" * _MIB

    async def one(number: int) -> None:
        nonlocal sent, ended
        while not ends.is_set():
            _, writer = await _connect(child)
            kind = "Content-Length: 1073741824" if number % 2 else "Transfer-Encoding: chunked"
            try:
                writer.write(_head(kind))
                for _ in range(1024):
                    writer.write(block if number % 2 else b"100000\r\n" + block + b"\r\n")
                    await writer.drain()
                    sent += 1
            except OSError:  # the server closed the connection: it reads no further than its limit
                ended += 1
            writer.close()
            await asyncio.sleep(0.05)

    await asyncio.gather(*(one(number) for number in range(count)))
    return f"{ended} connections were closed by the server, after {sent:,} MiB in all"


async def _connect(child: Child) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    place = urlsplit(child.url)
    return await asyncio.open_connection(place.hostname, place.port)


def _head(line: str) -> bytes:
    text = f"POST {_PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{line}\r\n\r\n"
    return text.encode()


if __name__ == "__main__":
    typer.run(main)
