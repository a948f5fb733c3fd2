"""The control messages of coordinator and workers, grouped by receiver. Indices, slots and offsets; never tensor bytes.

Times are `time.monotonic_ns()` (CLOCK_MONOTONIC, the same in all processes of a machine).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flexgen_lite.model.quantization import Quantization
from flexgen_lite.model.spec import AttentionSpec, FileStamp, ModelSpec, UnitSpec
from flexgen_lite.wire.arena_specs import ExchangeSpec, KvSpec, PageRun, SharedPart
from flexgen_lite.wire.kv_on_disk import FetchBlocks, FetchKv, KvDiskSpec, KvMoved, ParkKv, PrefixesOpened, StoreBlocks
from flexgen_lite.wire.sampling import Sample, Scored, TokenLogprobs

REPORT_SECONDS = 0.1

# ---------------------------------------------------------------------------------------------- any worker


@dataclass(frozen=True, slots=True)
class Stop:
    """Finish and exit with code 0."""


@dataclass(frozen=True, slots=True)
class Hello:
    """First message of a started worker."""

    name: str
    pid: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker holds its resources and takes orders; `resident_bytes` is its private memory at this moment."""

    resident_bytes: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The worker's last message before it exits with a code other than 0."""

    kind: str  # exception type
    message: str
    details: str  # traceback, for the log
    user_error: bool  # True: `message` says it all and the user can act on it


@dataclass(frozen=True, slots=True)
class Abandon:
    """Drop the pass that has begun; the slots and regions that it uses are no longer touched after the answer."""


@dataclass(frozen=True, slots=True)
class Abandoned:
    pass


# ---------------------------------------------------------------------------------------------- loader


@dataclass(frozen=True, slots=True)
class AttachLoader:
    """`slot_offsets[s]` is where slot s begins in the weights arena of `arena_bytes`. `verify`: compare what is read
    with the checksums of the first time."""

    files: tuple[str, ...]
    stamps: tuple[FileStamp, ...]
    units: tuple[UnitSpec, ...]
    slot_offsets: tuple[int, ...]
    arena_bytes: int
    load_format: str  # "auto" or "dummy"
    verify: bool
    threads: int
    cpus: tuple[int, ...]  # empty: no affinity
    kv_disk: KvDiskSpec | None = None  # None: no KV goes to disk
    shared: SharedPart | None = None  # None: all weights are this engine's own


@dataclass(frozen=True, slots=True)
class Load:
    unit: int
    slot: int


@dataclass(frozen=True, slots=True)
class Loaded:
    unit: int
    slot: int
    num_bytes: int  # read from files
    start_ns: int
    end_ns: int


ToLoader = AttachLoader | Load | ParkKv | FetchKv | StoreBlocks | FetchBlocks | Stop
FromLoader = Hello | Ready | Loaded | KvMoved | PrefixesOpened | Failed


# ---------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True, slots=True)
class WarmUp:
    """First order to an attention worker: have the kernels for an exchange of `dtype` and KV of `kv_dtype` at hand."""

    dtype: str
    kv_dtype: str


@dataclass(frozen=True, slots=True)
class WarmedUp:
    """`resident_bytes`: the worker's private memory with the kernels in it. `lanes`: tokens whose rows lie across in a
    page, by the width of this processor's vectors."""

    resident_bytes: int
    lanes: int


@dataclass(frozen=True, slots=True)
class AttachAttention:
    columns: tuple[AttentionSpec, ...]
    kv_columns: tuple[int, ...]  # whose K and V each reads; what is not its own it does not store
    exchange: ExchangeSpec
    kv: KvSpec
    threads: int
    cpus: tuple[int, ...]
    first_page: int = 0  # of those that are this worker's
    num_stops: int = 0  # columns that nothing will be asked of


@dataclass(frozen=True, slots=True)
class KvSpan:
    """Rows `row .. row + num_rows` of a region are tokens `position ..` of the sequence that has `pages`, by group.

    Their K and V are stored. If `attend`, each row's query attends to the sequence's tokens up to its own position.
    """

    row: int
    num_rows: int
    position: int
    attend: bool
    pages: tuple[PageRun, ...]


@dataclass(frozen=True, slots=True)
class KvBatch:
    micro_batch: int
    region: int
    spans: tuple[KvSpan, ...]


@dataclass(frozen=True, slots=True)
class BeginAttention:
    """A pass's work for this worker; replaces whatever was known of an earlier pass."""

    pass_id: int
    threads: int
    batches: tuple[KvBatch, ...]


@dataclass(frozen=True, slots=True)
class Attend:
    """What a note of the compute worker asks for (doorbells.py)."""

    pass_id: int
    column: int
    micro_batch: int


@dataclass(frozen=True, slots=True)
class Attended:
    column: int
    micro_batch: int
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class AttentionReport:
    """What was done since the last report; at the latest REPORT_SECONDS after it was done."""

    pass_id: int
    done: tuple[Attended, ...]


ToAttention = WarmUp | AttachAttention | BeginAttention | Abandon | Stop
FromAttention = Hello | WarmedUp | Ready | Abandoned | AttentionReport | Failed


# ---------------------------------------------------------------------------------------------- compute


@dataclass(frozen=True, slots=True)
class OpenModel:
    """First order to the compute worker: build the class on the meta device and describe it."""

    model: str  # directory or hub id
    load_format: str
    dtype: str  # "auto" or a dtype
    device: str
    always_probe: bool  # for tested model types too
    max_model_len: int | None
    quantization: Quantization | None = None
    activations: str = "auto"


