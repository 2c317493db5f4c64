"""CosyVoice3's decoder.

- ``token2wav``: its flow and vocoder in batches, with the same results as for single utterances.
- ``modules``: the networks, with the layer names of the released files; ``config``: sizes in ``cosyvoice3.yaml``.
- ``packed_dit``: the flow's estimator on packed utterances in half precision; ``kernels``: Triton kernels for it.
- ``random_weights``: model folders in its format with random weights, for tests and benchmarks.

Speech environment only. The source of CosyVoice is not needed.
"""
