"""CosyVoice3's token2wav: its flow and HiFT on batches, with the same results as the official code for one utterance.

Official inference (CosyVoice at ace7c47) supports one utterance at a time. Padding has no effect here because

* the flow's look-ahead convolution and the vocoder's two look-ahead convolutions read zeros after each utterance, like
  their own padding; all other convolutions are causal, and attention is masked;
* the source signal is reflected at the end of each utterance for the short-time Fourier transform, and the inverse
  transform excludes frames after it, as for CosyVoice2.

The official code has no random noise: the solver starts from fixed noise, and so does the vocoder's source. Neither is
in the released files: :func:`official_noise` draws the same numbers as the official constructors.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tts_grpo.speech.cosyvoice2.token2wav import (
    MEL_PER_TOKEN,
    CosyVoice2Token2Wav,
    Flow,
    inverse_stft,
    reflect,
)
from tts_grpo.speech.cosyvoice3.config import load_config
from tts_grpo.speech.cosyvoice3.modules import (
    MELS,
    SPEAKER_SIZE,
    F0Predictor,
    FlowNetwork,
    VocoderNetwork,
)
from tts_grpo.text.tokens import NUM_SPEECH_TOKENS

SAMPLE_RATE_HZ = 24_000
FLOW_NOISE_FRAMES = 50 * 300  # CausalConditionalCFM.rand_noise


def official_noise(harmonics: int, f0_channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The solver's noise (1, 80, 15000), and the state of the random generator before the vocoder's noise.

    ``CausalConditionalCFM`` seeds the generator with 0 and draws its noise; then ``CausalMaskedDiffWithDiT`` and the F0
    predictor initialise their weights, and ``SineGen2`` draws phases, which have no effect, and its noise.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        flow = torch.randn(1, MELS, FLOW_NOISE_FRAMES)
        nn.Embedding(NUM_SPEECH_TOKENS, MELS), nn.Linear(SPEAKER_SIZE, MELS), F0Predictor(f0_channels)
        torch.rand(1, harmonics + 1)
        return flow, torch.get_rng_state()


class DiTFlow(Flow):
    """CosyVoice3's flow: see :class:`Flow`.

    Args:
        module: the networks.
        noise: see :func:`official_noise`.
        rate: strength of classifier-free guidance.
        dtype: data type of the estimator; float32 uses padded batches, float16 and bfloat16 use packed ones.
    """

    padded_share = 0.25  # its layers are two to four times as wide as CosyVoice2's

    def __init__(self, module: FlowNetwork, noise: torch.Tensor, rate: float, dtype: torch.dtype):
        super().__init__(module, noise)
        self.rate, estimator = rate, module.decoder["estimator"]
        self.starts = [self.times[0]]  # ConditionalCFM.solve_euler adds the steps up; their rounding matters
        for end in self.times[1:-1]:
            self.starts.append(self.starts[-1] + (end - self.starts[-1]))
        starts = torch.stack(self.starts)
        if dtype == torch.float32:
            self.modulations = estimator.modulations(starts)
        else:
            from tts_grpo.speech.cosyvoice3.packed_dit import packed_solver  # needs Triton

            self.packed = packed_solver(estimator, self.noise[0].T, starts, self.times, rate, dtype)

    def encode(self, tokens: torch.Tensor, lens: torch.Tensor) -> Iterable[torch.Tensor]:
        used = torch.arange(tokens.shape[1]) < lens[:, None]
        embedded = self.module.input_embedding(tokens) * used[..., None].to(tokens.device)
        yield self.module.pre_lookahead_layer(embedded).repeat_interleave(MEL_PER_TOKEN, dim=1).transpose(1, 2)

    def solve(self, mu, mask, spks, condition) -> torch.Tensor:
        """Euler steps of conditional flow matching with classifier-free guidance (``ConditionalCFM.solve_euler``)."""
        batch, channels, num = mu.shape
        estimator, used = self.module.decoder["estimator"], mask[:, 0].bool().repeat(2, 1)
        state = torch.zeros(2 * batch, num, 4 * channels, device=mu.device)
        conditioning = torch.cat([condition, mu, spks[..., None].expand(-1, -1, num)], dim=1)
        state[:batch, :, channels:] = conditioning.transpose(1, 2)
        x = self.noise[:, :, :num].transpose(1, 2).expand(batch, -1, -1)
        for start, end, *modulation in zip(self.starts, self.times[1:], *self.modulations, strict=True):
            state[..., :channels] = x.repeat(2, 1, 1)
            conditional, unconditional = estimator(state, used, *modulation).chunk(2)
            x = x + (end - start) * ((1 + self.rate) * conditional - self.rate * unconditional)
        return x.transpose(1, 2)


class CausalVocoder:
    """Mel spectrograms -> waveforms with CosyVoice3's HiFT, in batches.

    Args:
        module: the networks.
        state: see :func:`official_noise`.
        dtype: data type of products in the residual blocks.
    """

    def __init__(self, module: VocoderNetwork, state: torch.Tensor, dtype: torch.dtype):
        self.module, self.config, self.state = module, module.config, state
        self.scale = int(np.prod(self.config.upsample_rates))
        self.samples_per_frame = self.scale * self.config.hop
        module.f0_predictor.double()  # phases are sums of frequencies: CausalHiFTGenerator.inference
        self.window = torch.hann_window(self.config.n_fft, device=self.device)
        self.noise, self.masks = torch.zeros(0, self.config.harmonics + 1), {}
        if dtype != torch.float32:
            from tts_grpo.speech.cosyvoice2.kernels import SnakeResBlock

            for blocks in (module.resblocks, module.source_resblocks):
                for i, block in enumerate(blocks):
                    blocks[i] = SnakeResBlock(block, self.masks, dtype, causal=True)

    @property
    def device(self) -> torch.device:
        return self.module.conv_post.weight.device

    def __call__(self, mel: torch.Tensor, lens: torch.Tensor, seed: int = 0) -> torch.Tensor:
        """Mel (B, 80, T), lengths int64 (B,) in frames -> float32 (B, T * samples_per_frame), zero after each end.

        ``seed`` has no effect, because the official noise is fixed.
        """
        lens = lens.to(mel.device)
        self.set_masks(lens, mel.shape[2])
        mel = mel * self.masks[mel.shape[2]]
        source = self.source(self.module.f0_predictor(mel.double()).float())
        spectrum = torch.stft(
            reflect(source, lens * self.samples_per_frame), self.config.n_fft, self.config.hop, window=self.window,
            return_complex=True,
        )  # fmt: skip
        magnitude, phase = self.module(mel, torch.cat([spectrum.real, spectrum.imag], dim=1))
        used = self.masks[magnitude.shape[2]]
        speech = inverse_stft(magnitude, phase, used, self.window, self.config.hop)
        limit = self.config.limit
        return speech.clamp(-limit, limit) * used[:, 0, :-1].repeat_interleave(self.config.hop, dim=1)

    def set_masks(self, lens: torch.Tensor, size: int) -> None:
        """Set masks (B, 1, L) for all time scales, by length L; the last has one more frame, by the centred STFT."""
        scales = [int(n) for n in np.cumprod([1, *self.config.upsample_rates])]
        self.masks.clear()
        for scale, extra in [*((scale, 0) for scale in scales), (scales[-1], 1)]:
            position = torch.arange(size * scale + extra, device=lens.device)
            self.masks[len(position)] = (position < (lens * scale + extra)[:, None]).float()[:, None]

    def source(self, f0: torch.Tensor) -> torch.Tensor:
        """Source signal (B, T * samples_per_frame) of frequencies (B, T) in Hz (``SineGen2``, ``SourceModuleHnNSF``).

        The official code expands the frequencies to samples first, but its phase is constant within a frame.
        """
        config, linear = self.config, self.module.m_source["l_linear"]
        numbers = torch.arange(1, config.harmonics + 2, device=f0.device, dtype=f0.dtype)
        turns = (f0[..., None] * numbers / SAMPLE_RATE_HZ) % 1
        sines = torch.sin(torch.cumsum(turns, dim=1) * 2 * np.pi * self.samples_per_frame) * config.sine_amplitude
        voiced = (f0 > config.voiced_hz).float()
        deviation = voiced * config.noise_deviation + (1 - voiced) * config.sine_amplitude / 3
        weight = linear.weight[0]
        tone = (sines * voiced[..., None] * weight).sum(dim=2) + linear.bias
        noise = (self.source_noise(f0.shape[1] * self.samples_per_frame) * weight).sum(dim=1)
        frames = noise.view(1, -1, self.samples_per_frame) * deviation[..., None] + tone[..., None]
        return torch.tanh(frames.flatten(1))

    def source_noise(self, length: int) -> torch.Tensor:
        """The first (length, harmonics + 1) numbers of ``SineGen2``'s noise; cached until more are needed."""
        if len(self.noise) < length:
            generator = torch.Generator()
            generator.set_state(self.state)
            self.noise = torch.rand(2 * length, self.config.harmonics + 1, generator=generator).to(self.device)
        return self.noise[:length]


