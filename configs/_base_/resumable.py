# Hooks that let a killed run resume as if it had not been interrupted, that keep what processes exchange in
# the run's folder, and that prepare a model on a GPU. mmengine refuses a key that two bases share, and mmdet's
# bases have default_hooks. So a config that inherits this sets default_hooks to it.
resumable_hooks = dict(
    checkpoint=dict(type='WholeCheckpointHook'),
    sampler_seed=dict(type='EpochSeedHook'),
    collect_dir=dict(type='CollectDirHook'),
    gpu=dict(type='GpuHook'),
)
