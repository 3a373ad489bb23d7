# Hooks with which a run that was killed goes on as if it had not been. mmengine refuses a key that two
# bases have, and mmdet's have default_hooks: who inherits this sets default_hooks to it.
resumable_hooks = dict(
    checkpoint=dict(type='WholeCheckpointHook'), sampler_seed=dict(type='EpochSeedHook')
)
