"""CosyVoice2's decoder.

- ``token2wav``: runs its flow and vocoder in batches, with the same results as for single utterances.
- ``packed_flow``: the flow on packed utterances in half precision; ``kernels``: Triton kernels for flow and vocoder.
- ``random_weights``: model folders in its format with random weights, for tests and benchmarks.

Speech environment only.
"""
