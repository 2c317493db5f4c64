"""Write texts and speech tokens of recordings.

    python scripts/encode_prompts.py --eval-set data/zero_shot_zh.jsonl --token2wav-dir DIR --output known_answer.jsonl
    python scripts/encode_prompts.py --voices voices.jsonl --token2wav-dir DIR --output exp/NAME/voices.jsonl

The first makes the data for the known-answer check of the reward. The recordings are the prompts of an evaluation set:
their tokens encode real speech, so rewards must be high. The second makes the prompts of rollouts with
speech_prefix=voice: all voices, in order.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from tts_grpo.speech.token2wav import load_token2wav
from tts_grpo.speech.voices import load_prompt_voice
from tts_grpo.text.input_files import LANGUAGES, read_eval_set, read_voices
from tts_grpo.text.jsonl import write_jsonl


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--eval-set", type=Path, help="JSONL with prompt_text and prompt_audio, and with ids")
    source.add_argument("--voices", type=Path, help="JSONL with prompt_text and prompt_audio")
    parser.add_argument("--token2wav-dir", type=Path, required=True, help="folder with the speech tokenizer")
    parser.add_argument("--language", choices=LANGUAGES, default="zh", help="language of utterances without one")
    parser.add_argument("--limit", type=int, default=64, help="maximum number of recordings of the set")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--output", type=Path, required=True, help="JSONL to write, with text, language (of a set) and "
                        "speech_tokens")  # fmt: skip
    return parser.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    try:
        if args.voices:
            rows = read_voices(args.voices)
        else:
            found = read_eval_set(args.eval_set, language=args.language)
            rows = [row for row in found if row["prompt_audio"]][: args.limit]
    except (ValueError, OSError) as error:
        raise SystemExit(f"encode_prompts.py: {error}") from error
    if not rows:
        raise SystemExit(f"encode_prompts.py: {args.eval_set} has no utterance with a prompt_audio")
    folder = (args.voices or args.eval_set).parent
    token2wav = load_token2wav(args.token2wav_dir, args.device)
    lines = []
    for row in tqdm(rows, desc="speech tokens", unit="recording"):
        try:
            voice = load_prompt_voice(token2wav, folder / row["prompt_audio"], row["prompt_text"])
        except (ValueError, OSError) as error:
            raise SystemExit(f"encode_prompts.py: {error}") from error
        language = {"language": row["language"]} if "language" in row else {}
        lines.append({"text": voice.prompt_text, "speech_tokens": list(voice.prompt_speech_tokens)} | language)
    write_jsonl(args.output, lines)
    print(f"{len(lines)} recordings: {args.output}")


if __name__ == "__main__":
    main()
