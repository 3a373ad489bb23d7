"""Which tests need a newer torch than the oldest that is accepted, and what of it.

(2, 3) stands for what torch 2.2 lacks where no version between it and 2.7 was tried.
"""

from typing import Optional

from torch.torch_version import TorchVersion

COMPILED = 'torch.compile and torch.export follow functions that torch.overrides wraps'
COUNTED = "torch's FlopCounterMode sees operators of others"
EXPORTED = 'torch.onnx.export writes the operator'
# Least version, what it brings, and the beginnings of the tests' names.
NEEDS = [
    (
        (2, 4),
        'torch.library.opcheck',
        [
            'tests/ops/test_torch_library.py::test_opcheck',
            'tests/ops/test_torch_library.py::test_backward_writes_where_it_is_told_to',
        ],
    ),
    (
        (2, 4),
        'torch.library.register_fake',
        [
            'tests/environment/test_doctor.py::test_an_operator_that_cannot_be_used_is_a_problem[break_it0',
        ],
    ),
    (
        (2, 6),
        'torch.export.Dim.AUTO',
        ['tests/layers/test_local_self_attention.py::test_stride_by_queries_exports_for_any_size'],
    ),
    (
        (2, 5),
        'torch.nn.attention.flex_attention',
        ['tests/benchmarks/test_attention_gpu.py::test_flex_attention_computes_the_same'],
    ),
    (
        (2, 3),
        COMPILED,
        [
            'tests/ops/test_torch_library.py::test_compiles_as_one_graph',
            'tests/ops/test_torch_library.py::test_exports',
            'tests/ops/test_cuda_host.py::test_compiles_as_an_operator',
            'tests/export/test_fuse.py::test_a_program_of_it_computes_the_same',
            'tests/layers/test_local_self_attention.py::test_stride_by_queries_compiles_as_one_graph',
        ],
    ),
    (
        (2, 3),
        COUNTED,
        [
            'tests/ops/test_torch_library.py::test_flops_of_the_formula',
            'tests/ops/test_torch_library.py::test_flops_of_the_backward_are_counted',
            'tests/ops/test_cuda_host.py::test_counts_flops',
            'tests/ops/test_flop_counters.py::test_a_counter[torch]',
            'tests/ops/test_flop_counters.py::test_counters_agree_on_the_options',
            'tests/ops/backends/test_triton_import.py::test_flops_are_counted_however_late',
            'tests/layers/test_local_self_attention.py::test_stride_by_queries_keeps_each_strides_pixel',
            'tests/layers/test_local_self_attention.py::test_a_constant_query_is_counted',
            'tests/layers/test_projected_attention.py::test_flops_of_a_layer_are_counted',
            'tests/layers/test_projected_attention.py::test_flops_of_a_layer_with_a_stride_are_counted',
            'tests/test_import.py::test_looking_for_a_module_does_not_count_as_importing_it',
        ],
    ),
    (
        (2, 3),
        'is_grads_batched=True takes operators that write into a given map',
        ['tests/ops/test_autograd.py::test_gradients_of_many_outputs_at_once'],
    ),
    (
        (2, 3),
        'the fused optimizers run on the CPU',
        ['tests/engine/hooks/test_gpu_hook.py::test_a_run_resumes_in_the_other_layout'],
    ),
    (
        (2, 3),
        'autocast on the CPU takes float16',
        ['tests/tools/test_reliability.py::test_it_holds[precision.py'],
    ),
    (
        (2, 6),
        'weights_only=True reports the types that it refuses',
        [
            'sasa_det/checkpoints/types.py',
            'tests/cli/test_predict.py::TestErrorsOfTheOutsideWorld::test_a_checkpoint_that_is_none',
            'tests/test_import.py::test_importing_replaces_nothing_of_others',
        ],
    ),
    (
        (2, 7),
        'no library of it is built for the older interface of C++',
        ['tests/models/test_cuda_dry_run.py::'],
    ),
    (
        (2, 7),
        'a Triton that interprets our kernels',
        ['tests/benchmarks/test_gpu_run.py::test_rehearsal'],
    ),
    (
        (2, 9),
        EXPORTED,
        [
            'tests/export/test_attention.py::',
            'tests/export/test_native_operator.py::',
            'tests/export/test_programs.py::',
            'tests/export/test_to_onnx.py::',
            'tests/test_documents.py::test_its_configs_and_commands_run[docs/export.md]',
            'tests/test_documents.py::test_its_configs_and_commands_run[docs/notebook.md]',
            'tests/test_documents.py::test_its_configs_and_commands_run[docs/performance.md]',
        ],
    ),
]


def why_not(test: str, version: TorchVersion) -> Optional[str]:
    """Say why a test is skipped with a version of torch; None if it is run.

    Args:
        test: pytest's name of it.
        version: As torch gives it.

    Examples:
        >>> why_not('tests/export/test_programs.py::test_any', TorchVersion('2.2.2+cu121'))
        'needs torch 2.9: torch.onnx.export writes the operator'
        >>> why_not('tests/export/test_programs.py::test_any', TorchVersion('2.13.0'))
    """
    for least, what, names in NEEDS:
        if version < least and test.startswith(tuple(names)):
            return f'needs torch {".".join(map(str, least))}: {what}'
    return None
