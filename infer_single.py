#!/usr/bin/env python3
"""Synthesise one text as infer_dist.py does, and print the path of the WAV file.

With the same flags, and its --utt-id and --seed, an utterance of an evaluation set sounds as in the evaluation.
"""

import argparse
import logging
from pathlib import Path

from tts_grpo.speech import synthesis
from tts_grpo.speech.audio import check_audio, save_audio
from tts_grpo.text.input_files import checked_text
from tts_grpo.text.tags import apply_tags

logger = logging.getLogger(__name__)

TONGUE_TWISTERS = {
    "zh": "扁担长，板凳宽，扁担绑在板凳上。吃葡萄不吐葡萄皮，不吃葡萄倒吐葡萄皮。",
    "en": "Peter Piper picked a peck of pickled peppers. A peck of pickled peppers Peter Piper picked.",
}


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    synthesis.add_arguments(parser)
    parser.add_argument("--text", help="text to synthesise (default: a tongue-twister in --language)")
    parser.add_argument("--output", type=Path, default=Path("speech.wav"), help="WAV file to write")
    parser.add_argument("--prompt-audio", type=Path, help="recording of the voice to synthesise with")
    parser.add_argument("--prompt-text", default="", help="transcript of --prompt-audio")
    parser.add_argument("--instruct", default="", help="how to speak, for CosyVoice3 and CosyVoice2: 请用广东话表达。")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sampling")
    parser.add_argument(
        "--utt-id", default="tongue_twister", help="utterance id; with --seed, it determines the random numbers"
    )
    args = parser.parse_args(argv)
    args.text = TONGUE_TWISTERS[args.language] if args.text is None else args.text
    if bool(args.prompt_audio) != bool(args.prompt_text):
        parser.error("a voice prompt needs both --prompt-audio and --prompt-text")
    return args


def checked_texts(args) -> tuple[str, str]:
    """Return the prompt's transcript and the text to synthesise, without tags if --text-tags removes them.

    Raises:
        SystemExit: a text has no word or has tags that are rejected, or the recording cannot be read as audio.
    """
    try:
        if args.prompt_audio:
            check_audio(args.prompt_audio)
        text, prompt_text = (
            checked_text({"text": apply_tags(text, args.text_tags)}, "text") if text is not None else ""
            for text in (args.text, args.prompt_text or None)
        )
    except ValueError as error:
        raise SystemExit(f"infer_single.py: {error}") from error
    return prompt_text, text


def main(argv=None):
    args = get_args(argv)
    prompt_text, text = checked_texts(args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s: %(message)s")
    row = {"id": args.utt_id, "target_text": text, "prompt_text": prompt_text, "prompt_audio": args.prompt_audio}
    row |= {"instruct": args.instruct}
    synthesiser = synthesis.Synthesiser(args, args.device, Path.cwd())
    try:
        synthesiser.check([row])
        (speech,) = synthesiser.synthesise([row], args.seed)
    except ValueError as error:
        raise SystemExit(f"infer_single.py: {error}") from error
    if not len(speech.waveform):
        raise SystemExit("infer_single.py: the model generated no speech tokens: try another --seed")
    if speech.finish_reason != "eos":
        logger.warning("the speech was truncated at %d tokens: raise --max-new-tokens", args.max_new_tokens)
    save_audio(args.output, speech.waveform, synthesiser.token2wav.sample_rate_hz)
    print(args.output)


if __name__ == "__main__":
    main()