class PromptMel:
    """Log-mel spectrogram, (1, T) at 24 kHz -> (1, 80, L): Matcha's ``mel_spectrogram`` up to half the sample rate."""

    n_fft, hop = 1920, 480

    def __init__(self):
        from torchaudio.functional import melscale_fbanks

        self.window = torch.hann_window(self.n_fft)
        self.filters = melscale_fbanks(
            self.n_fft // 2 + 1, 0.0, SAMPLE_RATE_HZ / 2, MELS, SAMPLE_RATE_HZ, norm="slaney", mel_scale="slaney"
        ).T

    def __call__(self, speech: torch.Tensor) -> torch.Tensor:
        edge = (self.n_fft - self.hop) // 2
        padded = F.pad(speech[None], (edge, edge), mode="reflect")[0]
        spectrum = torch.stft(padded, self.n_fft, self.hop, window=self.window, center=False, return_complex=True)
        magnitude = torch.sqrt(spectrum.real**2 + spectrum.imag**2 + 1e-9)
        return torch.log((self.filters @ magnitude).clamp(min=1e-5))


class CosyVoice3Token2Wav(CosyVoice2Token2Wav):
    """Decoder and speech tokenizer of a CosyVoice3 model folder (``FunAudioLLM/Fun-CosyVoice3-0.5B-2512``), 24 kHz.

    Args and errors are those of :class:`CosyVoice2Token2Wav`. The seed has no effect.
    """

    name, kind = "CosyVoice3", "cosyvoice3"
    config_file, tokenizer_file = "cosyvoice3.yaml", "speech_tokenizer_v3.onnx"

    def _load_networks(self, dtype: torch.dtype):
        flow_config, vocoder_config = load_config(Path(self.model_dir) / self.config_file)
        with torch.device("meta"):  # the weights are in the files
            networks = FlowNetwork(flow_config), VocoderNetwork(vocoder_config)
        noise, state = official_noise(vocoder_config.harmonics, vocoder_config.f0_channels)
        flow = DiTFlow(self._load_weights(networks[0], "flow.pt"), noise, flow_config.guidance, dtype)
        vocoder = CausalVocoder(self._load_weights(networks[1], "hift.pt", "generator."), state, dtype)
        return PromptMel(), flow, vocoder
