"""Train one recogniser of the tiny stack: a small SenseVoiceSmall, saved as a folder that funasr loads.

Each recogniser is trained on its own half of the training sentences, the one of the evaluation also on the long
sentences. Half of the reward recogniser's training audio is decoded from speech tokens; the evaluation recogniser hears
the teacher's recordings only. See settings.py for features, sizes and augmentation. Characters that are too rare to
learn are replaced by a more frequent homophone in the targets.
"""

import argparse
import collections
import io
import json
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
import yaml
from funasr.models.sense_voice.model import SenseVoiceSmall
from torch import nn
from torchaudio.compliance.kaldi import get_mel_banks

from tiny_stack.data import Corpus, concatenated
from tiny_stack.pronunciation import FeatureSumEmbedding, pronunciation_features, reading
from tiny_stack.settings import PRESETS, add_common_args, summary_writer
from tiny_stack.train import TrainingLog, WeightAverage, autocast, cosine, ctc_loss, greedy_ctc, set_lr
from tts_grpo.speech.audio import ASR_HZ
from tts_grpo.speech.tiny.codec import SAMPLES_PER_TOKEN
from tts_grpo.text.errors import pinyin_error_rate

TAGS = ("<|zh|>", "<|NEUTRAL|>", "<|Speech|>", "<|woitn|>")  # SenseVoice's output before the text
QUERIES = (3, 1, 2, 15)  # ids of its query embedding: Chinese, event, emotion, no inverse text normalisation
TRAINED = ("train", "long")  # splits to train on
FRAME_SHIFT_MS = 10
WARMUP = 400  # steps
WINDOWS = {"hamming": torch.hamming_window, "hanning": torch.hann_window}
BPE_NAME = "chn_jpn_yue_eng_ko_spectok.bpe.model"
SEEDS = {"reward": 2, "eval": 12}


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_args(parser)
    parser.add_argument("--recogniser", choices=SEEDS, required=True, help="which recogniser to train")
    return parser.parse_args(argv)


