# shellcheck shell=bash disable=SC2034,SC2154  # run.sh's variables
# veRL settings for training on a CPU with the plug-in tts_grpo/training/verl_cpu: FSDP2, because FSDP1 fails on a CPU,
# and float32, because bfloat16 is not faster there.
configure_cpu_training() {
  profile_env=(
    VERL_USE_EXTERNAL_MODULES="tts_grpo.training.verl_cpu.platform,tts_grpo.training.trainer" # the platform must be loaded first
    VERL_PLATFORM=cpu
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
    HF_HUB_OFFLINE=1
  )
  profile_verl_args=(
    trainer.device=cpu
    actor_rollout_ref.model.external_lib=tts_grpo.training.verl_cpu.rollout
    actor_rollout_ref.model.use_remove_padding=True
    actor_rollout_ref.model.use_fused_kernels=True
    actor_rollout_ref.model.enable_gradient_checkpointing=False
    +actor_rollout_ref.model.override_config.attn_implementation=varlen
    actor_rollout_ref.actor.strategy=fsdp2
    actor_rollout_ref.actor.use_torch_compile=False
    actor_rollout_ref.actor.fsdp_config.use_torch_compile=False
    actor_rollout_ref.actor.fsdp_config.dtype=float32
    "+actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"
    actor_rollout_ref.ref.fsdp_config.use_torch_compile=False
    actor_rollout_ref.ref.fsdp_config.dtype=float32
    "+actor_rollout_ref.ref.fsdp_config.mixed_precision={param_dtype: fp32, reduce_dtype: fp32, buffer_dtype: fp32}"
    actor_rollout_ref.rollout.name=transformers_cpu
    actor_rollout_ref.rollout.dtype=float32
    actor_rollout_ref.rollout.free_cache_engine=False
    actor_rollout_ref.rollout.agent.num_workers=1
    reward.num_workers=1
    transfer_queue.backend.SimpleStorage.num_data_storage_units=1
    ray_kwargs.ray_init.num_cpus=16           # slots for veRL's actors, which are mostly idle
    +ray_kwargs.ray_init.num_gpus="$num_gpus" # logical GPUs only: each worker requests one
    +ray_kwargs.ray_init.include_dashboard=False
  )
}