@dataclass(frozen=True, slots=True)
class WireChatTemplate:
    """The chat templates that come with a tokenizer, of which there may be none, and its special tokens, which they and
    a caller's own template may name ("eos_token" -> "</s>").

    `text`: the template of a tokenizer that has one without a name. `named`: those of a tokenizer that has several.
    `unreadable`: those that are there and are no text, by name, "" for the one without, with the reason."""

    text: str | None
    special_tokens: dict[str, str]
    named: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelOpened:
    spec: ModelSpec
    fingerprint: str  # of what decides about greedy tokens
    tokenizer_file: str | None  # a tokenizer.json; converted into the run directory where the model has none
    chat_template: WireChatTemplate | None
    device_name: str
    device_total_bytes: int  # 0 for the CPU
    resident_bytes: int


@dataclass(frozen=True, slots=True)
class AttachCompute:
    """`slot_offsets`: host slots in the weights arena, in any order; each ends where the next one behind it begins.
    `device_slots`: 0 means layers are used where they lie."""

    slot_offsets: tuple[int, ...]
    arena_bytes: int
    exchange: ExchangeSpec
    device_slots: int
    device_slot_bytes: int
    device_budget: int  # bytes of a GPU's memory that PyTorch may allocate; 0 for the CPU
    streaming: bool  # slots are reused: every segment is reported at once
    threads: int
    cpus: tuple[int, ...]
    process_bytes: int  # that the process may take of main memory, what it maps of files among it
    workspace_bytes: int  # of that, for temporaries; 0 where they are in a GPU's memory
    kv_dtype: str
    state_places: int = 0  # in the arena of states, two for each sequence
    projection_layers: tuple[int, ...] = ()  # see memory/projection_units.py; the last host slots have the projections
    shared: SharedPart | None = None  # as the loader's


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Rows `row .. row + num_rows` of a micro-batch are tokens `position ..` of one sequence.

    If `prefill`, they are the sequence's first tokens and attend to each other here; otherwise the attention worker
    computes their attention. `sample` is None where no token is wanted after them; `scored` where no logprobs of the
    tokens that follow them in the prompt are.

    Where the model has states, the sequence's is read from place `state_from` (-1: these are its first tokens) and
    written to place `state_to`.
    """

    row: int
    num_rows: int
    position: int
    prefill: bool
    sample: Sample | None
    scored: Scored | None
    state_from: int = -1
    state_to: int = -1


@dataclass(frozen=True, slots=True)
class TokenBatch:
    micro_batch: int
    region: int
    token_ids: tuple[int, ...]
    spans: tuple[TokenSpan, ...]
    workers: tuple[int, ...]  # attention workers that hold its sequences


@dataclass(frozen=True, slots=True)
class BeginCompute:
    """A pass's work; replaces whatever was left of an earlier pass."""

    pass_id: int
    threads: int
    batches: tuple[TokenBatch, ...]


@dataclass(frozen=True, slots=True)
class Upload:
    """Copy layer `unit` from host slot `slot` to device slot `device_slot`."""

    unit: int
    slot: int
    device_slot: int


@dataclass(frozen=True, slots=True)
class Uploaded:
    unit: int
    device_slot: int
    num_bytes: int
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class Pack:
    """Pack the weights of `unit`, which stays in host slot `slot`, in place for this processor's products;
    `copy_shared`: take a copy of those that must stay as they are. `in_order`: another compute worker, of this
    engine or another, has packed them."""

    unit: int
    slot: int
    copy_shared: bool
    in_order: bool


@dataclass(frozen=True, slots=True)
class Packed:
    unit: int
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class Segments:
    """Segments of every micro-batch in the columns `column`, `column` + 1, ..., one column for each of `slots`.

    A segment finishes column j - 1 of a micro-batch behind its attention and runs on up to the attention call of column
    j, or to its end where that is a stop. It may run when the attention workers have done column j - 1; those that may,
    run in the order (column, micro-batch). The last one finishes the forward and samples. The slots hold the weights of
    the columns' layers (device slots where there are any, else host slots); -1 for the last segment.
    """

    pass_id: int
    column: int
    slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SegmentDone:
    """`copy_ns` of its time went into the exchange arena and back; with a GPU, its results were copied to the host for
    `to_host_ns`, up to `end_ns`. `token_ids`: the sampled tokens in the order of the spans that asked for one, after
    the last segment; `logprobs`: of those of them that asked for it; `prompt_logprobs`: of the scored rows, in the
    order of the spans. `left_only`: only column `column` - 1 was finished. `uploaded_bytes`: of projections that
    had to be copied to the device for it."""

    column: int
    micro_batch: int
    left_only: bool
    start_ns: int
    end_ns: int
    copy_ns: int
    to_host_ns: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    uploaded_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ComputeReport:
    """What was done since the last report: at once at the end of a micro-batch's pass or where layers are streamed,
    else at the latest REPORT_SECONDS after it was done."""

    pass_id: int
    done: tuple[SegmentDone, ...]
    device_peak_bytes: int  # most of a GPU's memory that PyTorch has held at once so far; 0 for the CPU


ToCompute = OpenModel | AttachCompute | BeginCompute | Abandon | Upload | Pack | Segments | Stop
FromCompute = Hello | ModelOpened | Ready | Abandoned | Uploaded | Packed | ComputeReport | Failed
