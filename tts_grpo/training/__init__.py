"""Training on veRL: what this recipe adds to veRL's trainer, and to its workers on GPUs and CPUs.

- ``trainer``: the trainer class, which veRL finds by ``trainer.v1.trainer_mode=tts_grpo``: credit by syllable, the wait
  for rewards as a metric, and no training on a step with a failed rollout. ``VERL_USE_EXTERNAL_MODULES`` imports it.
- ``credit``: advantages of tokens from the errors of each syllable; numpy only.
- ``engine`` and ``verl_vllm``: the actor's FSDP engine, and vLLM's workers, for a model whose head has a bias.
- ``vllm_server``: vLLM's servers, which answer once per rollout.
- ``varlen`` and ``gpu_log_probs``: attention over packs of sequences, and the LM head, on GPUs.
- ``verl_cpu``: platform, engine and rollouts for a machine without a GPU.
- ``verl_log``: metrics in veRL's console log, for display only.
- ``verl_version``: the version of veRL that all of this was written for.

Only programs of the trainer environment import this package. ``credit`` and ``verl_log`` need no veRL, so that tests of
the speech environment can import them too.
"""
