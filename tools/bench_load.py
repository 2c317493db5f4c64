"""Load and soak of the reward server: latency, throughput and memory with the models of the tiny profile.

    python tools/bench_load.py                                       # about 13 minutes on two cores

Starts a server, which ends with this program, and measures in this order:

* capacity: rollouts per second while --in-flight requests are unanswered at any time;
* load: requests at random moments (a Poisson process), at 0.5, 1, 2 and 4 times the capacity, whether or not the
  earlier ones are answered;
* soak: --soak-s seconds at the capacity, while the memory of all processes of the server is sampled. Here the client
  sends a refused or unanswered request again, as in a training; before, each request is sent once.

A latency starts at the moment at which the request should be sent, so that a delay in this program counts, too. Each
answer is compared with the one that the rollout had while the capacity was measured. A request is answered, refused
(the queue is full) or lost (for another reason, such as a crash of Triton). Another answer, and a lost request of the
soak, are faults. Writes docs/results/reward_load.json and the tables of
docs/reliability.md.
"""

import argparse
import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np

from tts_grpo.evaluation.processes import used_gib
from tts_grpo.evaluation.provenance import ROOT, provenance, replace_tables
from tts_grpo.reward.client import RewardClient, RewardServerError
from tts_grpo.reward.ports import port_fault
from tts_grpo.reward.protocol import MODEL_NAME
from tts_grpo.text.input_files import read_known_answers
from tts_grpo.text.jsonl import write_json

RESULTS, PAGE = Path("docs/results/reward_load.json"), Path("docs/reliability.md")
TINY = ROOT / "assets/tiny"
OUTCOMES = ("answered", "refused", "lost", "other", "retried")
LOADS = (0.5, 1, 2, 4)  # times the capacity
PATIENCE_S = 180.0  # of the client in the soak, as in a training
SAMPLE_S = 5.0  # seconds between two measurements of memory
REFUSED = "Exceeds maximum queue size"  # Triton's words


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="duration of each load")
    parser.add_argument("--soak-s", type=float, default=600.0, help="duration of the soak in seconds")
    parser.add_argument("--num-rollouts", type=int, default=2000, help="rollouts by which the capacity is measured")
    parser.add_argument("--in-flight", type=int, default=128, help="unanswered requests while it is measured")
    parser.add_argument("--instances", type=int, default=2, help="processes of the server")
    parser.add_argument("--max-queue-size", type=int, default=256, help="waiting requests beyond this are refused")
    parser.add_argument("--ports", type=int, nargs=3, default=[8000, 8001, 8002], help="free ports for the server")
    parser.add_argument("--log", type=Path, default=ROOT / "exp/bench_load.log", help="file for the server's output")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout whose JSON and page are written")
    return parser.parse_args(argv)


def start_server(args) -> subprocess.Popen:
    """Start a server and wait until it is ready.

    Raises:
        SystemExit: it ended before, or a port is in use: another server's answers would be measured.
    """
    for port in args.ports:
        if fault := port_fault("127.0.0.1", port):
            raise SystemExit(f"bench_load.py: port {port}: {fault}: choose other --ports")
    command = [
        sys.executable, ROOT / "token2wav_asr_server.py", "--token2wav-dir", TINY / "token2wav", "--asr-dir",
        TINY / "asr_reward", "--no-tones", "--instances", args.instances, "--max-queue-size", args.max_queue_size,
        "--http-port", args.ports[0], "--grpc-port", args.ports[1], "--metrics-port", args.ports[2],
    ]  # fmt: skip
    args.log.parent.mkdir(parents=True, exist_ok=True)
    with args.log.open("w") as log:
        server = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"TTS_GRPO_RUN": run_id()}
        )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while server.poll() is None:
        try:
            opener.open(f"http://127.0.0.1:{args.ports[0]}/v2/models/{MODEL_NAME}/ready", timeout=5).close()
            return server
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"bench_load.py: the server ended with status {server.returncode}: see {args.log}")


def run_id() -> str:
    """Return the mark of the server's processes, by which their memory is found."""
    return f"bench_load_{os.getpid()}"


