#!/usr/bin/env python3
"""Reward server: speech tokens -> 16 kHz waveform -> transcript -> parts of the reward, behind Triton (PyTriton).

The tensors are described in tts_grpo/reward/protocol.py. A second Triton model, token2wav, returns the waveform of a
rollout for listening. Each instance is a process with its own token2wav and ASR model on one of --devices, so that
instances do not share a Python interpreter lock. Triton collects concurrent requests of one length bucket into batches
and sends each batch to a free instance.

The server is ready only when every instance has scored a batch, and each part of the reward has passed its known-answer
check on --known-answers. A sample that overflows in half precision is scored
again in fp32. A batch that fails for a reason of the machine, such as too little memory, is answered with status 500,
and the client sends it again. An instance that takes longer than --batch-timeout-s for a batch is killed. An instance
that dies (out of memory, a CUDA error) is restarted, and the clients retry the batch that it had; no reward is ever
made up. Triton is started again, too, if it has ended. After more than MAX_DEATHS deaths of instances, or ends of
Triton, the server stops with an error.

On SIGTERM or SIGINT the server answers requests in flight and then stops. While it loads, it stops at once.
"""

import argparse
import hashlib
import ipaddress
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tts_grpo.reward.libpython import libpython_fault, libpython_folder
from tts_grpo.reward.ports import port_fault
from tts_grpo.reward.protocol import (
    BUCKETS,
    MAX_TEXT_BYTES,
    MODEL_NAME,
    SPEECH_MODEL_NAME,
    VERSION,
    RolloutScore,
    encode_response,
    read_secret,
    text_tensor,
)
from tts_grpo.reward.rewards import DEFAULT, files, parse_rewards
from tts_grpo.speech.model_folders import TOKEN2WAV_FILES, token2wav_kind
from tts_grpo.text.input_files import LANGUAGES, read_known_answers, read_voices
from tts_grpo.text.tokens import NUM_SPEECH_TOKENS

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0  # time limit for an instance to load and warm up
# How torch words errors after which a CUDA context is unusable; too little memory is worded "CUDA out of memory".
FATAL_CUDA_ERRORS = re.compile("CUDA error|CUBLAS_STATUS_|CUDNN_STATUS_")
MAX_DEATHS = 5  # over all instances, and of Triton; more deaths indicate a systematic fault
PORTS_TIMEOUT_S = 20.0  # for which the ports may be in use after Triton has ended
KNOWN_ANSWERS = 8  # entries of --known-answers in a language with which each instance checks the parts of the reward
WARM_UP_TOKENS = (40, 75)  # numbers of speech tokens in the two warm-up batches


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--token2wav-dir", type=Path, required=True, help="folder of the token2wav weights")
    parser.add_argument("--asr-dir", type=Path, required=True, help="SenseVoice folder of the reward recogniser")
    parser.add_argument("--prompt-audio", type=Path, default=None, help="recording of the voice of all rollouts")
    parser.add_argument("--prompt-text", default="", help="transcript of --prompt-audio")
    parser.add_argument("--prompt-list", type=Path, default=None, help="JSONL of voices: prompt_audio and prompt_text")
    parser.add_argument(
        "--prompt-voice-per",
        choices=("text", "rollout"),
        default="text",
        help="draw a voice of --prompt-list per text (one per GRPO group) or per rollout",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed for drawing voices")
    parser.add_argument(
        "--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="precision of CosyVoice2's token2wav"
    )
    parser.add_argument("--devices", nargs="+", default=["cpu"], help="torch devices; each runs --instances processes")
    parser.add_argument("--instances", type=int, default=1, help="processes per device")
    parser.add_argument("--threads", type=int, default=1, help="torch threads per process")
    parser.add_argument("--max-batch-size", type=int, default=32, help="maximum number of rollouts per batch")
    parser.add_argument("--max-queue-delay-ms", type=float, default=10.0, help="longest wait for a batch to fill")
    parser.add_argument("--max-queue-size", type=int, default=16384, help="waiting requests beyond this are refused")
    parser.add_argument(
        "--batch-timeout-s", type=float, default=240.0, help="an instance that takes longer for a batch is restarted"
    )
    parser.add_argument("--rewards", default=DEFAULT, help="parts of the reward, see tts_grpo/reward/rewards.py")
    parser.add_argument("--more-asr-dirs", type=Path, nargs="*", default=[], help="further recognisers of the reward")
    parser.add_argument(
        "--asr-pool", choices=("mean", "worst"), default="mean", help="error rate of several recognisers"
    )
    parser.add_argument(
        "--known-answers",
        type=Path,
        default=None,
        help="JSONL of real speech (text, speech_tokens) that checks the parts",
    )
    parser.add_argument("--reward-curve", choices=("tanh", "exp"), default="tanh", help="see tts_grpo/reward/curves.py")
    parser.add_argument("--no-tones", dest="tones", action="store_false", help="compare pinyin without tones")
    parser.add_argument("--language", choices=LANGUAGES, default="zh", help="language that each recogniser must "
                        "know, and of --known-answers without one; requests name their own")  # fmt: skip
    parser.add_argument("--address", default="127.0.0.1", help="address to listen on; 0.0.0.0 serves other machines")
    parser.add_argument(
        "--secret-file", type=Path, default=None, help="file with a secret that scoring requests must have in a header"
    )
    parser.add_argument("--http-port", type=int, default=8000, help="HTTP port")
    parser.add_argument("--grpc-port", type=int, default=8001, help="gRPC port")
    parser.add_argument("--metrics-port", type=int, default=8002, help="port of Prometheus metrics")
    args = parser.parse_args(argv)
    if bool(args.prompt_audio) != bool(args.prompt_text):
        parser.error("a voice prompt needs both --prompt-audio and --prompt-text")
    if args.prompt_list and args.prompt_audio:
        parser.error("--prompt-list and --prompt-audio exclude each other")
    try:
        args.specs = parse_rewards(args.rewards)
    except ValueError as error:
        parser.error(f"--{error}")
    try:
        args.secret = read_secret(args.secret_file) if args.secret_file else None
    except (OSError, ValueError) as error:
        parser.error(f"--secret-file: {error}")
    if not args.secret and not is_loopback(args.address):
        parser.error(f"--address {args.address} serves other machines, which needs --secret-file (SECURITY.md)")
    return args


def is_loopback(address: str) -> bool:
    """Return whether only programs of this machine can connect to an address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def serve_instance(pipe, args, device: str) -> None:
    """Run an instance's process: load, warm up, then answer batches from the pipe until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.disable(logging.INFO)  # silences funasr
    # Batches differ in shape: without expandable segments, torch would reserve three times the memory that it needs.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # On a CPU, oneDNN keeps the kernels of 1,024 shapes: since batches differ in shape, memory would rise by 200 MiB
    # and more.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    import torch

    torch.set_num_threads(args.threads)
    try:
        scorer = load_scorer(args, device)
        warm_up(scorer, args.max_batch_size)
        check_parts(scorer, args.known_answers, args.language)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send("")
    while True:
        try:
            method, *arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            result = getattr(scorer, method)(*arguments)
        except Exception as error:  # not because of a sample, as the scorer reports such errors in its result
            logger.exception("an instance on %s could not score a batch", device)
            if FATAL_CUDA_ERRORS.search(str(error)):  # later samples would fail, too: a CUDA context does not recover
                logger.error("the instance exits and will be restarted")
                return
            result = BatchError(f"{type(error).__name__}: {error}")
        pipe.send(result)


def load_scorer(args, device: str):
    """Load the scorer of an instance according to the flags."""
    import torch

    from tts_grpo.reward.parts.interface import Context, load_parts
    from tts_grpo.reward.scorer import RewardScorer
    from tts_grpo.speech.asr.sensevoice import SenseVoice
    from tts_grpo.speech.token2wav import load_token2wav
    from tts_grpo.speech.voices import load_prompt_voice, load_prompt_voices

    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # CUDA graphs are captured on the current device
    torch.backends.cuda.matmul.allow_tf32 = args.precision != "fp32"  # for the ASR model
    token2wav = load_token2wav(args.token2wav_dir, device, args.precision)
    voices = []
    if args.prompt_list:
        voices = load_prompt_voices(token2wav, args.prompt_list)
    elif args.prompt_audio:
        voices = [load_prompt_voice(token2wav, args.prompt_audio, args.prompt_text)]
    asr, *more_asrs = (SenseVoice(path, device, language=args.language) for path in (args.asr_dir, *args.more_asr_dirs))
    parts = load_parts(args.specs, Context(device, args.reward_curve, asr, args.token2wav_dir))
    return RewardScorer(
        token2wav, asr, args.tones, args.reward_curve, voices, args.seed, args.prompt_voice_per, args.language, parts,
        more_asrs, args.asr_pool,
    )  # fmt: skip


def check_parts(scorer, known_answers: Path | None, language: str) -> None:
    """Run the known-answer checks of the parts of the reward, in each language of the known answers.

    Raises:
        RuntimeError: a part failed; the message says how.
        ValueError: the file has no line, or a line of it is not as it should be.
    """
    if known_answers:
        rows, faults = read_known_answers(known_answers, KNOWN_ANSWERS, language), []
        for spoken in dict.fromkeys(row["language"] for row in rows):
            own = [row for row in rows if row["language"] == spoken]
            inputs = [[row[key] for row in own] for key in ("speech_tokens", "text", "language")]
            faults += [f"{fault} (language {spoken})" for fault in scorer.check(*inputs)]
        if faults:
            raise RuntimeError("; ".join(faults))


def warm_up(scorer, max_batch_size: int) -> None:
    """Score batches of random tokens, so that the first request does not wait for allocations and caches.

    Raises:
        RuntimeError: a batch could not be scored.
    """
    scorer.token2wav.warm_up()
    rng = np.random.default_rng(0)
    for num_tokens in WARM_UP_TOKENS:
        tokens = rng.integers(0, NUM_SPEECH_TOKENS, (max_batch_size, num_tokens)).tolist()
        for score in scorer.score(tokens, ["你好"] * max_batch_size):
            if score.error:
                raise RuntimeError(score.error)


class BatchError(RuntimeError):
    """An instance could not score a batch, for example because of too little memory; it may succeed later."""


class Instance:
    """A scorer process and the pipe to it.

    Attributes:
        deaths: number of times that the process died.
        server: hash of what the rewards depend on, see :func:`identity`; it is set when the process has loaded.
    """

    def __init__(self, args, device: str):
        self.args, self.device, self.lock, self.deaths, self.closed = args, device, threading.Lock(), 0, False
        self._start()

    def _start(self) -> None:
        self.server = ""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve_instance, args=(theirs, self.args, self.device), daemon=True)
        self.process.start()
        theirs.close()

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until the process is ready.

        Raises:
            RuntimeError: it failed to start, or was not ready in time, and has been killed: it must not become ready
                later, when its message would be taken for the answer to a batch.
        """
        try:
            error = self.pipe.recv() if self.pipe.poll(timeout_s) else f"not ready after {timeout_s:.0f} s"
        except EOFError:
            self.process.join(timeout=5)
            error = f"the process ended with code {self.process.exitcode}"
        if error:
            self.kill()
            raise RuntimeError(f"an instance of the reward server could not start: {error}")

    def call(self, method: str, *arguments):
        """Call a method of the process's ``RewardScorer`` for one batch and return the result.

        Raises:
            RuntimeError: the process died or hung during the call, and has been restarted, or could not score the batch
                for a reason of the machine. Triton answers the batch with status 500, and the client retries it.
        """
        with self.lock:
            try:
                self.pipe.send((method, *arguments))
                if not self.pipe.poll(self.args.batch_timeout_s):
                    logger.error("an instance on %s hangs: it is killed", self.device)
                    self.process.kill()
                result = self.pipe.recv()
            except (EOFError, OSError) as error:
                self._restart()
                raise RuntimeError("an instance of the reward server died at this batch: send it again") from error
        if isinstance(result, BatchError):
            raise result
        return result

    def restart_if_dead(self) -> None:
        """Restart the process if it has died.

        Raises:
            RuntimeError: it could not be started.
        """
        if not self.process.is_alive():
            with self.lock:
                if not self.process.is_alive():
                    self._restart()

    def _restart(self) -> None:
        if self.closed:  # a process that starts now would not be ended, and the server would wait for it for ever
            return
        self.process.join(timeout=5)
        self.deaths += 1
        logger.error("an instance on %s has died with code %s (out of memory?)", self.device, self.process.exitcode)
        if self.deaths <= MAX_DEATHS:
            self.pipe.close()
            self._start()
            self.wait_ready(START_TIMEOUT_S)
            self.server = identity(self.args)  # the files may have changed
            logger.info("the instance on %s is ready again", self.device)

    def kill(self) -> None:
        """Kill the process at once."""
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        """Let the process finish its current batch (at most 10 s), then end it; it is not restarted any more."""
        self.closed = True
        self.pipe.close()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()


def request_fault(length: int, size: int, text: bytes = b"", language: bytes = b"zh") -> str:
    """Return why a sample's input is refused, or "".

    Args:
        length: its TOKEN_LENS.
        size: length of its row of TOKENS.
        text: its GT_TEXT, if the model has it.
        language: its LANGUAGE, likewise.
    """
    if not 0 < length <= size:
        return f"TOKEN_LENS is {length}, but TOKENS has {size} tokens"
    if length > BUCKETS[-1]:
        return f"{length} speech tokens: the reward server takes at most {BUCKETS[-1]}"
    if len(text) > MAX_TEXT_BYTES:
        return f"a text of {len(text)} bytes: the reward server takes at most {MAX_TEXT_BYTES}"
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"GT_TEXT is not UTF-8: {error}"
    if language not in map(str.encode, LANGUAGES):
        return f"LANGUAGE is {language!r}: the reward server scores {' and '.join(LANGUAGES)}"
    return ""


def call_with_valid(
    instance, method: str, failed: Callable[[str], object], tokens, token_lens, texts, languages=None
) -> list:
    """Call an instance's method with the samples of a batch that are valid; the others are answered with an error.

    Args:
        instance: the instance.
        method: method of ``RewardScorer``, which takes the samples' tokens and texts, and their languages if there are
            any.
        failed: makes the result of a sample from the reason why it is refused.
        tokens: TOKENS, int32 (B, T).
        token_lens: TOKEN_LENS, int32 (B, 1).
        texts: GT_TEXT, bytes (B,).
        languages: LANGUAGE, bytes (B,), or None.

    Returns:
        B results.
    """
    lens, more = token_lens[:, 0].tolist(), [texts] if languages is None else [texts, languages]
    faults = [request_fault(n, tokens.shape[1], *values) for n, *values in zip(lens, *more, strict=True)]
    valid = [i for i, fault in enumerate(faults) if not fault]
    arguments = [[tokens[i, : lens[i]].tolist() for i in valid]]
    arguments += [[values[i].decode("utf-8") for i in valid] for values in more]
    results = iter(instance.call(method, *arguments) if valid else [])
    return [failed(fault) if fault else next(results) for fault in faults]


def identity(args) -> str:
    """Return a hash of all that a reward depends on besides the request (see ``SERVER`` in the protocol)."""
    paths = [Path(args.token2wav_dir, name) for name in TOKEN2WAV_FILES[token2wav_kind(args.token2wav_dir)]]
    for folder in (args.asr_dir, *args.more_asr_dirs):
        paths += sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".md")
    paths += files(args.specs)
    if args.prompt_audio:
        paths.append(args.prompt_audio)
    if args.prompt_list:
        paths += [args.prompt_list, *sorted({Path(voice["prompt_audio"]) for voice in read_voices(args.prompt_list)})]
    options = (
        VERSION, args.prompt_text, args.prompt_voice_per, args.seed, args.precision, args.reward_curve, args.tones,
        args.rewards, args.asr_pool,
    )  # fmt: skip
    digest = hashlib.sha256(repr(options).encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def infer_function(instance: Instance):
    """Return the PyTriton inference callable for scoring on one instance."""
    from pytriton.decorators import batch

    @batch
    def infer(TOKENS, TOKEN_LENS, GT_TEXT, LANGUAGE):
        failed = lambda fault: RolloutScore(error=fault)  # noqa: E731
        scores = call_with_valid(instance, "score", failed, TOKENS, TOKEN_LENS, GT_TEXT[:, 0], LANGUAGE[:, 0])
        requests = [
            (tokens[: max(length, 0)].tolist(), text.decode("utf-8", "replace"), language.decode("utf-8", "replace"))
            for tokens, length, text, language in zip(
                TOKENS, TOKEN_LENS[:, 0].tolist(), GT_TEXT[:, 0], LANGUAGE[:, 0], strict=True
            )
        ]
        return encode_response(scores, instance.server, requests)

    return infer


def speech_function(instance: Instance):
    """Return the PyTriton inference callable for synthesis on one instance."""
    from pytriton.decorators import batch

    from tts_grpo.reward.scorer import SampleSpeech

    @batch
    def infer(TOKENS, TOKEN_LENS, GT_TEXT):
        failed = lambda fault: SampleSpeech(np.zeros(0, np.int16), 0, fault)  # noqa: E731
        results = call_with_valid(instance, "synthesise", failed, TOKENS, TOKEN_LENS, GT_TEXT[:, 0])
        lens = [len(speech.waveform) for speech in results]
        waveforms = np.zeros((len(results), max([1, *lens])), np.int16)
        for row, speech in zip(waveforms, results, strict=True):
            row[: len(speech.waveform)] = speech.waveform
        return {
            "WAVEFORM": waveforms,
            "WAVEFORM_LENS": np.array(lens, np.int32)[:, None],
            "SAMPLE_RATE": np.array([[speech.sample_rate_hz] for speech in results], np.int32),
            "ERRORS": text_tensor([speech.error for speech in results]),
        }

    return infer


def use_own_libpython() -> None:
    """Re-execute with the folder of this Python's shared library first in LD_LIBRARY_PATH, for PyTriton's backend.

    Raises:
        SystemExit: this Python has no shared library. (Another Python's would lead to obscure errors later.)
    """
    if fault := libpython_fault():
        raise SystemExit(fault)
    folder = libpython_folder()
    paths = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    if folder and paths[0] != str(folder):
        os.environ["LD_LIBRARY_PATH"] = ":".join([str(folder), *filter(None, paths)])
        os.execv(sys.executable, [sys.executable, *sys.argv])


def start_instances(args) -> list[Instance]:
    start = time.monotonic()
    instances = [Instance(args, device) for device in args.devices for _ in range(args.instances)]
    try:
        for instance in instances:
            instance.wait_ready(START_TIMEOUT_S)
    except BaseException:  # signals too, which the processes ignore; the exit would wait for them
        for instance in instances:
            instance.kill()
        raise
    server = identity(args)
    for instance in instances:
        instance.server = server
    logger.info("%d instances loaded and warm after %.1f s", len(instances), time.monotonic() - start)
    return instances


def bind_models(triton, instances: list[Instance], config) -> None:
    """Bind the two models of tts_grpo/reward/protocol.py to Triton."""
    from pytriton.model_config import Tensor

    tokens = [
        Tensor(name="TOKENS", dtype=np.int32, shape=(-1,)),
        Tensor(name="TOKEN_LENS", dtype=np.int32, shape=(1,)),
    ]
    # Triton loads models in this order; clients wait for the readiness of the scoring model, so it comes last.
    triton.bind(
        model_name=SPEECH_MODEL_NAME,
        model_version=VERSION,
        infer_func=speech_function(instances[0]),
        inputs=[*tokens, Tensor(name="GT_TEXT", dtype=bytes, shape=(1,))],
        outputs=[
            Tensor(name="WAVEFORM", dtype=np.int16, shape=(-1,)),
            Tensor(name="WAVEFORM_LENS", dtype=np.int32, shape=(1,)),
            Tensor(name="SAMPLE_RATE", dtype=np.int32, shape=(1,)),
            Tensor(name="ERRORS", dtype=bytes, shape=(1,)),
        ],
        config=config,
        strict=True,
    )
    triton.bind(
        model_name=MODEL_NAME,
        model_version=VERSION,
        infer_func=[infer_function(instance) for instance in instances],
        inputs=[*tokens, *(Tensor(name=name, dtype=bytes, shape=(1,)) for name in ("GT_TEXT", "LANGUAGE"))],
        outputs=[
            Tensor(name="REWARDS", dtype=np.float32, shape=(1,)),
            Tensor(name="ERROR_RATES", dtype=np.float32, shape=(1,)),
            Tensor(name="TRANSCRIPTS", dtype=bytes, shape=(1,)),
            Tensor(name="PART_NAMES", dtype=bytes, shape=(-1,)),
            Tensor(name="PARTS", dtype=np.float32, shape=(-1,)),
            Tensor(name="UNIT_LOSSES", dtype=np.float32, shape=(-1,)),
            Tensor(name="UNIT_STARTS", dtype=np.int32, shape=(-1,)),
            Tensor(name="SERVER", dtype=bytes, shape=(1,)),
            Tensor(name="RESCORED", dtype=np.int32, shape=(1,)),
            Tensor(name="ERRORS", dtype=bytes, shape=(1,)),
            Tensor(name="CHECKS", dtype=bytes, shape=(1,)),
        ],
        config=config,
        strict=True,
    )


def serve(args, instances: list[Instance]) -> int:
    """Serve until a signal (returns 0), or until Triton or instances have ended too often (returns 1).

    Triton's Python backend crashes at times under load, and PyTriton gives a model one second to connect when it loads,
    which a busy machine may exceed. Triton is then started again, with the same instances; clients send what was not
    answered again.
    """
    for _ in range(MAX_DEATHS + 1):
        try:
            status = serve_until_triton_ends(args, instances)
        except KeyboardInterrupt:  # while Triton starts
            logger.info("stopped while Triton starts")
            return 0
        if status is not None:
            return status
        logger.error("Triton has ended: see the messages above. It is started again")
        end = time.monotonic() + PORTS_TIMEOUT_S
        while any(port_fault(args.address, port) for _, port in ports_of(args)) and time.monotonic() < end:
            time.sleep(0.5)
    logger.error("Triton has ended %d times; stopping", MAX_DEATHS + 1)
    return 1


def serve_until_triton_ends(args, instances: list[Instance]) -> int | None:
    """Serve until a signal (returns 0), instances have died too often (returns 1), or Triton has ended (None)."""
    from pytriton.model_config import DynamicBatcher, ModelConfig, QueuePolicy
    from pytriton.triton import DEFAULT_PROTECTED_ENDPOINTS, Triton, TritonConfig, TritonSecurityConfig

    security = TritonSecurityConfig()  # management of models and memory needs a random secret
    if args.secret:
        security = TritonSecurityConfig(args.secret, [*DEFAULT_PROTECTED_ENDPOINTS, "inference"])
    config = TritonConfig(
        http_address=args.address, http_port=args.http_port, grpc_address=args.address, grpc_port=args.grpc_port,
        metrics_address=args.address, metrics_port=args.metrics_port, exit_timeout_secs=20,
    )  # fmt: skip
    batcher = DynamicBatcher(
        max_queue_delay_microseconds=int(args.max_queue_delay_ms * 1000),
        default_queue_policy=QueuePolicy(max_queue_size=args.max_queue_size),
    )
    with Triton(config=config, security_config=security) as triton:
        try:
            # loads the models, unless PyTriton has not connected to Triton yet: then run() does
            bind_models(triton, instances, ModelConfig(max_batch_size=args.max_batch_size, batcher=batcher))
            triton.run()
        except Exception:
            logger.exception("Triton has not loaded the models")
            return None
        logger.info("ready: %s at http://%s:%d", MODEL_NAME, args.address, args.http_port)
        try:
            while sum(instance.deaths for instance in instances) <= MAX_DEATHS:
                if not triton.is_alive():
                    return None
                for instance in instances:
                    instance.restart_if_dead()
                time.sleep(0.5)
            logger.error("instances have died %d times; stopping, so that no reward is invented", MAX_DEATHS + 1)
            return 1
        except RuntimeError as error:
            logger.error("%s; stopping", error)
            return 1
        except KeyboardInterrupt:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # the server is already stopping
            logger.info("stopping: requests in flight are answered first")
            return 0


def ports_of(args) -> list[tuple[str, int]]:
    return [(name, getattr(args, name)) for name in ("http_port", "grpc_port", "metrics_port")]


def check_ports(args) -> None:
    """Check that the ports are free.

    Raises:
        SystemExit: a port cannot be listened on.
    """
    for name, port in ports_of(args):
        if fault := port_fault(args.address, port):
            raise SystemExit(f"{name} {port}: {fault}: stop the process that uses it, or set {name}")


def main(argv=None):
    args = get_args(argv)
    use_own_libpython()
    check_ports(args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s: %(message)s")
    for number in (signal.SIGTERM, signal.SIGINT):  # a shell starts background processes with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    try:
        instances = start_instances(args)
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped while loading") from None
    try:
        return serve(args, instances)
    finally:
        for instance in instances:
            instance.close()


if __name__ == "__main__":
    sys.exit(main())
