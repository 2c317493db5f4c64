"""The CPU as a veRL platform. ``VERL_USE_EXTERNAL_MODULES`` loads this module first in every process."""

from contextlib import contextmanager

import torch
import verl

from tts_grpo.training.verl_version import require_verl

require_verl(verl.__version__)

from verl.plugin.platform import PlatformBase, PlatformRegistry  # noqa: E402  # after the version check

# veRL calls these functions of its device module, but torch.cpu lacks them.
for _name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
    if not hasattr(torch.cpu, _name):
        setattr(torch.cpu, _name, lambda *args, **kwargs: 0)
for _name in ("empty_cache", "manual_seed", "manual_seed_all"):
    if not hasattr(torch.cpu, _name):
        setattr(torch.cpu, _name, lambda *args, **kwargs: None)
torch.cpu.get_rng_state, torch.cpu.set_rng_state = torch.get_rng_state, torch.set_rng_state


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """One CPU, used by one worker."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = torch.cpu

    def is_available(self):
        return True

    def current_device(self):
        return torch.device("cpu")  # veRL passes it to Tensor.to(...) and to FSDP

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    def manual_seed_all(self, seed):
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self):
        return "GPU"  # a nominal resource: ray.init(num_gpus=1) on a machine without GPUs

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    @contextmanager
    def nvtx_range(self, msg):
        yield

    def profiler_start(self):
        pass

    def profiler_stop(self):
        pass

    def cudart(self):
        return None