class Requests:
    """Requests for the scores of known rollouts, and what became of them.

    Attributes:
        expected: transcript and reward of each rollout.
        outcomes: number of requests that were ``answered``, ``refused``, ``lost``, answered with an ``other`` score, or
            sent again (``retried``).
        latencies_s: of the answered requests.
        errors: messages of lost requests, the first few.
    """

    def __init__(self, client: RewardClient, rows: list[dict]):
        self.client, self.rows = client, rows
        self.expected: dict[int, tuple[str, float]] = {}
        self.reset()

    def reset(self) -> None:
        self.outcomes, self.latencies_s, self.errors = Counter(), [], []

    async def send(self, number: int, due: float) -> None:
        """Send one request, which is due at a time of ``time.perf_counter``."""
        number %= len(self.rows)
        row = self.rows[number]
        try:
            score = await self.client.score(row["speech_tokens"], row["text"])
        except RewardServerError as error:
            self.outcomes["refused" if REFUSED in str(error) else "lost"] += 1
            if REFUSED not in str(error) and len(self.errors) < 5:
                self.errors.append(str(error))
            return
        self.latencies_s.append(time.perf_counter() - due)
        transcript, reward = self.expected.setdefault(number, (score.transcript, score.reward))
        same = score.transcript == transcript and abs(score.reward - reward) < 1e-6
        self.outcomes["answered"] += 1
        self.outcomes["other"] += not same
        self.outcomes["retried"] += score.attempts > 1

    async def send_at(self, rate: float, seconds: float) -> dict:
        """Send requests at random moments for some seconds, and wait for all answers. Returns the figures.

        Args:
            rate: mean number of requests per second.
            seconds: duration.
        """
        self.reset()
        rng, start, tasks = np.random.default_rng(0), time.perf_counter(), set()
        moments = start + np.cumsum(rng.exponential(1 / rate, round(rate * seconds)))
        for number, due in enumerate(moments.tolist()):
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(self.send(number, due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        return self.figures(len(moments), time.perf_counter() - start)

    def figures(self, requests: int, seconds: float) -> dict:
        percentiles = np.percentile(self.latencies_s or [math.nan], (50, 95, 99))
        latencies = dict(zip(("p50_s", "p95_s", "p99_s"), percentiles, strict=True))
        return {
            "requests": requests, **{name: self.outcomes[name] for name in OUTCOMES},
            "answered_per_s": round(self.outcomes["answered"] / seconds, 1), "seconds": round(seconds, 1),
            **{name: round(float(value), 3) for name, value in latencies.items()}, "errors": self.errors,
        }  # fmt: skip


async def measure_capacity(requests: Requests, num_rollouts: int, in_flight: int) -> dict:
    """Return the figures of ``num_rollouts`` requests, of which ``in_flight`` are unanswered at any time."""

    async def send(numbers) -> None:
        for number in numbers:
            await requests.send(number, time.perf_counter())

    async def send_all(count: int) -> None:
        numbers = iter(range(count))
        await asyncio.gather(*(send(numbers) for _ in range(in_flight)))

    await send_all(len(requests.rows))  # warm up connections and caches
    requests.reset()
    start = time.perf_counter()
    await send_all(num_rollouts)
    return requests.figures(num_rollouts, time.perf_counter() - start)


async def soak(requests: Requests, rate: float, seconds: float) -> tuple[dict, dict]:
    """Return the figures of a soak, and the server's memory in MiB."""
    samples = []

    async def sample() -> None:
        while True:
            used = await asyncio.to_thread(used_gib, run_id(), ("Pss_Anon", "Pss_Shmem"))
            samples.append((requests.outcomes["answered"], 1024 * used))
            await asyncio.sleep(SAMPLE_S)

    sampling = asyncio.create_task(sample())
    figures = await requests.send_at(rate, seconds)
    sampling.cancel()
    return figures, memory_figures(samples)


def memory_figures(samples: list[tuple[int, float]]) -> dict:
    """Return the figures of a soak's memory.

    Args:
        samples: answered requests so far, and MiB of the server's processes.
    """
    answered, mib = np.array(samples, dtype=float).T
    return {
        "samples": len(mib), "first_mib": round(mib[0], 1), "last_mib": round(mib[-1], 1),
        "largest_mib": round(mib.max(), 1),
        "slope_mib_per_1000_requests": round(1000 * np.polyfit(answered, mib, 1)[0], 3),
        "slope_of_second_half": round(1000 * np.polyfit(answered[len(mib) // 2 :], mib[len(mib) // 2 :], 1)[0], 3),
    }  # fmt: skip


async def measure(args) -> dict:
    """Return all figures of a running server."""
    client = RewardClient([f"http://127.0.0.1:{args.ports[0]}"], max_in_flight=1 << 20, patience_s=0)
    requests = Requests(client, read_known_answers(TINY / "data/test.jsonl"))
    capacity = await measure_capacity(requests, args.num_rollouts, args.in_flight)
    show("capacity", capacity)
    rate, loads = capacity["answered_per_s"], []
    for load in LOADS:
        loads.append({"load": load} | await requests.send_at(load * rate, args.seconds))
        show("load", loads[-1])
    client.patience_s = PATIENCE_S
    soaked, memory = await soak(requests, rate, args.soak_s)
    show("soak", soaked | memory)
    await client.close()
    return {"capacity": capacity, "figures": loads, "soak": soaked, "memory": memory}


def show(name: str, figures: dict) -> None:
    print(json.dumps({name: figures}), file=sys.stderr, flush=True)


def tables(recorded: dict) -> dict[str, list[str]]:
    """Return the lines of each table by the name in its comment, from the contents of docs/results/reward_load.json."""
    columns = ("requests", *OUTCOMES, "answered_per_s", "p50_s", "p95_s", "p99_s")
    rows = [(f"{row['load']:g}", row) for row in recorded["figures"]]
    rows.append((f"1, for {recorded['soak']['seconds']:.0f} s", recorded["soak"]))
    memory = recorded["memory"]
    return {
        "load": [
            "| Load, times capacity | Requests | Answered | Refused | Lost | Other score | Sent again "
            "| Answered per second | p50, s | p95, s | p99, s |",
            "|" + " --- |" * 11,
            *(f"| {name} | " + " | ".join(str(row[column]) for column in columns) + " |" for name, row in rows),
        ],
        "memory": [
            "| Memory of all server processes in the soak, without mapped files | MiB |",
            "| --- | --- |",
            f"| at its start | {memory['first_mib']} |",
            f"| at its end | {memory['last_mib']} |",
            f"| largest of {memory['samples']} samples | {memory['largest_mib']} |",
            f"| slope per thousand answered requests | {memory['slope_mib_per_1000_requests']} |",
            f"| the same, second half | {memory['slope_of_second_half']} |",
            f"| restarts of Triton (number) | {recorded['triton_restarts']} |",
        ],
    }


def main(argv=None):
    args = get_args(argv)
    command = ["tools/bench_load.py", *(sys.argv[1:] if argv is None else argv)]
    recorded = provenance("Reward server under load", command)
    server = start_server(args)
    try:
        measured = asyncio.run(measure(args))
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(60)
    conditions = (
        f"tiny profile on CPUs, {args.instances} instances with batches of at most 32, --max-queue-size "
        f"{args.max_queue_size}, rollouts of about 2 s; the program that sends runs on the same cores; capacity with "
        f"{args.in_flight} requests in flight"
    )
    ends = args.log.read_text(encoding="utf-8", errors="replace").count("Triton has ended")
    recorded |= {"conditions": conditions, **measured, "triton_restarts": ends, "server_status": status}
    write_json(args.root / RESULTS, recorded)
    page = args.root / PAGE
    page.write_text(replace_tables(page.read_text(encoding="utf-8"), tables(recorded)), encoding="utf-8")
    measurements = (recorded["capacity"], *recorded["figures"], recorded["soak"])
    return bool(status or recorded["soak"]["lost"] or any(figures["other"] for figures in measurements))


if __name__ == "__main__":
    sys.exit(main())
