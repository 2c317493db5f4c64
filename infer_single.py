#!/usr/bin/env python3
"""Speak one text and print the path of the wav."""

import argparse
import logging
from pathlib import Path

from tts_grpo.speech.audio import check_audio, save_audio
from tts_grpo.speech.generation import Sampling, generate_speech_tokens, load_lm
from tts_grpo.speech.token2wav import decode, load_token2wav
from tts_grpo.speech.voices import load_prompt_voice
from tts_grpo.text.input_files import checked_text
from tts_grpo.text.prompts import render_prompt
from tts_grpo.text.rules import TextRules, model_text
from tts_grpo.text.tags import apply_tags, holding_control_tokens

logger = logging.getLogger(__name__)

TONGUE_TWISTER = "扁担长，板凳宽，扁担绑在板凳上。吃葡萄不吐葡萄皮，不吃葡萄倒吐葡萄皮。"


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llm-path", type=Path, required=True, help="Hugging Face folder of the language model")
    parser.add_argument("--token2wav-dir", type=Path, required=True, help="folder of the token2wav weights")
    parser.add_argument("--text", default=TONGUE_TWISTER, help="what to say")
    parser.add_argument("--output", type=Path, default=Path("speech.wav"), help="wav to write")
    parser.add_argument("--prompt-audio", type=Path, default=None, help="recording whose voice is continued")
    parser.add_argument("--prompt-text", default="", help="its transcript")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.95, help="nucleus sampling; 1.0 keeps all")
    parser.add_argument("--top-k", type=int, default=-1, help="-1 keeps all")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="where the speech is cut")
    parser.add_argument("--language", choices=("zh", "en"), default="zh", help="of the text")
    parser.add_argument("--text-tags", choices=("reject", "remove"), default="reject", help="tags in the text, such as "
                        "[laughter]: it is refused, or they are taken out")  # fmt: skip
    parser.add_argument("--llm-text", choices=("raw", "spoken"), default="raw", help="what the language model reads: "
                        "the text as it is, or its numbers in words")  # fmt: skip
    args = parser.parse_args(argv)
    if bool(args.prompt_audio) != bool(args.prompt_text):
        parser.error("a voice prompt needs both --prompt-audio and --prompt-text")
    return args


def spoken_texts(args) -> tuple[str, str]:
    """Text of the prompt and text to say, as the language model reads them.

    Raises:
        SystemExit: one has no word, or tags that are not to be removed, or the recording is no audio.
    """
    rules = TextRules(args.language, args.text_tags, args.llm_text)
    try:
        if args.prompt_audio:
            check_audio(args.prompt_audio)
        text, prompt_text = (
            checked_text({"text": apply_tags(text, rules.text_tags)}, "text") if text is not None else ""
            for text in (args.text, args.prompt_text or None)
        )
    except ValueError as error:
        raise SystemExit(f"infer_single.py: {error}") from error
    return model_text(prompt_text, rules), model_text(text, rules)


def main(argv=None):
    args = get_args(argv)
    prompt_text, text = spoken_texts(args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s: %(message)s")
    model, tokenizer = load_lm(args.llm_path, args.device)
    token2wav = load_token2wav(args.token2wav_dir, args.device)
    voice = load_prompt_voice(token2wav, args.prompt_audio, args.prompt_text) if args.prompt_audio else None
    if token := holding_control_tokens(tokenizer, [prompt_text + text])[0]:
        raise SystemExit(f"infer_single.py: the text holds the control token {token}: take it out")
    prompt = render_prompt(tokenizer, text, prompt_text, voice.prompt_speech_tokens if voice else ())
    sampling = Sampling(args.temperature, args.top_p, args.top_k, args.max_new_tokens)
    (said,) = generate_speech_tokens(model, tokenizer, [prompt], [args.seed], sampling)
    if not said.speech_tokens:
        raise SystemExit("infer_single.py: the model said nothing: try another --seed")
    if said.finish_reason != "eos":
        logger.warning("the speech was cut at %d tokens: raise --max-new-tokens", args.max_new_tokens)
    (waveform,) = decode(token2wav, [said.speech_tokens], [voice], args.seed)
    save_audio(args.output, waveform, token2wav.sample_rate_hz)
    print(args.output)


if __name__ == "__main__":
    main()