class Fbank(nn.Module):
    """Batched Kaldi log-mel filter banks: the features of funasr's WavFrontend without dither.

    Args:
        window: a name in ``WINDOWS``.
        n_mels: number of mel filters.
        frame_length: milliseconds.
        lfr_m: frames that are stacked (7 in SenseVoiceSmall).
        lfr_n: stride of the stacks (6 in SenseVoiceSmall).
    """

    def __init__(self, window: str, n_mels: int, frame_length: int, lfr_m: int, lfr_n: int):
        super().__init__()
        self.n_mels, self.lfr_m, self.lfr_n = n_mels, lfr_m, lfr_n
        self.length, self.shift = ASR_HZ * frame_length // 1000, ASR_HZ * FRAME_SHIFT_MS // 1000
        self.n_fft = 1 << (self.length - 1).bit_length()
        filters, _ = get_mel_banks(n_mels, self.n_fft, ASR_HZ, 20.0, 0.0, 100.0, -500.0, 1.0)
        self.register_buffer("filters", F.pad(filters, (0, 1)).T.contiguous(), persistent=False)
        self.register_buffer("window", WINDOWS[window](self.length, periodic=False), persistent=False)

    def forward(self, speech: torch.Tensor, lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples (B, T) in [-1, 1] -> stacked frames (B, L, lfr_m * n_mels) and their counts (B,)."""
        frames = (speech.float() * 32768).unfold(1, self.length, self.shift)
        frames = frames - frames.mean(-1, keepdim=True)
        frames = frames - 0.97 * torch.cat([frames[..., :1], frames[..., :-1]], dim=-1)
        power = torch.fft.rfft(frames * self.window, self.n_fft).abs() ** 2
        mel = torch.log(torch.clamp(power @ self.filters, min=torch.finfo(torch.float32).eps))
        return self.stack(mel, (lens - self.length) // self.shift + 1)

    def stack(self, mel: torch.Tensor, lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Low frame rate: stack frames with a stride; the first and the last frame are repeated as padding."""
        out_lens = (lens + self.lfr_n - 1) // self.lfr_n
        start = torch.arange(int(out_lens.max()), device=mel.device) * self.lfr_n - (self.lfr_m - 1) // 2
        index = start[:, None] + torch.arange(self.lfr_m, device=mel.device)
        index = torch.minimum(index.clamp(min=0)[None], (lens - 1)[:, None, None])
        stacked = mel.gather(1, index.flatten(1)[..., None].expand(-1, -1, mel.shape[2]))
        return stacked.reshape(len(mel), len(start), -1), out_lens

    @property
    def frames_per_s(self) -> float:
        """Stacked frames per second."""
        return 1000 / FRAME_SHIFT_MS / self.lfr_n


def recogniser_characters(corpus: Corpus) -> list[str]:
    """The output characters: those of the HSK sentences, and the most frequent one for every other syllable."""
    rows = [row for row in corpus.rows if row["split"] in TRAINED]
    counts = collections.Counter(c for row in rows for c in row["text"] if reading(c))
    chosen = {c for row in rows if row["source"] == "hsk" for c in row["text"] if reading(c)}
    covered = {reading(c) for c in chosen}
    for character, _ in counts.most_common():
        if reading(character) not in covered:
            covered.add(reading(character))
            chosen.add(character)
    return sorted(chosen, key=lambda c: (-counts[c], c))


class Vocabulary:
    """A character-level SentencePiece model with SenseVoice's tags."""

    def __init__(self, corpus: Corpus, folder: Path):
        self.characters = recogniser_characters(corpus)
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(self.characters), model_writer=model, model_type="char", character_coverage=1.0,
            vocab_size=len(self.characters) + len(TAGS) + 3, hard_vocab_limit=False, user_defined_symbols=list(TAGS),
            add_dummy_prefix=False, normalization_rule_name="identity", unk_id=0, bos_id=1, eos_id=2, minloglevel=2,
        )  # fmt: skip
        (folder / BPE_NAME).write_bytes(model.getvalue())
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(folder / BPE_NAME))
        self.tags = [self.model.piece_to_id(tag) for tag in TAGS]
        self.size = self.model.vocab_size()
        self.homophones = {}
        for character in self.characters:
            self.homophones.setdefault(reading(character), character)

    def encode(self, row: dict) -> list[int]:
        """Ids of a corpus row's characters; a character that is not in the vocabulary is replaced by a homophone."""
        known = set(self.characters)
        characters = [c for c in row["text"] if "\u4e00" <= c <= "\u9fff"]
        targets = (
            c if c in known else self.homophones.get(syllable) or self.homophones.get(reading(c))
            for c, syllable in zip(characters, row["syllables"], strict=True)
        )
        return [self.model.piece_to_id(c) for c in targets if c]

    def row_features(self) -> list[list[str]]:
        """Pronunciation features of each id."""
        pieces = (self.model.id_to_piece(i) for i in range(self.size))
        return [pronunciation_features(reading(p)) if len(p) == 1 and reading(p) else [] for p in pieces]


