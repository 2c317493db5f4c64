"""Train the speech tokenizer, then tokenise the corpus.

The tokens must encode both content and sound. Therefore two heads, which are used only in training, predict the
log-mel spectrogram (through the first half of the token decoder) and the initials and toned finals (CTC) from them.

Writes tokenizer.pt (tokenizer and token decoder) and tokens.npz: ``tokens`` int16 (4, N, L), one for each of SHIFTS;
``lens`` (4, N); ``alignment`` int16 (N, L), the unit that each token of shift 0 belongs to.
"""

import argparse

import numpy as np
import torch
from torch import nn

from tiny_stack.data import SHIFTS, Corpus
from tiny_stack.settings import PRESETS, add_common_args, summary_writer
from tiny_stack.train import (
    TrainingLog,
    autocast,
    cosine,
    ctc_loss,
    greedy_ctc,
    label_error_rate,
    round_to_half,
    set_lr,
)
from tts_grpo.speech.tiny.codec import (
    DIMENSIONS,
    FRAMES_PER_TOKEN,
    NUM_MELS,
    SAMPLES_PER_TOKEN,
    ConvNeXtBlock,
    FiniteScalarQuantiser,
    SpeechTokenizer,
    TokenDecoder,
    length_mask,
)
from tts_grpo.text.tokens import NUM_SPEECH_TOKENS

ENCODE_BATCH = 128


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_args(parser)
    return parser.parse_args(argv)


