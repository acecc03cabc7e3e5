"""Options that several commands share: their types, names and help texts; knows no command."""

from __future__ import annotations

from typing import Annotated

import typer

Base = Annotated[
    str | None,
    typer.Option(help="Base model: a Hugging Face folder or hub id, or the URL of a vLLM server."),
]
Teacher = Annotated[
    str | None,
    typer.Option(
        help="Teacher model: a Hugging Face folder or hub id, or the URL of a vLLM server."
    ),
]
TopK = Annotated[
    str, typer.Option(help="Servers: log-probabilities to ask of each; auto widens where needed.")
]
BaseModel = Annotated[
    str | None, typer.Option(help="Servers: the name that the base is served by.")
]
TeacherModel = Annotated[
    str | None, typer.Option(help="Servers: the name that the teacher is served by.")
]
BaseTokenizer = Annotated[
    str | None, typer.Option(help="Servers: folder or hub id of the base's tokenizer files.")
]
TeacherTokenizer = Annotated[
    str | None, typer.Option(help="Servers: folder or hub id of the teacher's tokenizer files.")
]
BaseKey = Annotated[
    str | None, typer.Option(help="Servers: API key of the base, else MIDLOGIT_BASE_API_KEY.")
]
TeacherKey = Annotated[
    str | None, typer.Option(help="Servers: API key of the teacher, else MIDLOGIT_TEACHER_API_KEY.")
]
BaseTemplate = Annotated[
    str | None, typer.Option(help="Which of the base's named chat templates to use.")
]
TeacherTemplate = Annotated[
    str | None, typer.Option(help="Which of the teacher's named chat templates to use.")
]
TemplateKwargs = Annotated[
    str | None,
    typer.Option(
        help="Variables of the chat templates, a JSON object: '{\"enable_thinking\": false}'."
    ),
]
BaseTemplateKwargs = Annotated[
    str | None, typer.Option(help="The same for the base alone, in their place.")
]
Engine = Annotated[
    str,
    typer.Option(
        help="For models in this process: local (transformers), vllm, or auto: vllm where it is installed and there "
        "is a GPU, else local."
    ),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(
        help="Most sequences that run at once; by default 16, with --engine vllm or servers 256."
    ),
]
Memory = Annotated[
    float, typer.Option(help="vLLM: share of the GPU for both models and their caches.")
]
EngineArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--engine-arg",
        metavar="NAME=VALUE",
        help="vLLM: an option of its EngineArgs for both models; the value is JSON or text. May be repeated.",
    ),
]
BaseLora = Annotated[
    str | None, typer.Option(help="vLLM: folder of a LoRA adapter (PEFT) on the base.")
]
TeacherLora = Annotated[
    str | None, typer.Option(help="vLLM: folder of a LoRA adapter (PEFT) on the teacher.")
]
BaseArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--base-arg", metavar="NAME=VALUE", help="The same for the base alone, in their place."
    ),
]
TeacherArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--teacher-arg",
        metavar="NAME=VALUE",
        help="The same for the teacher alone, in their place.",
    ),
]
Quantization = Annotated[
    str | None,
    typer.Option(help="vLLM: how weights are quantised; by default as their folders say."),
]
CacheDtype = Annotated[str | None, typer.Option(help="vLLM: of the KV caches, such as fp8.")]
Eager = Annotated[
    bool | None,
    typer.Option("--enforce-eager", help="vLLM: no CUDA graphs; starts sooner, runs slower."),
]
LoadFormat = Annotated[str | None, typer.Option(help="vLLM: of the files of weights.")]
Revision = Annotated[str | None, typer.Option(help="vLLM: branch, tag or commit of the hub ids.")]
BatchedTokens = Annotated[
    int | None, typer.Option(help="vLLM: most tokens that a step computes of each model.")
]
PrefixCaching = Annotated[
    bool | None, typer.Option(help="vLLM: share the beginnings of prompts; by default on.")
]
Context = Annotated[int | None, typer.Option(help="vLLM: most tokens of prompt and completion.")]
TensorParallel = Annotated[
    int | None, typer.Option(help="vLLM: how many GPUs share each of the two models, by default 1.")
]
Speculation = Annotated[
    str,
    typer.Option(
        help="Tokens that the base drafts ahead: auto, off or 0 to 16; changes the speed, not the distribution."
    ),
]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda or cuda:N; or BASE,TEACHER for one each.")
]
Dtype = Annotated[
    str,
    typer.Option(help="auto (float32 on the CPU, else bfloat16), float32, bfloat16 or float16."),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with a model; without it such a model is refused.",
    ),
]
Seed = Annotated[
    int | None, typer.Option(help="The same prompt with the same seed draws the same tokens.")
]
PresetName = Annotated[str, typer.Option(help="conservative, balanced, exploratory or rollout.")]
AlphaRuleName = Annotated[
    str | None,
    typer.Option(
        help="equal-kl, fixed:ALPHA or kl-budget:NATS; by default equal-kl, or the preset's budget."
    ),
]
StopIdName = Annotated[
    str | None,
    typer.Option(help="Whose stop id ends a completion, teacher or base; by default the preset's."),
]
Temperature = Annotated[
    float, typer.Option(help="Temperature of both models; 0 takes the most likely token of q*.")
]
MaxTokens = Annotated[int, typer.Option(help="Most tokens of a completion.")]
