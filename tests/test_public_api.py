"""What others build on: the exported names, their signatures, the errors' bases, what an import costs."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys

import midlogit
from midlogit import errors
from midlogit.report import make_report

SIGNATURES = {
    "local": "(base: 'str | Path | Module | None' = None, teacher: 'str | Path | Module | None' = None, *, "
    "base_tokenizer: 'Any' = None, teacher_tokenizer: 'Any' = None, "
    "device: 'str | tuple[str, str]' = 'auto', dtype: 'str' = 'auto', max_num_seqs: 'int' = 16, "
    "speculation: 'SpeculationOption' = 'auto', chat_template: 'TemplateNames' = None, "
    "trust_remote_code: 'bool' = False) -> 'Self'",
    "generate": "(self, prompts: 'Sequence[Prompt] | None' = None, params: 'SamplingParams | None' = None, *, "
    "base_prompts: 'Sequence[Prompt] | None' = None, teacher_prompts: 'Sequence[Prompt] | None' = None, "
    "chat: 'bool' = False, chat_template_kwargs: 'TemplateOptions | None' = None, add_special_tokens: 'bool' = True, "
    "request_ids: 'Sequence[str] | None' = None, progress: 'bool | None' = None) -> 'list[Completion]'",
    "stream": "(self, prompt: 'Prompt | None' = None, params: 'SamplingParams | None' = None, *, "
    "base_prompt: 'Prompt | None' = None, teacher_prompt: 'Prompt | None' = None, chat: 'bool' = False, "
    "chat_template_kwargs: 'TemplateOptions | None' = None, add_special_tokens: 'bool' = True) -> 'Iterator[Event]'",
    "statistics": "(self) -> 'dict[str, Any]'",
}
FIELDS = {
    "SamplingParams": (
        "n", "max_tokens", "min_tokens", "temperature", "seed", "stop", "stop_token_ids", "ignore_eos", "top_logprobs",
        "force_first_token", "constraint_to_target", "target_top_p", "exclude_special_tokens", "special_token_ids",
        "merge_stop_ids", "stop_id", "return_support", "alpha_rule", "alpha_tol",
    ),
    "Completion": (
        "index", "sample", "prompt", "base_prompt", "prompt_token_ids", "base_prompt_token_ids", "text", "token_ids",
        "finish_reason", "stop_reason", "usage", "diagnostics", "top", "support", "weight_versions",
        "weights_changed", "error", "error_type",
    ),
    "Diagnostics": (
        "alpha", "kl_base", "kl_teacher", "entropy", "ess_base", "ess_teacher", "ess_ratio", "logprobs",
        "base_logprobs", "teacher_logprobs", "base_tempered_logprobs", "teacher_tempered_logprobs",
        "base_support_logprobs", "teacher_support_logprobs", "base_support_logmass", "teacher_support_logmass",
        "forced", "coverage", "alpha_bound", "tv_bound", "base_bounded", "teacher_bounded", "base_tempered_bound",
        "teacher_tempered_bound",
    ),
    "Rollout": (
        "prompt_token_ids", "teacher_prompt_token_ids", "token_ids", "logprobs", "base_logprobs", "teacher_logprobs",
        "base_support_logprobs", "teacher_support_logprobs", "base_support_logmass", "teacher_support_logmass", "alpha",
        "kl_base", "kl_teacher", "support", "finish_reason", "weight_versions",
        "weights_changed", "text",
    ),
}  # fmt: skip


def test_every_exported_name_is_there() -> None:
    for name in midlogit.__all__:
        assert getattr(midlogit, name).__name__ if name != "PRESETS" else midlogit.PRESETS
    assert set(midlogit.__all__) <= set(dir(midlogit))


def test_signatures_and_fields_stay() -> None:
    for name, signature in SIGNATURES.items():
        assert str(inspect.signature(getattr(midlogit.Pair, name))) == signature
    for name, fields in FIELDS.items():
        assert tuple(inspect.signature(getattr(midlogit, name)).parameters) == fields


def test_the_signature_of_reports_stays() -> None:
    assert str(inspect.signature(make_report)) == (
        "(run: 'str | Path', other: 'str | Path | None' = None, *, deep: 'bool' = False, "
        "tokenizer: 'str | Path | None' = None) -> 'Report'"
    )


def test_presets() -> None:
    table = {p.name: (p.force_first_token, p.target_top_p) for p in midlogit.PRESETS.values()}
    assert table == {
        "conservative": (True, 0.90),
        "balanced": (True, 0.95),
        "exploratory": (False, None),
        "rollout": (False, None),
    }
    assert midlogit.SamplingParams() == midlogit.SamplingParams.preset("balanced")


def test_errors_refine_the_standard_ones_and_pickle() -> None:
    bases = {
        errors.InvalidRequest: ValueError,
        errors.PromptTooLong: ValueError,
        errors.PairMismatch: ValueError,
        errors.WeightMismatch: ValueError,
        errors.ModelUnavailable: OSError,
        errors.MissingExtra: ImportError,
        errors.EngineFailure: RuntimeError,
        errors.Interrupted: KeyboardInterrupt,
    }
    for kind, standard in bases.items():
        assert issubclass(kind, standard)
        if issubclass(kind, errors.MidlogitError):
            again = pickle.loads(pickle.dumps(kind("It broke.", "Mend it.")))
            assert (type(again), str(again), again.hint) == (kind, "It broke. Mend it.", "Mend it.")


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, midlogit; midlogit.SamplingParams(); midlogit.Pair; midlogit.parse_rule('equal-kl')\n"
        "import midlogit.integrations.trl\n"
        "print(sorted({'torch', 'transformers', 'trl', 'vllm'} & sys.modules.keys()))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        == "[]\n"
    )