class Recogniser(nn.Module):
    """SenseVoiceSmall with a pronunciation-based output layer and, for training only, a head that predicts units."""

    def __init__(self, name: str, settings, vocabulary: Vocabulary, num_units: int):
        super().__init__()
        self.encoder_conf = {
            **settings.asr_dims[name], "dropout_rate": 0.1, "positional_dropout_rate": 0.1,
            "attention_dropout_rate": 0.1, "input_layer": "pe", "pos_enc_class": "SinusoidalPositionEncoder",
            "normalize_before": True, "sanm_shfit": 0, "selfattention_layer_type": "sanm",
        }  # fmt: skip
        self.frontend_conf = settings.asr_frontend[name]
        size = self.frontend_conf["n_mels"] * self.frontend_conf["lfr_m"]
        self.model_conf = {"length_normalized_loss": True, "sos": 1, "eos": 2, "ignore_id": -1}
        self.sense_voice = SenseVoiceSmall(
            encoder="SenseVoiceEncoderSmall", encoder_conf=self.encoder_conf, input_size=size,
            vocab_size=vocabulary.size, **self.model_conf,
        )  # fmt: skip
        dim = self.encoder_conf["output_size"]
        self.output = FeatureSumEmbedding(vocabulary.row_features(), dim, torch.full((vocabulary.size,), 0.02))
        self.output_bias = nn.Parameter(torch.zeros(vocabulary.size))
        self.unit_head = nn.Linear(dim, num_units + 1)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("inverse_std", torch.ones(size))

    def forward(self, features: torch.Tensor, lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stacked frames (B, L, F) -> logits of characters and of units, both (B, 4 + L, ...) with the tags first."""
        features = (features - self.mean) * self.inverse_std
        queries = self.sense_voice.embed(torch.tensor(QUERIES, device=features.device))
        features = torch.cat([queries[None].expand(len(features), -1, -1), features], dim=1)
        encoded = self.sense_voice.encoder(features, lens + len(QUERIES))[0]
        return F.linear(encoded, self.output(), self.output_bias), self.unit_head(encoded)

    def save(self, folder: Path) -> None:
        """Write a folder that ``funasr.AutoModel`` loads."""
        self.sense_voice.ctc.ctc_lo.weight.data.copy_(self.output())
        self.sense_voice.ctc.ctc_lo.bias.data.copy_(self.output_bias)
        state = {key: value.half().cpu() for key, value in self.sense_voice.state_dict().items()}
        torch.save(state, folder / "model.pt")
        config = {
            "encoder": "SenseVoiceEncoderSmall", "encoder_conf": self.encoder_conf, "model": "SenseVoiceSmall",
            "model_conf": self.model_conf, "tokenizer": "SentencepiecesTokenizer",
            "tokenizer_conf": {"bpemodel": None, "unk_symbol": "<unk>", "split_with_space": True},
            "frontend": "WavFrontend",
            "frontend_conf": {"fs": ASR_HZ, **self.frontend_conf, "frame_shift": FRAME_SHIFT_MS, "dither": 0.0,
                              "cmvn_file": None},
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        paths = {"init_param": "model.pt", "config": "config.yaml", "tokenizer_conf": {"bpemodel": BPE_NAME},
                 "frontend_conf": {"cmvn_file": "am.mvn"}}  # fmt: skip
        configuration = {
            "framework": "pytorch", "task": "auto-speech-recognition", "model": {"type": "funasr"},
            "file_path_metas": paths,
        }  # fmt: skip
        (folder / "configuration.json").write_text(json.dumps(configuration, indent=2) + "\n")
        (folder / "am.mvn").write_text(self.cmvn_text())

    def cmvn_text(self) -> str:
        """Mean and standard deviation in Kaldi's nnet text format, which funasr reads."""
        size = len(self.mean)
        shift, scale = (" ".join(f"{v:.6g}" for v in values.tolist()) for values in (-self.mean, self.inverse_std))
        return (
            f"<Nnet>\n<Splice> {size} {size}\n[ 0 ]\n<AddShift> {size} {size}\n<LearnRateCoef> 0 [ {shift} ]\n"
            f"<Rescale> {size} {size}\n<LearnRateCoef> 0 [ {scale} ]\n</Nnet>\n"
        )


class RecogniserTrainer:
    """Trains one recogniser on its part of the corpus, and on decoded speech if there is any."""

    def __init__(self, name: str, corpus: Corpus, decoded: torch.Tensor | None, folder: Path, settings, device: str):
        self.name, self.corpus, self.decoded, self.settings, self.device = name, corpus, decoded, settings, device
        self.rng = np.random.default_rng(settings.seed + SEEDS[name])
        self.augmentation = settings.asr_augment[name]
        self.vocabulary = Vocabulary(corpus, folder)
        self.texts = [self.vocabulary.encode(row) for row in corpus.rows]
        self.fbank = Fbank(**settings.asr_frontend[name]).to(device)
        self.model = Recogniser(name, settings, self.vocabulary, len(corpus.unit_names)).to(device)
        self.train_rows = np.concatenate([corpus.indices(split, name) for split in TRAINED])
        self.fit_cmvn()
        self.average = WeightAverage(self.model.parameters())

    @torch.no_grad()
    def fit_cmvn(self) -> None:
        rows = self.rng.choice(self.train_rows, min(400, len(self.train_rows)), replace=False)
        features, lens = self.fbank(*self.corpus.speech(rows, 0))
        valid = features[torch.arange(features.shape[1], device=self.device)[None] < lens[:, None]]
        self.model.mean.copy_(valid.mean(0))
        self.model.inverse_std.copy_(1 / valid.std(0).clamp(min=1e-3))

    @torch.no_grad()
    def features(self, groups: list[np.ndarray], step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of augmented speech: each group's recordings in a row."""
        audio = self.decoded if step % 2 else None
        shift = self.rng.integers(0, SAMPLES_PER_TOKEN)
        speech, lens = self.corpus.joined_speech(groups, shift, self.augmentation.pause_s, self.rng, audio)
        features, lens = self.fbank(*self.augmentation.waveforms(speech, lens, self.rng))
        shape = self.fbank.lfr_m, self.fbank.n_mels
        stacked, mean = features.unflatten(2, shape), self.model.mean.unflatten(0, shape)
        return self.augmentation.mask(stacked, mean, self.fbank.frames_per_s).flatten(2), lens

    def loss(self, groups: list[np.ndarray], step: int) -> dict[str, torch.Tensor]:
        features, lens = self.features(groups, step)
        with autocast(self.device):
            logits, unit_logits = self.model(features, lens)
        skip = len(TAGS)
        texts = [[t for row in group for t in self.texts[row]] for group in groups]
        units = [[u for row in group for u in self.corpus.unit_ids[row]] for group in groups]
        tags = torch.tensor(self.vocabulary.tags, device=self.device).repeat(len(groups))
        return {
            "ctc": ctc_loss(logits[:, skip:], lens, *concatenated(texts)),
            "units": ctc_loss(unit_logits[:, skip:], lens, *concatenated(units)),
            "tags": F.cross_entropy(logits[:, :skip].float().flatten(0, 1), tags),
        }

    def train(self, writer) -> None:
        steps = self.settings.asr_steps[self.name]
        own = {id(self.model.output.own)}
        groups = [
            {"params": [p for p in self.model.parameters() if id(p) not in own], "weight_decay": 0.02},
            {"params": [self.model.output.own], "weight_decay": 0.5},
        ]
        optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=self.device == "cuda")
        batches = self.corpus.joined_batches(
            self.train_rows, self.settings.asr_batch_s[self.name], self.augmentation.joined, self.rng
        )
        log = TrainingLog(writer, f"asr-{self.name}", steps, every_s=60.0)  # not more often: it transcribes dev
        for step in range(1, steps + 1):
            losses = self.loss(next(batches), step)
            (losses["ctc"] + 0.5 * losses["units"] + 0.1 * losses["tags"]).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 2.0)
            set_lr(optimiser, self.settings.asr_lr[self.name] * cosine(step, steps, warmup=WARMUP))
            optimiser.step()
            optimiser.zero_grad()
            self.average.update()
            if log.due(step):
                with self.average.applied():
                    log.write(step, losses | {"dev_error": torch.tensor(self.dev_error())})

    @torch.no_grad()
    def dev_error(self, split: str = "dev", audio: torch.Tensor | None = None) -> float:
        """Toneless pinyin error rate on the sentences of a split."""
        self.model.eval()
        rows = self.corpus.indices(split)
        features, lens = self.fbank(*self.corpus.speech(rows, 0, audio))
        ids = greedy_ctc(self.model(features, lens)[0][:, len(TAGS) :], lens)
        self.model.train()
        texts = [self.corpus.rows[row]["text"] for row in rows]
        return pinyin_error_rate(texts, [self.vocabulary.model.decode(sequence) for sequence in ids], tones=False)


def main(argv=None):
    args = get_args(argv)
    settings = PRESETS[args.preset]
    name = args.recogniser
    torch.manual_seed(settings.seed + SEEDS[name])
    corpus = Corpus(args.work_dir, args.device, settings.max_utterance_s)
    decoded = None
    if name in settings.asr_decoded:
        decoded = torch.from_numpy(np.load(args.work_dir / "decoded.npy")).to(args.device)
    folder = args.work_dir / f"asr_{name}"
    folder.mkdir(exist_ok=True)
    trainer = RecogniserTrainer(name, corpus, decoded, folder, settings, args.device)
    trainer.train(summary_writer(args.work_dir, f"asr-{name}"))
    with trainer.average.applied():
        errors = {split: trainer.dev_error(split) for split in ("dev", "long-dev") if len(corpus.indices(split))}
        if decoded is not None:
            errors["decoded dev"] = trainer.dev_error("dev", decoded)
        print(f"asr-{name}: pinyin error rate", *(f"{split} {error:.4f}" for split, error in errors.items()))
        trainer.model.save(folder)


if __name__ == "__main__":
    main()
