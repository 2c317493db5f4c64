"""Train the tiny text-to-speech-token language model, a Qwen2; writes lm_1, lm_2, ... as Hugging Face folders.

Embeddings are shared by the pronunciation of characters and by the FSQ digits of speech tokens (FeatureSumEmbedding),
so that similar ids learn from each other. A head that is used only in training predicts the initial or final at each
position. Some input tokens are corrupted, because at inference the model's own history contains errors, too. export.py
chooses the checkpoint by the error rate of sampled speech, since the lowest cross-entropy does not predict it.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers
from torch import nn
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from tiny_stack.data import SHIFTS, Corpus
from tiny_stack.pronunciation import FeatureSumEmbedding, pronunciation_features, reading
from tiny_stack.settings import PRESETS, add_common_args, summary_writer
from tiny_stack.train import TrainingLog, WeightAverage, autocast, cosine, set_lr
from tts_grpo.speech.tiny.codec import DIMENSIONS, LEVELS
from tts_grpo.text.prompts import (
    GENERATION_END,
    GENERATION_START,
    IM_END,
    IM_START,
    INSTRUCTION,
    LLASA_CHAT_TEMPLATE,
    render_prompt,
)
from tts_grpo.text.tokens import NUM_SPEECH_TOKENS, speech_token_str

PAD = "<|endoftext|>"
PUNCTUATION = "，。！？、；：“”‘’（）《》…—"
DIGIT_CHARACTERS = dict(zip("0123456789", "零一二三四五六七八九", strict=True))
NUM_JOINED, NUM_JOINED_SHARES = (1, 2, 3), (0.6, 0.25, 0.15)  # number of utterances in a sequence, and probabilities
MAX_TOKENS = 400
CORRUPTED_SHARES = (0.0, 0.1, 0.25)  # fractions of corrupted input tokens; one is drawn per sequence
DROPOUT = 0.1
FIRST_CHECKPOINT = 0.6  # fraction of the steps before the first checkpoint


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_args(parser)
    return parser.parse_args(argv)


def common_characters() -> list[str]:
    """The 3,755 characters of level 1 of GB 2312, the most common simplified characters."""
    codes = (bytes([high, low]) for high in range(0xB0, 0xD8) for low in range(0xA1, 0xFF))
    return [c for c in (code.decode("gb2312", errors="ignore") for code in codes) if c]


def build_tokenizer(corpus: Corpus) -> Qwen2Tokenizer:
    """A tokenizer of characters, bytes, chat tokens and, with the last ids, ``<|s_0|>``..``<|s_6560|>``.

    It has to be a Qwen2 tokenizer, since ``AutoTokenizer`` makes one for every Qwen2 model, whatever the folder says.
    Its merges never go beyond one character: a known character is one token, any other falls back to bytes.
    """
    han = {c for row in corpus.rows if row["split"] == "train" for c in row["text"] if reading(c)}
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    as_bytes = [to_bytes.pre_tokenize_str(c)[0][0] for c in sorted(han | set(common_characters()) | set(PUNCTUATION))]
    pieces = {text[:length] for text in as_bytes for length in range(2, len(text) + 1)}
    pieces = sorted(pieces, key=lambda piece: (len(piece), piece))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate([*alphabet, *pieces])},
        merges=[(piece[:-1], piece[-1]) for piece in pieces], unk_token=PAD, pad_token=PAD, eos_token=GENERATION_END,
        padding_side="left", additional_special_tokens=[IM_START, IM_END, GENERATION_START],
    )  # fmt: skip
    tokenizer.add_tokens(["user", "assistant", INSTRUCTION.strip()])
    tokenizer.add_tokens([speech_token_str(i) for i in range(NUM_SPEECH_TOKENS)])
    tokenizer.chat_template = LLASA_CHAT_TEMPLATE
    return tokenizer


def row_features(tokenizer) -> tuple[list[list[str]], torch.Tensor]:
    """For each id, the features of its vector and the initial standard deviation of its own vector."""
    features = [[] for _ in range(len(tokenizer))]
    own_std = torch.full((len(tokenizer),), 0.05)
    for i in range(len(tokenizer)):
        text = tokenizer.decode([i])
        syllable = reading(DIGIT_CHARACTERS.get(text, text)) if len(text) == 1 else None
        if syllable:
            features[i], own_std[i] = pronunciation_features(syllable), 0.0
    first = tokenizer.convert_tokens_to_ids(speech_token_str(0))
    for token in range(NUM_SPEECH_TOKENS):
        digits = [(token // LEVELS**d) % LEVELS for d in range(DIMENSIONS)]
        features[first + token] = [f"digit {d}={digit}" for d, digit in enumerate(digits)]
        own_std[first + token] = 0.005
    return features, own_std


class TrainingSequences:
    """Training sequences: a prompt, the speech tokens of one to three sentences, and the end token."""

    def __init__(self, corpus: Corpus, tokens: dict[str, np.ndarray], tokenizer, seed: int):
        self.corpus, self.tokenizer = corpus, tokenizer
        self.tokens, self.lens = tokens["tokens"].astype(np.int64), tokens["lens"]
        self.alignment = tokens["alignment"].astype(np.int64)
        self.rng = np.random.default_rng(seed)
        self.rows = corpus.indices("train")
        self.first_speech_id = tokenizer.convert_tokens_to_ids(speech_token_str(0))
        self.powers = LEVELS ** np.arange(DIMENSIONS)

    def joined_text(self, rows: list[int]) -> str:
        """Concatenated texts of rows, some with punctuation removed from or added to their ends."""
        texts = []
        for row in rows:
            text = self.corpus.rows[row]["text"]
            if self.rng.random() < 0.3:
                text = text.rstrip("。")
            elif text[-1] not in "。！？" and self.rng.random() < 0.4:
                text += "，" if len(texts) < len(rows) - 1 else "。"
            texts.append(text)
        return "".join(texts)

    def corrupt(self, tokens: np.ndarray) -> np.ndarray:
        """Replace some FSQ digits of some tokens by random ones."""
        corrupted = self.rng.random(len(tokens)) < self.rng.choice(CORRUPTED_SHARES)
        digits = (tokens[:, None] // self.powers) % LEVELS
        redrawn = corrupted[:, None] & (self.rng.random(digits.shape) < 0.4)
        return (np.where(redrawn, self.rng.integers(0, LEVELS, digits.shape), digits) * self.powers).sum(1)

    def sequence(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Input ids, labels (the next ids; -100 before the speech) and units of a sequence that begins with ``row``."""
        count = self.rng.choice(NUM_JOINED, p=NUM_JOINED_SHARES)
        rows, shift = [row, *self.rng.choice(self.rows, count - 1)], self.rng.integers(0, len(SHIFTS))
        while len(rows) > 1 and sum(self.lens[shift, r] for r in rows) > MAX_TOKENS:
            rows.pop()
        speech = np.concatenate([self.tokens[shift, r, : self.lens[shift, r]] for r in rows])
        units = np.concatenate([self.alignment[r, : self.lens[shift, r]] for r in rows])
        prompt = render_prompt(self.tokenizer, self.joined_text(rows))
        prompt = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ignored = np.full(len(prompt) - 1, -100)
        inputs = np.concatenate([prompt, self.corrupt(speech) + self.first_speech_id])
        labels = np.concatenate([ignored, speech + self.first_speech_id, [self.tokenizer.eos_token_id]])
        return inputs, labels, np.concatenate([ignored, units, [-100]])

    def batch(self, size: int) -> tuple[torch.Tensor, ...]:
        """Input ids, labels and units (B, T), padded on the right."""
        sequences = [self.sequence(row) for row in self.rng.choice(self.rows, size)]
        longest = -(-max(len(s[0]) for s in sequences) // 16) * 16
        padded = (np.full((3, size, longest), -100)).astype(np.int64)
        padded[0] = self.tokenizer.pad_token_id
        for i, sequence in enumerate(sequences):
            for array, values in zip(padded, sequence, strict=True):
                array[i, : len(values)] = values
        return tuple(torch.from_numpy(array) for array in padded)


class BatchStream(torch.utils.data.IterableDataset):
    """Endless batches, prepared in worker processes so that the GPU does not wait for them."""

    def __init__(self, sequences: TrainingSequences, size: int, seed: int):
        self.sequences, self.size, self.seed = sequences, size, seed

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        self.sequences.rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        while True:
            yield self.sequences.batch(self.size)


class LanguageModelTrainer:
    """Trains the model; its embedding is a sum of feature vectors and is tied to the output layer."""

    def __init__(self, tokenizer, num_units: int, settings, device: str):
        self.tokenizer, self.settings, self.device = tokenizer, settings, device
        self.config = Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=settings.lm_hidden, intermediate_size=settings.lm_intermediate,
            num_hidden_layers=settings.lm_layers, num_attention_heads=settings.lm_hidden // 64, num_key_value_heads=1,
            max_position_embeddings=2048, tie_word_embeddings=True, attention_dropout=0.0, bos_token_id=None,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        self.model = Qwen2ForCausalLM(self.config).to(device)
        self.model.generation_config = GenerationConfig(
            do_sample=True, temperature=1.0, top_p=1.0, top_k=0, pad_token_id=tokenizer.pad_token_id,
            eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(IM_END)],
        )  # fmt: skip
        self.embedding = FeatureSumEmbedding(*self._embedding_arguments()).to(device)
        self.unit_head = nn.Linear(settings.lm_hidden, num_units + 1).to(device)
        for layer in self.model.model.layers:
            layer.mlp.register_forward_hook(self._dropout)
            layer.self_attn.register_forward_hook(self._dropout)

    def _embedding_arguments(self):
        features, own_std = row_features(self.tokenizer)
        return features, self.settings.lm_hidden, own_std

    @staticmethod
    def _dropout(module, inputs, output):
        if isinstance(output, tuple):
            return (F.dropout(output[0], DROPOUT, module.training), *output[1:])
        return F.dropout(output, DROPOUT, module.training)

    def losses(self, batch: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        inputs, labels, units = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        matrix = self.embedding()
        with autocast(self.device):
            embedded = F.dropout(F.embedding(inputs, matrix), DROPOUT, self.model.training)
            hidden = self.model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
            is_speech = labels != -100
            hidden = hidden[is_speech]
            logits, unit_logits = hidden @ matrix.T, self.unit_head(hidden)
        return {
            "token": F.cross_entropy(logits.float(), labels[is_speech]),
            "unit": F.cross_entropy(unit_logits.float(), units[is_speech]),
        }

    def train(self, sequences: TrainingSequences, writer, work_dir: Path) -> None:
        settings, steps = self.settings, self.settings.lm_steps
        body = [p for name, p in self.model.named_parameters() if "embed_tokens" not in name]
        body += [self.embedding.features, *self.unit_head.parameters()]
        groups = [{"params": body, "weight_decay": 0.05}, {"params": [self.embedding.own], "weight_decay": 0.5}]
        parameters = [p for group in groups for p in group["params"]]
        average = WeightAverage(parameters)
        optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=self.device == "cuda")
        workers = 4 if self.device == "cuda" else 0
        stream = BatchStream(sequences, settings.lm_batch, settings.seed + 3)
        loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers, pin_memory=workers > 0)
        batches = iter(loader)
        checkpoints = np.linspace(FIRST_CHECKPOINT * steps, steps, settings.lm_checkpoints).round().astype(int).tolist()
        log = TrainingLog(writer, "lm", steps)
        for step in range(1, steps + 1):
            losses = self.losses(next(batches))
            (losses["token"] + 0.5 * losses["unit"]).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            set_lr(optimiser, settings.lm_lr * cosine(step, steps, warmup=400))
            optimiser.step()
            optimiser.zero_grad()
            average.update()
            if log.due(step):
                log.write(step, losses)
            if step in checkpoints:
                with average.applied():
                    self.save(work_dir / f"lm_{checkpoints.index(step) + 1}")

    def save(self, folder: Path) -> None:
        """Save the weights in half precision, with tokenizer and generation config."""
        model = Qwen2ForCausalLM(self.config)
        state = self.model.state_dict() | {"model.embed_tokens.weight": self.embedding().detach()}
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state)
        model.generation_config = self.model.generation_config
        model.half().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def main(argv=None):
    args = get_args(argv)
    settings = PRESETS[args.preset]
    torch.manual_seed(settings.seed + 3)
    corpus = Corpus(args.work_dir, "cpu", settings.max_utterance_s)
    tokenizer = build_tokenizer(corpus)
    sequences = TrainingSequences(corpus, dict(np.load(args.work_dir / "tokens.npz")), tokenizer, settings.seed + 3)
    trainer = LanguageModelTrainer(tokenizer, len(corpus.unit_names), settings, args.device)
    size = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    print(f"lm: {size:.2f} M parameters, vocabulary {len(tokenizer)}")
    trainer.train(sequences, summary_writer(args.work_dir, "lm"), args.work_dir)


if __name__ == "__main__":
    main()
