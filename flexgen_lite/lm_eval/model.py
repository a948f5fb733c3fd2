"""The model `flexgen_lite` for the Language Model Evaluation Harness.

Prompts are cut into tokens, and answers cut off, as the harness' own `hf` model does it, so that both give the same
numbers. What `hf` does and the engine does not is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import resolve_max_length
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedTokenizerBase

from flexgen_lite.client.client import Client
from flexgen_lite.client.completion import Completion
from flexgen_lite.client.request import Request
from flexgen_lite.client.scoring import SCORED, score_of
from flexgen_lite.llm import FlexGenLite
from flexgen_lite.lm_eval.arguments import (
    check_remote_code,
    engine_device,
    engine_options,
    model_directory,
    other_model,
)
from flexgen_lite.lm_eval.generation import Answer, StopStrings
from flexgen_lite.lm_eval.generation_options import GenerationOptions, read_model_defaults, read_options
from flexgen_lite.lm_eval.model_info import model_info
from flexgen_lite.lm_eval.texts import Texts, open_tokenizer

MAX_GEN_TOKENS = 256

_log = logging.getLogger(__name__)


@register_model("flexgen_lite")
class FlexGenLiteLM(TemplateLM):
    """
    Args:
        pretrained: model directory or hub id.
        endpoint: of a running engine that serves it; without one an engine is started.
        max_length: most tokens of a sequence, for an engine that is started; by default as many as `hf` takes.
        max_gen_toks: most tokens to generate where a task does not say.
        add_bos_token: put the beginning of sequence in front of each text, and nothing else around it; by default the
            tokenizer decides.
        batch_size, max_batch_size: of the harness; the engine makes up its passes itself.
        device: for an engine that is started.
        key_file: of the running engine, or the one that is started.
        tokenizer: another one than the model's: a directory, a hub id, or one of Transformers'.
        revision, subfolder, trust_remote_code, use_fast_tokenizer: as of `hf`; docs/evaluation.md tells the limits.
        prefix_token_id: what a text without a context comes after; by default the beginning of sequence.
        truncation: cut prompts to the tokenizer's own limit.
        think_end_token: text or id; answers begin behind it.
        enable_thinking: for the chat template.
        chat_template_args: further variables of the chat template.
        options: any key of EngineConfig, for an engine that is started, and the rest of the arguments of `hf`.

    Raises:
        ValueError: an argument of `hf` asks for what the engine does not do; or `endpoint` is given, and something that
            only an engine that is started could be told.
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
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        revision: str | None = "main",
        subfolder: str = "",
        trust_remote_code: bool | None = False,
        use_fast_tokenizer: bool | None = True,
        prefix_token_id: int | None = None,
        truncation: bool | None = False,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        options = engine_options({**({} if max_length is None else {"max_length": max_length}), **options})
        if endpoint is not None and options:
            named = ", ".join(f"{key}={value}" for key, value in options.items())
            raise ValueError(f"{named}: the engine at endpoint={endpoint} is configured where it was started")
        if {"max_length", "max_model_len"} <= options.keys():
            raise ValueError("max_length and max_model_len are the same: give one of them")
        if enable_thinking and think_end_token is None:
            raise ValueError(
                f"enable_thinking={enable_thinking} needs think_end_token: what ends the thinking, for answers begin "
                "behind it"
            )
        super().__init__()
        self._directory = model_directory(pretrained, revision, subfolder)
        check_remote_code(trust_remote_code, self._directory)
        self._config = AutoConfig.from_pretrained(self._directory)
        self._vocab_size = int(self._config.get_text_config().vocab_size)
        self._model_defaults = read_model_defaults(self._directory, self._vocab_size)
        where = (tokenizer, subfolder) if tokenizer else (self._directory, "")
        self.tokenizer = open_tokenizer(where[0], self._config, add_bos_token, use_fast_tokenizer, where[1])
        self._texts = Texts(
            self.tokenizer, add_bos_token, prefix_token_id, truncation, chat_template_args, enable_thinking
        )
        self._foreign_to = self._vocab_size if tokenizer else None
        self._stop_strings: dict[tuple[str, ...], StopStrings] = {}
        self.think_end_token = _id_or_text(think_end_token)
        self.enable_thinking = enable_thinking
        self.revision = "main" if revision is None else str(revision)
        self.max_gen_toks = int(max_gen_toks)
        self._engine: FlexGenLite | None = None
        if endpoint is None:
            self._engine = self._start_engine(device, key_file, options)
            self._client = self._engine.connect()
        else:
            self._client = Client(endpoint, key_file=key_file)
        if (told := other_model(self._client.welcome.model, self._directory)) is not None:
            _log.warning(told)
        self.max_length = self._find_max_length()

    def _start_engine(self, device: str | None, key_file: str | None, options: dict[str, Any]) -> FlexGenLite:
        limits = {"max_model_len": int(options.pop("max_length"))} if "max_length" in options else {}
        place = {} if device is None else {"device": engine_device(device)}
        key = {} if key_file is None else {"key_file": key_file}
        return FlexGenLite(self._directory, **{**limits, **place, **key, **options})

    def _find_max_length(self) -> int:
        """What was asked for, or as many tokens as `hf` takes, if the engine takes as many."""
        most = self._client.welcome.max_length
        if self._engine is not None and self._engine.config.max_model_len is not None:
            return most
        usual: int = resolve_max_length(self._config, self.tokenizer)
        if usual > most:
            _log.warning("sequences have %d tokens at most, which the engine takes; hf would take %d", most, usual)
        return min(usual, most)

    def get_model_info(self) -> dict[str, Any]:
        """For the harness' record of results."""
        dtype = None if self._engine is None else self._engine.config.dtype
        return model_info(self._config, self._directory, self.revision, dtype)

    # ------------------------------------------------------------------ texts and tokens

    @property
    def eot_token_id(self) -> int | None:
        return self._texts.end_token_id

    @property
    def prefix_token_id(self) -> int:
        return self._texts.prefix_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def chat_template_args(self) -> dict[str, Any]:
        return self._texts.template_args

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._texts.render(chat_history, add_generation_prompt)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        ids = self._texts.encode(string, add_special_tokens)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_decode(self, tokens: int | list[int], skip_special_tokens: bool = True) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    # ------------------------------------------------------------------ what the harness asks

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if self.enable_thinking:
            tasks = ", ".join(sorted({request.task_name for request in requests if request.task_name}))
            raise ValueError(f"enable_thinking=True is for tasks that generate, not for those that score: {tasks}")
        for context, continuation in (request.args for request in requests):
            if not context and not self._texts.encode(continuation, add_special_tokens=False):
                raise ValueError(f"a continuation has no token: {(context, continuation)!r}")
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return scores

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        asked = [self._scored(*request) for request in requests]
        _tell_of_cuts(sum(len(c) + len(d) > self.max_length + 1 for _, c, d in requests), len(asked), self.max_length)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(asked)
        with tqdm(desc="scoring", total=len(asked), disable=disable_tqdm) as bar:
            for completion in self._completions(asked):
                score = score_of(completion)
                found[completion.index] = score.logprob, score.is_greedy
                text = requests[completion.index][0]
                if text is not None:
                    self.cache_hook.add_partial("loglikelihood", text, found[completion.index])
                bar.update()
        return found

    def _scored(self, text: tuple[str, str] | None, context: list[int], continuation: list[int]) -> Request:
        """
        Raises:
            ValueError: `hf` could not score that either.
        """
        if not context:
            raise ValueError(f"a context has no token: {text!r}. Leave it empty, or set add_bos_token")
        if not continuation:
            raise ValueError(f"a continuation has no token of its own after its context: {text!r}")
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, a sequence {self.max_length} at most: {text!r:.200}"
            )
        tokens = (context + continuation)[-(self.max_length + 1) :]
        return Request(tokens, SCORED, scored_from=len(tokens) - len(continuation))

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
        end = None if self.eot_token_id is None else self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        answers, num_cut = [], 0
        for number, (context, given) in enumerate(request.args for request in requests):
            options = read_options(given, self._model_defaults, self.max_gen_toks, end)
            prompt = self._texts.encode_prompt(context)
            room = self.max_length - options.max_gen_toks
            if room < 1:
                raise ValueError(
                    f"{options.max_gen_toks} tokens to generate leave no room for a prompt: a sequence has "
                    f"{self.max_length} at most"
                )
            num_cut += len(prompt) > room
            answers.append(self._answer(prompt[-room:], options, number))
        _tell_of_cuts(num_cut, len(answers), self.max_length)
        texts = [""] * len(answers)
        with tqdm(desc="generating", total=len(answers), disable=disable_tqdm) as bar:
            for number in self._complete(answers):
                texts[number] = answers[number].text(self.tokenizer, self.think_end_token)
                self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
                bar.update()
        return texts

    def _answer(self, prompt: list[int], options: GenerationOptions, number: int) -> Answer:
        if options.until not in self._stop_strings:
            self._stop_strings[options.until] = StopStrings(options.until, self.tokenizer, self._foreign_to)
        seed = None
        if options.is_sampled and options.seed is not None:
            seed = options.seed + number  # prompts that are alike get answers of their own
        elif options.is_sampled:
            seed = int(torch.randint(0, 1 << 61, (1,)))  # the harness seeds torch, from which `hf` draws
        return Answer(prompt, options, self._stop_strings[options.until], seed)

    def _complete(self, answers: list[Answer]) -> Iterator[int]:
        """The places of the answers, as they become complete."""
        left = list(range(len(answers)))
        while left:
            again = []
            for completion in self._completions([answers[number].request() for number in left]):
                number = left[completion.index]
                try:
                    is_complete = answers[number].take(completion)
                except ValueError as error:
                    raise ValueError(f"request {number}: {error}") from None
                if is_complete:
                    yield number
                else:
                    again.append(number)
            left = again

    def _completions(self, requests: list[Request]) -> Iterator[Completion]:
        """As they come; the job ends where its reader does."""
        job = self._client.submit_requests(requests, len(requests))
        try:
            yield from job
        finally:
            job.cancel(wait=False)


def _id_or_text(token: str | int | None) -> str | int | None:
    return int(token) if isinstance(token, str) and token.isdigit() else token


def _tell_of_cuts(count: int, total: int, max_length: int) -> None:
    if count:
        _log.warning("%d of %d sequences were longer than %d tokens: cut at their beginning", count, total, max_length)
