"""Checks of single rows against both models, before anything runs; knows tokenizers and context windows, no weights."""

from __future__ import annotations

from typing import Any

from midlogit.errors import InvalidRequest
from midlogit.jobs.inputs import Row, require_reading, with_overrides
from midlogit.jobs.schema import prompt_columns
from midlogit.models.mixing import Mixing
from midlogit.params import SamplingParams
from midlogit.requests.prompts import Reader, Reading, readers, require_variables_used

SURELY_FITS = 0.25  # share of the context window in bytes of text below which a prompt is not tokenized to check it


class Checks:
    """Checks of single rows against both models.

    Raises:
        InvalidRequest: the servers do not list as many candidates as are to be reported.
    """

    def __init__(self, mixing: Mixing, params: SamplingParams, reading: Reading) -> None:
        mixing.require_listed(params.top_logprobs)
        self._mixing = mixing
        self._params, self._reading = params, reading
        self._readers = readers((mixing.base, mixing.teacher), reading, min_new_tokens=1)
        self._fits = SURELY_FITS * min(mixing.base.max_context, mixing.teacher.max_context)

    def params(self, row: Row) -> SamplingParams:
        """The sampling parameters of a row."""
        return with_overrides(self._params, row.overrides)

    def samples(self, row: Row) -> int:
        """The number of completions of a row; the job's own n where the row's parameters are wrong."""
        try:
            return self.params(row).n
        except InvalidRequest:
            return self._params.n

    def error(self, row: Row) -> str | None:
        """Why a row cannot be honoured; None where it can, as far as that is known before it runs."""
        if row.error is not None:
            return row.error
        try:
            self._mixing.outcomes(self.params(row))
            require_reading(self._reading, row.overrides)
            base_prompt = row.prompt if row.base_prompt is None else row.base_prompt
            for reader, prompt in zip(self._readers, (base_prompt, row.prompt), strict=True):
                self._require_honourable(reader, prompt)
        except InvalidRequest as error:
            return str(error)
        return None

    def uses_template(self, row: Row) -> bool:
        """Whether a prompt of the row goes through a chat template that gets variables."""
        prompts = (row.prompt if row.base_prompt is None else row.base_prompt, row.prompt)
        return any(
            bool(reader.variables) and prompt is not None and reader.uses_template(prompt)
            for reader, prompt in zip(self._readers, prompts, strict=True)
        )

    def require_variables_used(self, *, used: bool) -> None:
        """Refuses template variables that no row uses."""
        require_variables_used(self._readers, used=used)

    def _require_honourable(self, reader: Reader, prompt: Any) -> None:
        """Reads a prompt that might not fit; of others only the form is checked."""
        text, _ = prompt_columns(prompt)
        if text is not None and len(text.encode("utf-8", "surrogatepass")) <= self._fits:
            reader.require_form(prompt)
        else:
            reader.read(prompt, None)
