"""Speech recognition: one module per backend, and ``loading`` to choose by what a model folder holds.

- ``recogniser``: what every recogniser offers.
- ``sensevoice`` and ``paraformer``, through funasr; ``funasr_model`` loads the networks of both.
- ``sherpa``: Paraformer and SenseVoice as ONNX, through sherpa-onnx; ``whisper``, through faster-whisper.
- ``loading``: ``load_asr`` returns the recogniser of a folder.

Speech environment only (numpy < 2, funasr); the last two backends need requirements-asr.txt too. Nothing is downloaded.
"""
