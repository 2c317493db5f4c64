"""Train token2wav, the decoder from tokens to waveform, with spectral and adversarial losses; then decode the corpus.

The tokenizer is frozen; the first half of the decoder starts from its weights in the tokenizer's training.
Discriminators and losses follow HiFi-GAN (Kong et al. 2020: multi-period discriminator, least-squares loss, feature
matching) and Vocos (Siuzdak 2023: multi-resolution discriminator on complex spectra), at a twentieth of their size.

Writes token2wav.pt (averaged weights) and decoded.npy: the corpus resynthesised from its tokens of shift 0, int16, in
the layout of audio.npy.
"""

import argparse
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from tiny_stack.data import SHIFTS, Corpus
from tiny_stack.settings import PRESETS, add_common_args, summary_writer
from tiny_stack.train import GraphedStep, TrainingLog, WeightAverage, autocast, cosine, round_to_half, set_lr
from tts_grpo.speech.tiny.codec import SAMPLES_PER_TOKEN, FiniteScalarQuantiser, LogMel, TokenDecoder

CONTEXT = 16  # tokens decoded on either side of a segment and then discarded
DECODE_BATCH = 64
LOSS_NAMES = ("mel", "stft", "adversarial", "features", "discriminator")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_args(parser)
    return parser.parse_args(argv)


class SpectrumDiscriminator(nn.Module):
    """Discriminator on the complex spectrogram at one resolution."""

    def __init__(self, n_fft: int, channels: int = 32):
        super().__init__()
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        sizes = [(2, 1)] + [(channels, 2)] * 3
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(size, channels, (3, 9), (1, stride), (1, 4))) for size, stride in sizes
        )
        self.output = weight_norm(nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, speech: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Waveforms (B, T) -> scores, and the features of each layer."""
        spectrum = torch.stft(speech, self.n_fft, self.n_fft // 4, window=self.window, return_complex=True)
        x, features = torch.view_as_real(spectrum).permute(0, 3, 2, 1), []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.1)
            features.append(x)
        return self.output(x), features


class PeriodDiscriminator(nn.Module):
    """Discriminator on samples that are one period apart."""

    def __init__(self, period: int, channels: tuple[int, ...] = (1, 16, 64, 128, 128)):
        super().__init__()
        self.period = period
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(size, out, (5, 1), (3 if i < 3 else 1, 1), (2, 0)))
            for i, (size, out) in enumerate(itertools.pairwise(channels))
        )
        self.output = weight_norm(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, speech: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Waveforms (B, T) -> scores, and the features of each layer."""
        padded = F.pad(speech, (0, -speech.shape[1] % self.period))
        x, features = padded.view(len(speech), 1, -1, self.period), []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.1)
            features.append(x)
        return self.output(x), features


