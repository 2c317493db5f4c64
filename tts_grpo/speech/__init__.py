"""Speech generation, decoding, recognition and quality metrics.

- ``generation``: sample speech tokens from a language model; ``head_bias``: the bias of the official model's LM head.
- ``synthesis``: from texts to waveforms with both, as in the evaluation.
- ``decoder``: the interface of token2wav decoders; ``cosyvoice2``, ``cosyvoice3`` and ``tiny`` implement it;
  ``token2wav`` loads the decoder of a model folder; ``voices``: prompt voices.
- ``asr``: recognisers, one module per backend.
- ``quality``: speech-quality metrics that error rates miss; ``nets``: the networks for some of them.
- ``audio``: audio files and sample rates; ``model_folders``: the files of model folders; ``distributed``: torchrun.

Runs in the speech environment (numpy < 2, funasr); ``generation``, ``head_bias`` and ``model_folders`` run in the
trainer environment, too. Imports ``text``.
"""
