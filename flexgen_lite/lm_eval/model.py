"""The model `flexgen_lite` for the Language Model Evaluation Harness, version 0.4.9 and later.

Prompts are cut into tokens as the harness' own `hf` model does it, so that both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import AutoTokenizer

from flexgen_lite.client import Client
from flexgen_lite.job import Job
from flexgen_lite.llm import FlexGenLite
from flexgen_lite.request import Request
from flexgen_lite.sampling_params import SamplingParams
from flexgen_lite.scoring import SCORED, score_of

MAX_GEN_TOKENS = 256
_MAX_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty", "seed")


@register_model("flexgen_lite")
class FlexGenLiteLM(TemplateLM):
    """
    Args:
        pretrained: model directory or hub id.
        endpoint: of a running engine that serves it; without one an engine is started.
        max_length: most tokens of a sequence, for an engine that is started.
        max_gen_toks: most tokens to generate where a task does not say.
        add_bos_token: put the beginning of sequence in front of each prompt; by default the tokenizer decides.
        batch_size, max_batch_size, device: of the harness; the engine makes up its passes itself. A device other than
            the harness' default goes to the engine that is started.
        key_file: of the running engine, or the one that is started.
        options: any key of EngineConfig, for an engine that is started.

    Raises:
        ValueError: `endpoint` is given, and something that only an engine that is started could be told.
    """

    def __init__(
        self,
        pretrained: str,
        endpoint: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKENS,
        add_bos_token: bool | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        key_file: str | None = None,
        **options: Any,
    ) -> None:
        for_engine = {**({} if max_length is None else {"max_length": max_length}), **options}
        if endpoint is not None and for_engine:
            named = ", ".join(f"{key}={value}" for key, value in for_engine.items())
            raise ValueError(f"{named}: the engine at endpoint={endpoint} is configured where it was started")
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(pretrained)
        self._engine: FlexGenLite | None = None
        if endpoint is None:
            limits = {} if max_length is None else {"max_model_len": int(max_length)}
            place = {} if device is None else {"device": device}
            key = {} if key_file is None else {"key_file": key_file}
            self._engine = FlexGenLite(pretrained, **{**limits, **place, **key, **options})
            endpoint = self._engine.endpoint
        self._client = Client(endpoint, key_file=key_file)
        self._add_bos_token = add_bos_token
        self.max_length = self._client.welcome.max_length
        self.max_gen_toks = int(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            begun = string.startswith(self.tokenizer.decode([self.prefix_token_id]))
            add_special_tokens = False if begun else self._add_bos_token
        chosen = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **chosen)
        return ids

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        asked = []
        for text, context, continuation in requests:
            if not continuation:
                raise ValueError(f"a continuation has no token of its own after its context: {text!r}")
            tokens = (context + continuation)[-(self.max_length + 1) :]
            asked.append(Request(tokens, SCORED, scored_from=max(1, len(tokens) - len(continuation))))
        job = self._client.submit_requests(asked, len(asked))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(asked)
        for completion in _shown(job, "scoring", disable_tqdm):
            score = score_of(completion)
            found[completion.index] = score.logprob, score.is_greedy
            text = requests[completion.index][0]
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, found[completion.index])
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            own = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            begun = len(windows)
            windows += [(None, *make_disjoint_window(window)) for window in own]
            counts.append(len(windows) - begun)
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum(next(scores)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked, stops = [], []
        end = self.tokenizer.decode([self.eot_token_id])
        for context, options in (request.args for request in requests):
            params, stop = self._params(dict(options), end)
            tokens = self.tok_encode(context)[-(self.max_length - params.max_tokens) :]
            asked.append(Request(tokens, params))
            stops.append(stop)
        job = self._client.submit_requests(asked, len(asked))
        texts = [""] * len(asked)
        for completion in _shown(job, "generating", disable_tqdm):
            if completion.error is not None:
                raise ValueError(f"request {completion.index}: {completion.error}")
            index = completion.index
            texts[index] = completion.text
            for stop in stops[index]:
                texts[index] = texts[index].split(stop)[0]
            self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        return texts

    def _params(self, options: dict[str, Any], end: str) -> tuple[SamplingParams, list[str]]:
        """What a task's generation arguments ask for, and the strings that end its texts.

        Raises:
            ValueError: they leave no room for a prompt.
        """
        given = options.get("until") or []
        stop = [text for text in ([given] if isinstance(given, str) else given) if text]
        limits = [options[name] for name in _MAX_TOKENS_NAMES if options.get(name) is not None]
        max_tokens = int(limits[0]) if limits else self.max_gen_toks
        if max_tokens >= self.max_length:
            raise ValueError(
                f"{max_tokens} tokens to generate leave no room for a prompt: a sequence has {self.max_length} at most"
            )
        temperature = float(options.get("temperature") or 0.0) if options.get("do_sample", True) else 0.0
        chosen = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, stop=[text for text in stop if text != end], **chosen
        )
        return params, [*stop, end]


def _shown(job: Job, what: str, disable: bool) -> Any:
    """The job's completions as they come, with a progress bar; the job ends where its reader does."""
    try:
        yield from tqdm(job, desc=what, total=len(job), disable=disable)
    finally:
        job.cancel()
