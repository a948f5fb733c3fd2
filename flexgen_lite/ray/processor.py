"""A processor of datasets, in the manner of `ray.data.llm`: `dataset = processor(dataset)`.

Made of Ray's public interface alone: `Dataset.map`, `repartition` and `map_batches` with a pool of actors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import ray
import ray.data
from ray.data.dataset import MaterializedDataset

from flexgen_lite.config.problems import ConfigError
from flexgen_lite.ray.actor import FlexGenLiteEngine
from flexgen_lite.ray.config import FlexGenLiteProcessorConfig, is_keywords
from flexgen_lite.ray.row_functions import RowFunction, postprocessing, preprocessing
from flexgen_lite.ray.shares import Node, Share, share_of
from flexgen_lite.text.shown import shown, shown_kind

__all__ = ["FlexGenLiteProcessorConfig", "Processor", "build_processor"]

TWO_PROCESSORS = (
    "the dataset goes through another processor in the same pipeline, and each would keep processors of this machine "
    "that the other waits for: give num_cpus to both, and ram in engine_kwargs, or materialize() what is between them"
)


def build_processor(
    config: FlexGenLiteProcessorConfig,
    preprocess: RowFunction | None = None,
    postprocess: RowFunction | None = None,
    preprocess_map_kwargs: Mapping[str, Any] | None = None,
    postprocess_map_kwargs: Mapping[str, Any] | None = None,
    builder_kwargs: Mapping[str, Any] | None = None,
) -> Processor:
    """
    Args:
        config: of the actors and their engines.
        preprocess: makes of a row what is asked: `messages`, `prompt` or `tokenized_prompt`, and `sampling_params`. The
            row's other columns stay.
        postprocess: makes of a row with its answer the row that is wanted; rows that failed do not go through it.
        preprocess_map_kwargs, postprocess_map_kwargs: for `Dataset.map` of these.
        builder_kwargs: {"chat_template_kwargs": ...}, further variables of the chat template.

    Raises:
        TypeError: an argument is none.
    """
    if not isinstance(config, FlexGenLiteProcessorConfig):
        raise TypeError(f"config is a {type(config).__name__}: give a FlexGenLiteProcessorConfig")
    for name, function in (("preprocess", preprocess), ("postprocess", postprocess)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} is {shown_kind(function)}: give a function of a row")
    more = _keywords("builder_kwargs", builder_kwargs)
    template_kwargs = _keywords("chat_template_kwargs", more.pop("chat_template_kwargs", None))
    if more:
        raise TypeError(f"builder_kwargs has {', '.join(more)}: only chat_template_kwargs is known")
    return Processor(
        config,
        preprocess,
        postprocess,
        _keywords("preprocess_map_kwargs", preprocess_map_kwargs),
        _keywords("postprocess_map_kwargs", postprocess_map_kwargs),
        template_kwargs,
    )


def _keywords(name: str, given: object) -> dict[str, Any]:
    if given is None:
        return {}
    if not is_keywords(given):
        raise TypeError(f"{name} is {shown(given)}: give a dict with names as keys")
    return dict(given)


class Processor:
    """See `build_processor`. Nothing is computed before the dataset that it returns is read."""

    engine: ClassVar[type[FlexGenLiteEngine]] = FlexGenLiteEngine
    """What each actor has one of."""

    def __init__(
        self,
        config: FlexGenLiteProcessorConfig,
        preprocess: RowFunction | None,
        postprocess: RowFunction | None,
        preprocess_map_kwargs: dict[str, Any],
        postprocess_map_kwargs: dict[str, Any],
        template_kwargs: dict[str, Any],
    ) -> None:
        self.config = config
        self._preprocess, self._postprocess = preprocess, postprocess
        self._preprocess_map_kwargs, self._postprocess_map_kwargs = preprocess_map_kwargs, postprocess_map_kwargs
        self._template_kwargs = template_kwargs

    def __call__(self, dataset: ray.data.Dataset) -> ray.data.Dataset:
        """Raises ConfigError: there is another processor in the same pipeline, and nothing is said of processors."""
        if not isinstance(dataset, ray.data.Dataset):
            raise TypeError(f"what is to be processed is {shown_kind(dataset)}: give a dataset of ray.data")
        config = self.config
        if not ray.is_initialized():
            ray.init()
        share = self._share(config.least_and_most[1])
        if config.num_cpus is None and share.ray_gpus == 0 and len(_nodes()) == 1 and self._is_behind_another(dataset):
            raise ConfigError({"num_cpus": TWO_PROCESSORS})
        if self._preprocess is not None:
            step = preprocessing(self._preprocess, config.should_continue_on_error)
            dataset = dataset.map(step, **self._preprocess_map_kwargs)
        dataset = dataset.repartition(target_num_rows_per_block=config.batch_size)
        dataset = dataset.map_batches(self.engine, **self._map_batches_kwargs(share))
        if self._postprocess is not None:
            last = postprocessing(self._postprocess, config.should_continue_on_error)
            dataset = dataset.map(last, **self._postprocess_map_kwargs)
        return dataset

    def _is_behind_another(self, dataset: ray.data.Dataset) -> bool:
        """By the plan, as Ray writes it; of what is computed already Ray writes some rows."""
        computed = isinstance(dataset, MaterializedDataset)
        return not computed and f"MapBatches({self.engine.__name__})" in repr(dataset)

    def _map_batches_kwargs(self, share: Share) -> dict[str, Any]:
        config = self.config
        least, most = config.least_and_most
        optional = ("accelerator_type", "runtime_env", "max_restarts", "max_task_retries")
        given = {name: getattr(config, name) for name in optional}
        return {
            "fn_constructor_kwargs": {
                "config": config,
                "share": share,
                "template_kwargs": self._template_kwargs,
                "keeps_asked": self._postprocess is not None,
            },
            "batch_size": config.batch_size,
            "batch_format": "pyarrow",
            "udf_modifying_row_count": False,
            "compute": ray.data.ActorPoolStrategy(
                min_size=least,
                max_size=most,
                max_concurrent_calls_per_actor=config.max_concurrent_batches,
                max_tasks_in_flight_per_actor=config.max_tasks_in_flight_per_actor or config.max_concurrent_batches,
            ),
            "num_cpus": share.ray_cpus,
            "num_gpus": share.ray_gpus,
            **{name: value for name, value in given.items() if value is not None},
        }

    def _share(self, actors: int) -> Share:
        config = self.config
        with_gpu = not str(config.engine_kwargs.get("device", "auto")).startswith("cpu")
        return share_of(_nodes(), actors, config.num_cpus, config.num_gpus, with_gpu)


def _nodes() -> list[Node]:
    """Of the cluster, those that live."""
    found = [node.get("Resources", {}) for node in ray.nodes() if node.get("Alive")]
    return [Node(each.get("CPU", 0), each.get("GPU", 0), each.get("memory", 0)) for each in found]
