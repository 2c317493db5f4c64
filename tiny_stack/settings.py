"""All training settings of the tiny stack, for the full run and for the smoke run in CI."""

import dataclasses
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from tiny_stack.augment import Augmentation


@dataclasses.dataclass(frozen=True)
class Settings:
    """Network sizes, and numbers of steps, batch sizes and learning rates for training them."""

    seed: int = 0
    max_utterance_s: float = 12.0  # longer utterances are left out; the teacher says 3 to 4 syllables per second

    speech_tokenizer: dict = dataclasses.field(default_factory=lambda: {"dim": 160, "num_blocks": 4})
    token_decoder: dict = dataclasses.field(
        default_factory=lambda: {"dim": 256, "num_blocks": 4, "wave_dim": 256, "num_wave_blocks": 5}
    )
    tokenizer_batch_s: float = 240.0  # padded seconds of speech per batch
    tokenizer_steps: int = 3500
    tokenizer_lr: float = 1.5e-3

    token2wav_warmup_steps: int = 800  # spectral losses only; adversarial losses start after that
    token2wav_steps: int = 7000
    token2wav_segments: int = 16
    token2wav_segment_tokens: int = 32
    token2wav_lr: float = 6e-4
    discriminator_lr: float = 3e-4

    # The two recognisers differ in features, size, training data and augmentation. The one of the evaluation hears no
    # speech that is decoded from tokens, but the teacher's recordings in rooms, channels and noise, also joined.
    asr_decoded: tuple = ("reward",)  # recognisers of which half of the training speech is decoded
    asr_batch_s: dict = dataclasses.field(default_factory=lambda: {"reward": 360.0, "eval": 400.0})
    asr_steps: dict = dataclasses.field(default_factory=lambda: {"reward": 2800, "eval": 6000})
    asr_lr: dict = dataclasses.field(default_factory=lambda: {"reward": 2e-3, "eval": 1.5e-3})
    asr_frontend: dict = dataclasses.field(
        default_factory=lambda: {
            "reward": {"window": "hamming", "n_mels": 80, "frame_length": 25, "lfr_m": 5, "lfr_n": 3},
            "eval": {"window": "hanning", "n_mels": 64, "frame_length": 32, "lfr_m": 4, "lfr_n": 2},
        }
    )
    asr_dims: dict = dataclasses.field(
        default_factory=lambda: {
            "reward": {"output_size": 96, "attention_heads": 4, "linear_units": 384, "num_blocks": 4, "tp_blocks": 1,
                       "kernel_size": 11},
            "eval": {"output_size": 160, "attention_heads": 4, "linear_units": 640, "num_blocks": 8, "tp_blocks": 1,
                     "kernel_size": 15},
        }
    )  # fmt: skip
    asr_augment: dict = dataclasses.field(
        default_factory=lambda: {
            "reward": Augmentation(),
            "eval": Augmentation(
                speed=(0.87, 1.15), gain_db=(-12.0, 6.0), noise_db=(-110.0, -34.0), noise_share=0.8,
                noise_slope=(0.0, 2.0), room_share=0.4, channel_share=0.5, joined=(0.4, 0.35, 0.25), pause_s=(0.0, 0.4),
                num_bands=2, band=12, spans_per_s=1.2, span=6,
            ),
        }
    )  # fmt: skip

    lm_hidden: int = 192
    lm_intermediate: int = 576
    lm_layers: int = 5
    lm_steps: int = 6000
    lm_batch: int = 64
    lm_lr: float = 2.5e-3
    lm_checkpoints: int = 3

    grpo_prompts: int = 1024


FULL = Settings()
# Takes two minutes on two cores: runs all code, trains nothing useful.
SMOKE = dataclasses.replace(
    FULL,
    tokenizer_batch_s=12.0,
    asr_batch_s={"reward": 12.0, "eval": 12.0},
    tokenizer_steps=4,
    token2wav_warmup_steps=1,
    token2wav_steps=2,
    token2wav_segments=2,
    asr_steps={"reward": 4, "eval": 4},
    lm_steps=4,
    lm_batch=4,
    lm_checkpoints=2,
    grpo_prompts=2,
)
PRESETS = {"full": FULL, "smoke": SMOKE}


def add_common_args(parser) -> None:
    """Add the flags that all training scripts of the tiny stack share."""
    parser.add_argument("--work-dir", type=Path, required=True, help="folder with the corpus and the trained models")
    parser.add_argument("--preset", choices=PRESETS, default="full", help="settings to use, see settings.py")
    parser.add_argument("--device", default="cuda", help="torch device")


def summary_writer(work_dir: Path, name: str) -> SummaryWriter:
    """TensorBoard writer for the training of one model."""
    return SummaryWriter(str(work_dir / "tensorboard" / name))