class SpectralLosses(nn.Module):
    """L1 loss of log-mel spectrograms at three resolutions, and STFT loss at four."""

    def __init__(self):
        super().__init__()
        self.mels = nn.ModuleList([LogMel(640, 160, 80), LogMel(1024, 256, 80), LogMel(320, 80, 40)])

    def forward(self, fake: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mel = sum((to_mel(fake) - to_mel(real)).abs().mean() for to_mel in self.mels) * 4 / len(self.mels)
        sizes = (256, 512, 1024, 2048)
        return mel, sum(self.stft(fake, real, size) for size in sizes) / len(sizes)

    @staticmethod
    def stft(fake: torch.Tensor, real: torch.Tensor, n_fft: int) -> torch.Tensor:
        """Log-magnitude loss plus spectral convergence (Yamamoto et al. 2020, Parallel WaveGAN, eq. 5-6)."""
        window = torch.hann_window(n_fft, device=fake.device)
        a, b = (torch.stft(x, n_fft, n_fft // 4, window=window, return_complex=True).abs() + 1e-4 for x in (fake, real))
        return (a.log() - b.log()).abs().mean() + (a - b).norm() / b.norm()


class Segments:
    """Random segments of training recordings and their tokens, in fixed tensors on the device."""

    def __init__(self, corpus: Corpus, tokens: dict[str, np.ndarray], settings, device: str):
        self.corpus, self.count, self.length = corpus, settings.token2wav_segments, settings.token2wav_segment_tokens
        self.rng = np.random.default_rng(settings.seed + 1)
        self.rows = corpus.indices("train")
        self.tokens = torch.from_numpy(tokens["tokens"]).to(device)
        self.token_lens = tokens["lens"]
        self.starts = torch.from_numpy(corpus.starts).to(device)
        self.ends = torch.from_numpy(corpus.starts + corpus.samples).to(device)
        self.shifts = torch.tensor(SHIFTS, device=device)
        span = self.length + 2 * CONTEXT
        self.speech = torch.zeros(self.count, self.length * SAMPLES_PER_TOKEN, device=device)
        self.digits = torch.zeros(self.count, span, 8, device=device)
        self.lens = torch.zeros(self.count, dtype=torch.int64, device=device)
        self.early = torch.zeros_like(self.lens)  # tokens of left context that an utterance's start leaves out
        self.weights = corpus.samples[self.rows] / corpus.samples[self.rows].sum()

    def draw(self) -> None:
        """Fill ``speech`` (B, T), ``digits`` (B, N, 8) and ``lens`` (B,) with new segments."""
        rows = self.rng.choice(self.rows, self.count, p=self.weights)
        shifts = self.rng.integers(0, len(SHIFTS), self.count)
        lens = self.token_lens[shifts, rows]
        first = (self.rng.random(self.count) * np.maximum(1, lens - self.length + 1)).astype(np.int64)
        device = self.speech.device
        rows, shifts, lens, first = (torch.as_tensor(x, device=device) for x in (rows, shifts, lens, first))
        sample = self.starts[rows] + self.shifts[shifts] + first * SAMPLES_PER_TOKEN
        index = sample[:, None] + torch.arange(self.speech.shape[1], device=device)
        inside = index < self.ends[rows][:, None]
        audio = self.corpus.audio[index.clamp(max=len(self.corpus.audio) - 1)].float() / 32768
        self.speech.copy_(audio * inside)
        # The window starts CONTEXT tokens before the segment, but not before the utterance.
        early = (CONTEXT - first).clamp(min=0)
        position = first[:, None] - CONTEXT + early[:, None] + torch.arange(self.digits.shape[1], device=device)
        ids = self.tokens[shifts[:, None], rows[:, None], position.clamp(max=self.tokens.shape[2] - 1)]
        self.digits.copy_(FiniteScalarQuantiser.to_digits(ids.long()))
        self.lens.copy_((lens - first + CONTEXT - early).clamp(max=self.digits.shape[1]))
        self.early.copy_(early)

    def cut(self, waveform: torch.Tensor) -> torch.Tensor:
        """Remove the context from a decoded window (B, T)."""
        offset = (CONTEXT - self.early) * SAMPLES_PER_TOKEN
        return waveform.gather(1, offset[:, None] + torch.arange(self.speech.shape[1], device=waveform.device))


class Token2WavTrainer:
    """Trains the decoder with its discriminators."""

    def __init__(self, segments: Segments, decoder: TokenDecoder, settings, device: str):
        self.segments, self.decoder, self.settings, self.device = segments, decoder, settings, device
        spectra = [SpectrumDiscriminator(n_fft) for n_fft in (512, 1024, 2048)]
        self.discriminators = nn.ModuleList(spectra + [PeriodDiscriminator(p) for p in (2, 3, 5, 7, 11)]).to(device)
        self.spectral = SpectralLosses().to(device)
        cuda = torch.device(device).type == "cuda"
        self.parameters = list(decoder.parameters())
        common = {"betas": (0.8, 0.99), "weight_decay": 1e-3, "capturable": cuda}
        lr = torch.tensor(0.0, device=device) if cuda else 0.0
        self.optimiser = torch.optim.AdamW(self.parameters, lr=lr, **common)
        lr = torch.tensor(0.0, device=device) if cuda else 0.0
        self.optimiser_d = torch.optim.AdamW(self.discriminators.parameters(), lr=lr, **common)
        self.losses = {name: torch.zeros((), device=device) for name in LOSS_NAMES}
        self.average = WeightAverage(self.parameters)

    def decode_segments(self) -> torch.Tensor:
        with autocast(self.device):
            waveform = self.decoder(self.segments.digits, self.segments.lens)
        return self.segments.cut(waveform.float())

    def spectral_loss(self, fake: torch.Tensor) -> torch.Tensor:
        mel, stft = self.spectral(fake, self.segments.speech)
        self.losses["mel"].copy_(mel.detach())
        self.losses["stft"].copy_(stft.detach())
        return 15 * mel + 2 * stft

    def update(self, loss: torch.Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 20.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def warmup_step(self) -> None:
        self.update(self.spectral_loss(self.decode_segments()))

    def adversarial_step(self) -> None:
        fake, real = self.decode_segments(), self.segments.speech
        self.update_discriminators(fake.detach(), real)
        for parameter in self.discriminators.parameters():
            parameter.requires_grad_(False)
        adversarial, features = self.generator_losses(fake, real)
        self.update(self.spectral_loss(fake) + adversarial + 2 * features)
        for parameter in self.discriminators.parameters():
            parameter.requires_grad_(True)

    def update_discriminators(self, fake: torch.Tensor, real: torch.Tensor) -> None:
        loss = 0.0
        with autocast(self.device):
            for discriminator in self.discriminators:
                scores = discriminator(torch.cat([real, fake]))[0].float()
                real_scores, fake_scores = scores.chunk(2)
                loss = loss + ((1 - real_scores) ** 2).mean() + (fake_scores**2).mean()
        self.losses["discriminator"].copy_(loss.detach())
        loss.backward()
        nn.utils.clip_grad_norm_(self.discriminators.parameters(), 10.0)
        self.optimiser_d.step()
        self.optimiser_d.zero_grad(set_to_none=True)

    def generator_losses(self, fake: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adversarial and feature-matching loss of the decoder."""
        adversarial, matching = 0.0, 0.0
        with autocast(self.device):
            for discriminator in self.discriminators:
                with torch.no_grad():
                    real_features = discriminator(real)[1]
                scores, fake_features = discriminator(fake)
                adversarial = adversarial + ((1 - scores.float()) ** 2).mean()
                for fake_feature, real_feature in zip(fake_features, real_features, strict=True):
                    matching = matching + (fake_feature.float() - real_feature.float()).abs().mean()
        self.losses["adversarial"].copy_(adversarial.detach())
        self.losses["features"].copy_(matching.detach())
        return adversarial, matching

    def train(self, writer) -> None:
        settings = self.settings
        steps, warmup = settings.token2wav_steps, settings.token2wav_warmup_steps
        warmup_step = GraphedStep(self.warmup_step, self.device)
        adversarial_step = GraphedStep(self.adversarial_step, self.device)
        log = TrainingLog(writer, "token2wav", steps)
        for step in range(1, steps + 1):
            self.segments.draw()
            set_lr(self.optimiser, settings.token2wav_lr * cosine(step, steps, 200, floor=0.05))
            set_lr(self.optimiser_d, settings.discriminator_lr * cosine(step, steps, 200, floor=0.1))
            (warmup_step if step <= warmup else adversarial_step)()
            self.average.update()
            if log.due(step):
                log.write(step, self.losses)


@torch.no_grad()
def decode_corpus(corpus: Corpus, tokens: dict[str, np.ndarray], decoder: TokenDecoder, device: str) -> np.ndarray:
    """Decode every recording from its tokens of shift 0: int16, in the layout of ``corpus.audio``."""
    decoded = np.zeros(len(corpus.audio), np.int16)
    order = np.argsort(corpus.samples)
    for first in range(0, len(order), DECODE_BATCH):
        rows = order[first : first + DECODE_BATCH]
        lens = tokens["lens"][0][rows]
        ids = torch.from_numpy(tokens["tokens"][0][rows, : lens.max()].astype(np.int64)).to(device)
        waveforms = decoder(FiniteScalarQuantiser.to_digits(ids), torch.as_tensor(lens, device=device))
        waveforms = (waveforms.clamp(-1, 1) * 32767).to(torch.int16).cpu().numpy()
        for row, waveform in zip(rows, waveforms, strict=True):
            start, samples = corpus.starts[row], corpus.samples[row]
            decoded[start : start + samples] = waveform[:samples]
    return decoded


def main(argv=None):
    args = get_args(argv)
    settings = PRESETS[args.preset]
    torch.manual_seed(settings.seed + 1)
    torch.backends.cudnn.benchmark = True
    corpus = Corpus(args.work_dir, args.device, settings.max_utterance_s)
    tokens = dict(np.load(args.work_dir / "tokens.npz"))
    decoder = TokenDecoder(**settings.token_decoder).to(args.device)
    decoder.load_state_dict(
        torch.load(args.work_dir / "tokenizer.pt", map_location=args.device, weights_only=True)["decoder"]
    )
    trainer = Token2WavTrainer(Segments(corpus, tokens, settings, args.device), decoder, settings, args.device)
    trainer.train(summary_writer(args.work_dir, "token2wav"))
    with trainer.average.applied():
        round_to_half(decoder)
        torch.save(decoder.state_dict(), args.work_dir / "token2wav.pt")
        np.save(args.work_dir / "decoded.npy", decode_corpus(corpus, tokens, decoder.eval(), args.device))


if __name__ == "__main__":
    main()
