"""Networks that measure speech quality: one module per kind of metric; ``metrics`` runs all of them on one recording.

Speech environment only. The metrics are declared in ``tts_grpo.speech.quality``.
"""
