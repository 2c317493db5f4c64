"""SenseVoiceSmall through funasr: transcripts in batches, with the time of each character, emotions and events."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from tts_grpo.speech.asr.funasr_model import load_funasr
from tts_grpo.speech.asr.recogniser import Transcript, recognise_in_batches
from tts_grpo.speech.model_folders import SENSEVOICE_FILES, language_fault
from tts_grpo.text.spoken import spoken_form

# What the network may answer to its second and third query, as its vocabulary writes them: <|HAPPY|>
EMOTIONS = ("HAPPY", "SAD", "ANGRY", "NEUTRAL", "FEARFUL", "DISGUSTED", "SURPRISED", "EMO_UNKNOWN")
EVENTS = ("Speech", "BGM", "Applause", "Laughter", "Cry", "Sneeze", "Breath", "Cough", "Sing", "Speech_Noise")


NUM_QUERIES = 4  # queries before the speech


@dataclasses.dataclass(frozen=True)
class _Item:
    """A recording, the number of its language, and the pieces of its text if needed; its length is the recording's."""

    recording: np.ndarray | torch.Tensor
    language: int
    pieces: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.recording)


class SenseVoice:
    """A recogniser of 16 kHz speech.

    Args:
        model_dir: folder with config.yaml, model.pt, am.mvn and the SentencePiece model.
        device: torch device.
        batch_size: recordings decoded at once; None is 64 on a GPU, where a batch takes as long as the launches of its
            70 layers, and 32 on a CPU, where padding costs.
        language: language of recordings without one of their own. The network is told it; "zh" also recognises English
            words in Chinese speech.

    Attributes:
        tags: emotions and events that the vocabulary has, with their ids.

    Raises:
        ValueError: the network or its vocabulary does not have the language; or see :func:`load_funasr`.
    """

    def __init__(
        self, model_dir: str | Path, device: str = "cpu", batch_size: int | None = None, language: str = "zh"
    ):  # fmt: skip
        self.device = torch.device(device)
        self.batch_size = batch_size or (32 if self.device.type == "cpu" else 64)
        self._model = load_funasr(model_dir, device, SENSEVOICE_FILES)
        frontend = self._model.kwargs["frontend"]
        self._frame_s = frontend.lfr_n * frontend.frame_shift / 1000
        self.model_dir, self.language = model_dir, language
        self._language_ids: dict[str, int] = {}
        self._language_id(language)
        pieces = self._model.kwargs["tokenizer"].sp
        ids = {tag: pieces.piece_to_id(f"<|{tag}|>") for tag in (*EMOTIONS, *EVENTS)}
        self.tags = {tag: number for tag, number in ids.items() if number != pieces.unk_id()}

    def transcribe(
        self, recordings: Sequence[np.ndarray | torch.Tensor], languages: Sequence[str] | None = None
    ) -> list[str]:
        """Transcripts of recordings, each float32 (T,) at 16 kHz, without SenseVoice's tags.

        One shorter than an analysis frame has the transcript "".

        Args:
            recordings: the recordings, which may differ in language.
            languages: language of each; by default, that of this object.

        Raises:
            ValueError: a language is not known.
        """
        return [transcript.text for transcript in self.transcribe_with_onsets(recordings, languages)]

    def transcribe_with_onsets(
        self, recordings: Sequence[np.ndarray | torch.Tensor], languages: Sequence[str] | None = None
    ) -> list[Transcript]:
        """:meth:`transcribe`, with the time of each character."""
        items = [_Item(*both) for both in zip(recordings, self._ids_of(recordings, languages), strict=True)]
        return recognise_in_batches(items, self._recognise, self.batch_size, Transcript())

    def log_likelihoods(
        self, recordings: Sequence[np.ndarray | torch.Tensor], texts: Sequence[str],
        languages: Sequence[str] | None = None,
    ) -> list[float]:  # fmt: skip
        """Mean CTC log-likelihood per piece of each recording's text, at most 0.

        It is -inf for a recording that is too short for its text. The recordings are recognised once more for it.

        Raises:
            ValueError: a text has no piece in the network's vocabulary, or a language is not known.
        """
        encode = self._model.kwargs["tokenizer"].encode
        languages = languages or [self.language] * len(texts)
        pieces = [torch.tensor(encode(spoken_form(*both).text)) for both in zip(texts, languages, strict=True)]
        for text, ids in zip(texts, pieces, strict=True):
            if not len(ids):
                raise ValueError(f"the text {text!r} has no piece in the vocabulary of the recogniser")
        items = [_Item(*all_) for all_ in zip(recordings, self._ids_of(recordings, languages), pieces, strict=True)]
        return recognise_in_batches(items, self._log_likelihoods, self.batch_size, float("-inf"))

    def _ids_of(self, recordings: Sequence, languages: Sequence[str] | None) -> list[int]:
        """Number of each recording's language in the network's first query."""
        return [self._language_id(language) for language in languages or [self.language] * len(recordings)]

    def _language_id(self, language: str) -> int:
        if language not in self._language_ids:
            known = self._model.model.lid_dict
            if language not in known:
                raise ValueError(f"{self.model_dir}: no language {language!r}: SenseVoice knows {', '.join(known)}")
            if fault := language_fault(self.model_dir, language):
                raise ValueError(fault)
            self._language_ids[language] = known[language]
        return self._language_ids[language]

    @torch.inference_mode()
    def _log_likelihoods(self, items: list[_Item]) -> list[float]:
        logits, ends = self._logits(items)
        sizes = torch.tensor([len(item.pieces) for item in items])
        log_probs = logits[:, NUM_QUERIES:].float().log_softmax(-1).transpose(0, 1)
        losses = F.ctc_loss(
            log_probs, pad_sequence([item.pieces for item in items], batch_first=True).to(log_probs.device),
            ends - NUM_QUERIES, sizes, self._model.model.blank_id, reduction="none",
        )  # fmt: skip
        return (-losses.cpu() / sizes).tolist()

    @torch.inference_mode()
    def _logits(self, items: list[_Item]) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs of the network (B, T, V), the answers to its queries first, and the length of each, int64 (B,)."""
        model = self._model.model
        features, lens = self._features([torch.as_tensor(item.recording, device=self.device) for item in items])
        # The queries that SenseVoiceSmall.inference puts before the speech: language, emotion, event, written form
        ids = [[item.language, 1, 2, model.textnorm_dict["woitn"]] for item in items]
        queries = model.embed(torch.tensor(ids, device=self.device))
        ends = lens + NUM_QUERIES
        encoded, _ = model.encoder(torch.cat([queries, features], dim=1), ends.to(self.device))
        return model.ctc.ctc_lo(encoded), ends

    @torch.inference_mode()
    def _recognise(self, items: list[_Item]) -> list[Transcript]:
        """``AutoModel.generate``, with features and decoding of a batch computed together on the network's device."""
        from funasr.utils.postprocess_utils import rich_transcription_postprocess

        model, tokenizer = self._model.model, self._model.kwargs["tokenizer"]
        logits, ends = self._logits(items)
        transcripts = []
        for pieces, end, tags in zip(
            logits.argmax(-1).tolist(), ends.tolist(), self._tag_probabilities(logits), strict=True
        ):
            runs = (next(run) for _, run in itertools.groupby(enumerate(pieces[:end]), key=lambda frame: frame[1]))
            emitted = [(begin, piece) for begin, piece in runs if piece != model.blank_id]
            text = rich_transcription_postprocess(tokenizer.decode([piece for _, piece in emitted]))
            speech_pieces = [(begin - NUM_QUERIES, piece) for begin, piece in emitted if begin >= NUM_QUERIES]
            transcripts.append(Transcript(text, self._onsets(text, speech_pieces), tags))
        return transcripts

    def _tag_probabilities(self, logits: torch.Tensor) -> list[dict[str, float]]:
        """Probability of each tag that the vocabulary has, in the network's answers (B, T, V)."""
        answers = logits[:, 1:3].float().softmax(-1).cpu()
        return [
            {tag: float(one[0 if tag in EMOTIONS else 1, number]) for tag, number in self.tags.items()}
            for one in answers
        ]

    def _onsets(self, text: str, speech_pieces: Sequence[tuple[int, int]]) -> tuple[float, ...]:
        """When each character of a transcript came up, by its pieces and the frames with which they begin."""
        onsets = []  # one for each letter of the pieces
        for begin, piece in speech_pieces:
            letters = sum(map(str.isalnum, self._model.kwargs["tokenizer"].decode([piece])))
            onsets += [begin * self._frame_s] * letters
        size = sum(map(str.isalnum, text))
        if not onsets or not size:
            return (0.0,) * len(text)
        # len(onsets) / size is 1 unless post-processing took letters away. A space has the time of the next letter.
        before = itertools.accumulate((c.isalnum() for c in text), initial=0)
        return tuple(onsets[min(n, size - 1) * len(onsets) // size] for n, _ in zip(before, text, strict=False))

    def _features(self, recordings: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """``WavFrontend.forward``, its filter bank once for all: (B, T, bands) and int64 (B,)."""
        from funasr.frontends.wav_frontend import apply_cmvn, apply_lfr
        from funasr.utils import fbank as kaldi

        frontend = self._model.kwargs["frontend"]
        hop = frontend.fs * frontend.frame_shift // 1000
        size = frontend.fs * frontend.frame_length // 1000
        parts = [F.pad(r, (0, -len(r) % hop + size)) for r in recordings]  # so that each begins a frame
        parts = [F.pad(part, (0, -len(part) % hop)) for part in parts]
        mel = kaldi.fbank(
            torch.cat(parts)[None] * (1 << 15), num_mel_bins=frontend.n_mels, frame_length=frontend.frame_length,
            frame_shift=frontend.frame_shift, dither=0.0, energy_floor=0.0, window_type=frontend.window,
            sample_frequency=frontend.fs,
        )  # fmt: skip
        features, begin = [], 0
        for recording, part in zip(recordings, parts, strict=True):
            frames = mel[begin : begin + (len(recording) - size) // hop + 1]
            features.append(apply_cmvn(apply_lfr(frames, frontend.lfr_m, frontend.lfr_n), frontend.cmvn))
            begin += len(part) // hop
        return pad_sequence(features, batch_first=True), torch.tensor([len(f) for f in features])
