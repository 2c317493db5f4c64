"""Speech recognition: one module per backend, and ``loading``, which selects the backend of a model folder.

- ``recogniser``: the interface of recognisers.
- ``sensevoice`` and ``paraformer`` use funasr; ``funasr_model`` loads the networks for both.
- ``sherpa`` runs Paraformer and SenseVoice as ONNX models with sherpa-onnx; ``whisper`` uses faster-whisper.
- ``loading``: ``load_asr`` returns the recogniser of a folder.

Speech environment only (numpy < 2, funasr). sherpa-onnx and faster-whisper also need requirements-asr.txt. No module
downloads models.
"""
