"""Plug-in that runs veRL 0.9.1 on a machine without a GPU, through veRL's registries.

Two things that the registries do not cover are patched, and only on a CPU: ``torch.cpu`` in ``platform``, and veRL's
FSDP engine at the end of ``rollout``.

``platform`` registers the CPU as a training device (``VERL_USE_EXTERNAL_MODULES=tts_grpo.training.verl_cpu.platform``,
``VERL_PLATFORM=cpu``); ``rollout`` generates with Transformers
(``actor_rollout_ref.model.external_lib=tts_grpo.training.verl_cpu.rollout`` and
``actor_rollout_ref.rollout.name=transformers_cpu``).
"""
