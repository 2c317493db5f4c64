"""CosyVoice2's decoder.

- ``token2wav``: its flow and vocoder in batches, with the results of single utterances.
- ``packed_flow`` and ``kernels``: the flow on packed utterances in half precision, and the Triton kernels of both.
- ``random_weights``: model folders of its layout with random weights, for tests and benchmarks.

Speech environment only.
"""