class UnitHead(nn.Module):
    """Digits (B, N, 8) -> logits of initials and toned finals (B, N, units + 1)."""

    def __init__(self, num_units: int, dim: int = 256, num_blocks: int = 4):
        super().__init__()
        self.input = nn.Linear(DIMENSIONS, dim)
        self.blocks = nn.ModuleList(ConvNeXtBlock(dim, kernel=9, dropout=0.1) for _ in range(num_blocks))
        self.output = nn.Linear(dim, num_units + 1)

    def forward(self, digits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.input(digits)
        for block in self.blocks:
            x = block(x, mask)
        return self.output(x)


class TokenizerTrainer:
    """Trains the tokenizer with its two heads, and tokenises the corpus."""

    def __init__(self, corpus: Corpus, settings, device: str):
        self.corpus, self.settings, self.device = corpus, settings, device
        self.tokenizer = SpeechTokenizer(**settings.speech_tokenizer).to(device)
        self.decoder = TokenDecoder(**settings.token_decoder).to(device)
        self.mel_head = nn.Linear(settings.token_decoder["dim"], FRAMES_PER_TOKEN * NUM_MELS).to(device)
        self.unit_head = UnitHead(len(corpus.unit_names)).to(device)
        self.modules = nn.ModuleList([self.tokenizer, self.decoder, self.mel_head, self.unit_head])

    def losses(self, rows: np.ndarray, shifts: np.ndarray) -> dict[str, torch.Tensor]:
        speech, lens = self.corpus.speech(rows, shifts)
        token_lens = (lens + SAMPLES_PER_TOKEN - 1) // SAMPLES_PER_TOKEN
        mask = length_mask(token_lens, speech.shape[1] // SAMPLES_PER_TOKEN)
        with torch.no_grad():
            mel = self.tokenizer.mel(speech)
        with autocast(self.device):
            digits = self.tokenizer(mel + 0.03 * torch.randn_like(mel), token_lens)
            predicted = self.mel_head(self.decoder.features(digits, token_lens))
            logits = self.unit_head(digits, mask)
        error = (predicted.float() - mel.reshape(predicted.shape)).abs().mean(-1, keepdim=True)
        ctc = ctc_loss(logits, token_lens, *self.corpus.targets(rows))
        return {"mel": 4 * (error * mask).sum() / mask.sum(), "ctc": ctc}

    def train(self, writer) -> None:
        steps = self.settings.tokenizer_steps
        rng = np.random.default_rng(self.settings.seed)
        parameters = list(self.modules.parameters())
        optimiser = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.02, fused=self.device == "cuda")
        batches = self.corpus.batches(self.corpus.indices("train"), self.settings.tokenizer_batch_s, rng)
        log = TrainingLog(writer, "tokenizer", steps)
        for step in range(1, steps + 1):
            rows = next(batches)
            losses = self.losses(rows, rng.integers(0, SAMPLES_PER_TOKEN, len(rows)))
            (2 * losses["mel"] + 0.5 * losses["ctc"]).backward()
            norm = nn.utils.clip_grad_norm_(parameters, 2.0)
            set_lr(optimiser, self.settings.tokenizer_lr * cosine(step, steps, warmup=300))
            optimiser.step()
            optimiser.zero_grad()
            if log.due(step):
                log.write(step, losses | {"grad_norm": norm})

    @torch.no_grad()
    def tokenise(self, rows: np.ndarray, shift: int):
        """Tokens (B, N), lengths (B,) and unit log-probabilities (B, N, units + 1) of recordings, in full precision."""
        speech, lens = self.corpus.speech(rows, shift)
        tokens, token_lens = self.tokenizer.encode(speech, lens)
        digits = FiniteScalarQuantiser.to_digits(tokens)
        logits = self.unit_head(digits, length_mask(token_lens, tokens.shape[1]))
        return tokens, token_lens, logits.float().log_softmax(-1)

    def tokenise_corpus(self) -> dict[str, np.ndarray]:
        """The arrays of tokens.npz."""
        self.modules.eval()
        count = len(self.corpus.rows)
        size = -(-int(self.corpus.samples.max()) // SAMPLES_PER_TOKEN)
        tokens = np.zeros((len(SHIFTS), count, size), np.int16)
        lens = np.zeros((len(SHIFTS), count), np.int64)
        alignment = np.zeros((count, size), np.int16)
        order = np.argsort(self.corpus.samples)
        for first in range(0, count, ENCODE_BATCH):
            rows = order[first : first + ENCODE_BATCH]
            for i, shift in enumerate(SHIFTS):
                batch, batch_lens, log_probs = self.tokenise(rows, shift)
                tokens[i, rows, : batch.shape[1]] = batch.cpu().numpy()
                lens[i, rows] = batch_lens.cpu().numpy()
                if shift == 0:
                    aligned = align(log_probs, batch_lens, [self.corpus.unit_ids[row] for row in rows])
                    alignment[rows, : batch.shape[1]] = aligned.cpu().numpy()
        return {"tokens": tokens, "lens": lens, "alignment": alignment}

    def unit_error_rate(self, split: str) -> float:
        """Error rate of the units that the unit head predicts from the tokens."""
        rows = self.corpus.indices(split)
        _, lens, log_probs = self.tokenise(rows, 0)
        return label_error_rate(greedy_ctc(log_probs, lens), [self.corpus.unit_ids[row] for row in rows])


def align(log_probs: torch.Tensor, lens: torch.Tensor, targets: list[list[int]]) -> torch.Tensor:
    """Forced alignment by the best CTC path: the unit of each frame. Blanks get the nearest unit.

    Args:
        log_probs: (B, T, V), blank 0.
        lens: (B,).
        targets: B unit sequences.

    Returns:
        int64 (B, T), 0 where the target is empty or beyond the length.
    """
    batch, size, _ = log_probs.shape
    device = log_probs.device
    states = torch.zeros(batch, 2 * max(map(len, targets)) + 1, dtype=torch.int64, device=device)
    for row, target in zip(states, targets, strict=True):
        row[1 : 2 * len(target) : 2] = torch.tensor(target, device=device)
    last = torch.tensor([2 * len(target) for target in targets], device=device)
    emission = log_probs.gather(2, states[:, None].expand(-1, size, -1))
    skip = torch.zeros_like(states, dtype=torch.bool)
    skip[:, 3::2] = states[:, 3::2] != states[:, 1:-2:2]
    score = torch.full(states.shape, -1e9, device=device)
    score[:, :2] = emission[:, 0, :2]
    steps = []
    for t in range(1, size):
        one = nn.functional.pad(score, (1, 0), value=-1e9)[:, :-1]
        two = nn.functional.pad(score, (2, 0), value=-1e9)[:, :-2].masked_fill(~skip, -1e9)
        best, step = torch.stack([score, one, two]).max(0)
        inside = (t < lens)[:, None]
        score = torch.where(inside, best + emission[:, t], score)
        steps.append(torch.where(inside, step, 0))
    ends = torch.stack([score.gather(1, last[:, None])[:, 0], score.gather(1, (last - 1).clamp(min=0)[:, None])[:, 0]])
    state = last - ends.argmax(0) * (last > 0)
    path = [state]
    for step in reversed(steps):
        state = state - step.gather(1, state[:, None])[:, 0]
        path.append(state)
    return nearest_unit(states.gather(1, torch.stack(path[::-1], 1)), lens)


def nearest_unit(labels: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
    """Replace blanks (0) in labels (B, T) within ``lens`` by the nearest label; in a tie, by the earlier one."""
    size = labels.shape[1]
    position = torch.arange(size, device=labels.device)
    is_unit = (labels > 0) & (position < lens[:, None])
    far = 10 * size
    before = torch.where(is_unit, position, -far).cummax(1).values
    after = torch.where(is_unit, position, far).flip(1).cummin(1).values.flip(1)
    source = torch.where(position - before <= after - position, before, after).clamp(0, size - 1)
    return labels.gather(1, source) * (position < lens[:, None])


def main(argv=None):
    args = get_args(argv)
    settings = PRESETS[args.preset]
    torch.manual_seed(settings.seed)
    corpus = Corpus(args.work_dir, args.device, settings.max_utterance_s)
    trainer = TokenizerTrainer(corpus, settings, args.device)
    writer = summary_writer(args.work_dir, "tokenizer")
    trainer.train(writer)
    round_to_half(trainer.tokenizer)
    with torch.backends.cudnn.flags(allow_tf32=False):
        result = trainer.tokenise_corpus()
        for split in ("dev", "test"):
            rate = trainer.unit_error_rate(split)
            writer.add_scalar(f"tokenizer/unit_error_{split}", rate, settings.tokenizer_steps)
            print(f"tokenizer: unit error rate on {split} {rate:.4f}")
    valid = np.arange(result["tokens"].shape[2]) < result["lens"][0][:, None]
    used = len(np.unique(result["tokens"][0][valid]))
    print(f"tokenizer: {used} of {NUM_SPEECH_TOKENS} token ids occur among the corpus's {valid.sum()} tokens")
    np.savez(args.work_dir / "tokens.part.npz", **result)
    (args.work_dir / "tokens.part.npz").replace(args.work_dir / "tokens.npz")
    state = {"tokenizer": trainer.tokenizer.state_dict(), "decoder": trainer.decoder.state_dict()}
    torch.save(state, args.work_dir / "tokenizer.pt")


if __name__ == "__main__":
    main()
