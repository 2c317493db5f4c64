"""Write audio of a validation to TensorBoard, for a few texts of the validation set, the same ones at each step.

    python scripts/validation_audio.py --dump exp/NAME/validation/20.jsonl --server-url URL --tensorboard-dir DIR

The dump is written by veRL (trainer.validation_data_dir), one line per rollout. The reward server decodes the tokens
with the same token2wav and voice as for the reward. The audio is written to DIR/validation, which TensorBoard shows as
a separate run: TensorBoard stops reading an event file as soon as there is a newer one in the same folder.
"""

import argparse
import io
import json
import logging
import time
import urllib.request
import wave
from pathlib import Path

import numpy as np

from tts_grpo.reward.protocol import SPEECH_MODEL_NAME, decode_speech_response, encode_speech_request, secret_headers
from tts_grpo.text.jsonl import read_jsonl
from tts_grpo.text.tokens import parse_speech_tokens

logger = logging.getLogger(__name__)

TIMEOUT_S = 60.0  # per utterance


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dump", type=Path, required=True, help="veRL's validation dump, STEP.jsonl")
    parser.add_argument("--server-url", required=True, help="URL of the reward server")
    parser.add_argument(
        "--tensorboard-dir", type=Path, required=True, help="folder with the event files of the training"
    )
    parser.add_argument("--count", type=int, default=4, help="number of texts")
    return parser.parse_args(argv)


def choose(rows: list[dict], count: int) -> list[dict]:
    """Rows of ``count`` texts, from the shortest to the longest text; independent of the order of the rows."""
    by_text = {row["gts"]: row for row in reversed(rows)}
    texts = sorted(by_text, key=lambda text: (len(text), text))
    indices = np.linspace(0, len(texts) - 1, min(count, len(texts))).round().astype(int)
    return [by_text[texts[i]] for i in indices]


def request_speech(server_url: str, speech_tokens: list[int], text: str) -> tuple[list[int], int]:
    """Speech decoded by the reward server, with the voice of the text: 16-bit samples and sample rate in Hz."""
    body = json.dumps(encode_speech_request(speech_tokens, text)).encode()
    url = f"{server_url.rstrip('/')}/v2/models/{SPEECH_MODEL_NAME}/infer"
    request = urllib.request.Request(url, body, secret_headers())
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        return decode_speech_response(json.load(response))


def wav_bytes(samples: list[int], rate: int) -> bytes:
    """A mono 16-bit WAV file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.asarray(samples, "<i2").tobytes())
    return buffer.getvalue()


def audio_value(tag: str, text: str, samples: list[int], rate: int):
    """A waveform as a TensorBoard summary value with its text as the title.

    The value is a tensor of [WAV, label], the format of TensorBoard's audio plugin. The older format, which torch
    writes, cannot contain a text.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.audio import metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    summary_metadata = metadata.create_summary_metadata(text, "", metadata.Encoding.Value("WAV"))
    return Summary.Value(
        tag=tag, metadata=summary_metadata, tensor=make_tensor_proto([[wav_bytes(samples, rate), b""]])
    )


def write_event(folder: Path, step: int, values: list) -> None:
    """Write an event file with one event."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    writer.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=values)))
    writer.close()


def main(argv=None):
    args = get_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s: %(message)s")
    rows, values = read_jsonl(args.dump), []
    for number, row in enumerate(choose(rows, args.count), 1):
        try:
            speech_tokens = parse_speech_tokens(row["output"])
            if not speech_tokens:
                raise ValueError("no speech tokens")
            samples, rate = request_speech(args.server_url, speech_tokens, row["gts"])
        except ValueError as error:
            logger.warning("%s: skipping %s: %s", args.dump, row["gts"], error)
            continue
        except (OSError, KeyError) as error:
            raise SystemExit(f"validation_audio.py: {args.server_url} did not return speech: {error}") from None
        values.append(audio_value(f"validation/{number}", row["gts"], samples, rate))
    if not values:
        raise SystemExit(f"validation_audio.py: {args.dump} has no rollout with valid speech tokens")
    write_event(args.tensorboard_dir / "validation", int(rows[0]["step"]), values)


if __name__ == "__main__":
    main()
