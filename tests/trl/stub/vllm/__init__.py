"""The names of vLLM that TRL imports in server mode; nothing here runs a model.

Its one function, `trainer_send_weights`, stands for NCCL where there is none.
"""

__version__ = "0.27.1"


class LLM: ...


class RequestOutput: ...


class SamplingParams: ...
