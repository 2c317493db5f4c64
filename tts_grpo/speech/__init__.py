"""Speech: made from text by a language model, decoded from speech tokens, recognised and measured.

- ``generation``: speech tokens sampled from a language model; ``head_bias``: the bias of the official model's head.
- ``synthesis``: texts to waveforms with both, as in the evaluation.
- ``decoder``: what every token2wav decoder offers; ``cosyvoice2`` and ``tiny`` are the two; ``token2wav`` loads the one
  that a folder holds; ``voices``: prompt voices.
- ``asr``: recognisers, one module per backend.
- ``quality``: speech-quality metrics that error rates miss; ``nets``: the networks that some of them need.
- ``audio``: audio files and sample rates; ``model_folders``: the files of model folders; ``distributed``: torchrun.

Speech environment (numpy < 2, funasr), except ``generation``, ``head_bias`` and ``model_folders``: both. Imports
``text``.
"""
