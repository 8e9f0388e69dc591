"""The recipe: everything that decides a run, typed, frozen and validated before anything starts.

A recipe is flat: `field=value` on the command line sets `Recipe.field`, `model.field=value` a field of
`ConvMAEConfig`, and `finetune.field=value` one of `Finetune`, where the recipe is of a fine-tuning. Values are read
as TOML, so `epochs=400`, `norm_pix=false` and `[48, 96, 192]` mean what they look
like; a bare word is a string.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from jobs.errors import RecipeError
from jobs.recipe import finetune
from jobs.recipe.carried import NOTIFY_PREFIX
from jobs.recipe.finetune import Finetune
from jobs.recipe.image_statistics import IMAGENET_MEAN, IMAGENET_STD
from jobs.recipe.placement import PLACEMENT_FIELDS
from jobs.recipe.resolution import FIELD as RESOLUTION_FIELD
from jobs.recipe.resolution import Entries, Resolution, entries_of, resolutions_of
from model import ChannelStatistics, ConvMAEConfig
from model.config import SWITCHES
from model.errors import ModelConfigError
from pipeline.access.places import normal
from pipeline.access.urls import is_local, is_web
from pipeline.errors import StorageError
from pipeline.image.channels import PHOTOGRAPH_BITS, RGB_CHANNELS, PixelKind
from pipeline.load.bad_sample import MAX_CONSECUTIVE_BAD_SAMPLES, OnBadSample
from pipeline.load.stall_watch import STALL_SECONDS

MOST = 10**9
"""Of anything that is counted; a larger number is a typing error."""
STANDARD_WORKERS = 64
"""GPUs that the published batch of 4,096 is meant for."""
URL_FIELDS = ("data", "run_root", "init_from", "probe_data", "probe_labels")
FINETUNE_URL_FIELDS = ("labels", "validation_data", "validation_labels")
HANG_SECONDS = 300.0
TrackerName = Literal["tensorboard", "mlflow", "wandb"]
NotifyFormat = Literal["auto", "slack", "json"]
OnNonFinite = Literal["stop", "skip_batch", "rollback"]
"""What to do with a step whose loss or gradient is not finite: see `jobs.step.non_finite`."""

_OLDER_PRECISIONS = {"bf16_pure": "bf16", "bf16": "bf16_autocast"}
"""What precisions are called in the trajectory of a run without grains: once `bf16` was that of the weights, too."""

_VARIABLE = re.compile(rf"env:{NOTIFY_PREFIX}[A-Z0-9_]+")
"""What `notify_url` must be."""


def _or_auto(value: object) -> object:
    """0 for `auto`."""
    return 0 if value == "auto" else value


Switch = Annotated[bool, Field(strict=False)]
"""true or false, in any spelling: False, no, off, 0."""


def _model_config(value: object) -> ConvMAEConfig:
    """Build the model's configuration from a mapping; `preset` names the one that the other keys change."""
    if isinstance(value, ConvMAEConfig):
        return value
    assert isinstance(value, Mapping)
    fields: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items()}
    known = [field.name for field in dataclasses.fields(ConvMAEConfig)]
    for key in fields:
        if key not in known and key != "preset":
            raise unknown_key(f"model.{key}", [f"model.{name}" for name in [*known, "preset"]])
    for name in fields.keys() & set(SWITCHES):
        with contextlib.suppress(ValidationError):  # anything else is refused below, with its name
            fields[name] = TypeAdapter(Switch).validate_python(fields[name])
    try:
        if "preset" in fields:
            return ConvMAEConfig.preset(fields.pop("preset"), **fields)
        return ConvMAEConfig(**fields)
    except ModelConfigError as error:
        raise RecipeError(f"model.{error.field}", error.rule, error.value, error.remedy) from error


ModelField = Annotated[ConvMAEConfig, BeforeValidator(_model_config), PlainSerializer(dataclasses.asdict)]


def _finetune(value: object) -> Finetune | None:
    """Build the part that makes a recipe a fine-tuning from a mapping; None: it is a pretraining."""
    if value is None or isinstance(value, Finetune):
        return value
    assert isinstance(value, Mapping)
    fields: dict[str, Any] = dict(value)
    for key in fields:
        if key not in Finetune.model_fields:
            raise unknown_key(f"finetune.{key}", [f"finetune.{name}" for name in Finetune.model_fields])
    if isinstance(fields.get("classes"), list):
        fields["classes"] = tuple(fields["classes"])
    for name in FINETUNE_URL_FIELDS:
        if isinstance(url := fields.get(name), str) and url:
            fields[name] = _normal_field(f"finetune.{name}", url)
    try:
        return Finetune(**fields)
    except ValidationError as error:
        raise _first_fault(error, Finetune, "finetune.") from None


FinetuneField = Annotated[Finetune | None, BeforeValidator(_finetune)]
_BY_FIELD = {
    "model": "write model.preset=base, or model.<field>=value",
    "finetune": "write finetune.<field>=value",
}
PARTS = tuple(_BY_FIELD)
"""Fields that have fields of their own, which are written `model.<field>`."""


class Recipe(BaseModel):
    """One run: a pretraining, or a fine-tuning. Frozen; the batch arithmetic is checked when it is built."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True
    )

    name: str
    """The recipe's name, for people."""
    data: str = ""
    """URL or path of the data set (the folder that holds manifest.json). Required before a run starts."""
    run_root: str = ""
    """URL under which the run directory `<run_root>/<run name>` is made. Empty: the local stack's bucket."""
    model: ModelField
    """Architecture, masking and loss (`model.<field>`)."""
    image_mean: tuple[float, ...] = ()
    """Mean of each channel, of pixels in 0..1, by which images are normalised. Empty: that of the weights that it
    starts from, or else of the data set, as its manifest says; determined when a run begins."""
    image_std: tuple[float, ...] = ()
    """Deviation of each channel likewise."""
    image_bits: Literal[8, 16] = 8
    """Of a value of the images, as the data set has them; determined when a run begins."""
    finetune: FinetuneField = None
    """What makes the run a fine-tuning (`finetune.<field>`); only recipes that are made for it have it."""
    init_from: str = ""
    """URL of weights to start from, as `convmae import` or `convmae consolidate` wrote them; for a fine-tuning also a
    file of the official code. Empty: random ones."""
    init_sha256: str = ""
    """SHA-256 of that file; determined when a run begins."""

    epochs: int = Field(gt=0, le=MOST)
    """Passes over the data; the learning-rate schedule spans them."""
    resolution_schedule: Annotated[Entries, BeforeValidator(entries_of)] = ()
    """Sizes of images in the order of epochs, `[[0, 160], [0.7, 224]]`: with each the share of `epochs` after which it
    begins, rounded to whole epochs. The last is `model.image_size`. Empty: that size in all epochs."""
    max_steps: int = Field(default=0, ge=0)
    """Stop after this many steps of that schedule; 0: run all epochs."""
    warmup_epochs: float = Field(default=40.0, ge=0)
    """Epochs of linear warm-up from zero."""
    base_learning_rate: float = Field(default=1.5e-4, gt=0)
    """For 256 images: learning rate = base_learning_rate * global_batch_size / 256."""
    weight_decay: float = Field(default=0.05, ge=0)
    """AdamW's, on matrices and kernels only: not on biases, norms and tokens."""
    clip_grad_norm: float = Field(default=0.0, ge=0)
    """Largest global gradient norm; 0: no clipping, as in the paper."""
    global_batch_size: int = Field(gt=0, le=MOST)
    """Images in one optimizer step over all ranks; never changes with the world size. With `model.views` an image still
    counts once."""
    micro_batch_size: Annotated[int, BeforeValidator(_or_auto)] = Field(ge=0, le=MOST)
    """Most images that one rank sends through the model at once, with all their views: memory is that of `model.views`
    times as many. Where grains are used, it bounds the default grain. `auto`, which is 0: the most that fit, found
    before the run's first step and kept."""
    reproducible: Literal["bits", "rounding"] = "bits"
    """What a trajectory at another world size is equal to: the same `bits` with ZeRO 1 and 2, by grains, or the same
    within `rounding`, with micro-batches of any size. With ZeRO 3 it is always `rounding`."""
    grain_size: Annotated[int, BeforeValidator(_or_auto)] = Field(default=0, ge=0, le=MOST)
    """Images whose gradient is computed at once, whatever the world size; their number bounds it. `auto`, which is 0:
    see `grain`."""
    digest_every_steps: int = Field(default=100, gt=0, le=MOST)
    """Steps between digests of all weights and moments in the history; also where a checkpoint is saved."""
    lanes: int = Field(gt=0, le=MOST)
    """Virtual readers among which the data order is dealt; divides global_batch_size and bounds the world size."""
    block_samples: int = Field(default=32, gt=0, le=MOST)
    """Consecutive samples that one ranged read fetches."""
    window_blocks: int = Field(default=64, gt=0, le=MOST)
    """Blocks of one lane that are open at once and shuffled together."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Determines order, crops, flips, masks and initial weights."""
    scaled_decode: Switch = False
    """Decode a JPEG at 1/2, 1/4 or 1/8 of its size where the crop still has a pixel for each of the image's: faster for
    photographs of several megapixels, with slightly other pixels. The crop's edges move by up to four pixels."""

    precision: Literal["fp32", "bf16", "bf16_pure"] = "bf16"
    """`bf16`: matrix products in bf16 over fp32 weights (autocast), norms and softmax in fp32, as the released code
    has it. `bf16_pure`: weights, activations and gradients in bf16. Masters and moments are always fp32."""
    zero_stage: Literal[1, 2, 3] = 1
    """What DeepSpeed shards over ranks: optimizer state | + gradients | + parameters."""
    recompute: tuple[Literal["stage1", "stage2", "stage3", "decoder"], ...] = ()
    """Parts whose activations are computed again in the backward pass: less memory, more time, the same values."""
    compile: Switch = False
    """Compile the model with torch.compile: minutes at each start, then less memory traffic. Not with ZeRO 3."""
    device: Literal["cpu", "cuda"] = "cuda"
    """Where workers train: `cuda` takes one GPU each and NCCL, `cpu` takes gloo."""
    min_workers: int = Field(default=1, gt=0, le=MOST)
    """Fewest workers to train with; the run waits for them."""
    max_workers: int = Field(default=1, gt=0, le=MOST)
    """Most workers to train with."""
    cpus_per_worker: float = Field(default=8.0, gt=0)
    """Logical CPUs that Ray reserves for one worker."""
    loader_threads: int = Field(default=8, gt=0, le=MOST)
    """Decoding threads in one worker."""
    loader_processes: Switch = False
    """Give each of these threads a process of its own, which shares no interpreter lock with the one that trains."""
    on_bad_sample: OnBadSample = "fail"
    """What to do with a sample that is not as it was ingested: `fail`, or `skip` it for another of its block."""
    max_consecutive_bad_samples: int = Field(default=MAX_CONSECUTIVE_BAD_SAMPLES, gt=0, le=MOST)
    """Samples of one lane that may be replaced in a row before the run is abandoned."""
    check_etags: Switch = True
    """Refuse tars whose ETag is not that of the manifest; `false` for a copy of a data set that has others."""
    cache_dir: str = ""
    """Folder on each node's own disk that keeps blocks, shared by the node's workers. Empty: no cache."""
    cache_bytes: int = Field(default=100 * 10**9, gt=0)
    """Most bytes in that folder."""
    stall_seconds: float = Field(default=STALL_SECONDS, gt=0)
    """How long a worker waits for one batch before it fails, naming the stage that hangs."""
    hang_seconds: float = Field(default=HANG_SECONDS, gt=0)
    """How long a rank may hang in a step, or be silent, before it is killed and the attempt restarts."""
    resize_seconds: float = Field(default=60.0, gt=0)
    """How often to check whether more or fewer workers could train now. A resize costs a save and a restart."""
    standby: Switch = True
    """Keep a process beside each rank that has already imported what a rank needs, so that a restart takes seconds."""
    preflight: Switch = True
    """Check memory, matrix products, disks and links of the nodes before ranks start, and leave out those that fail."""
    straggler_factor: float = Field(default=1.5, gt=1)
    """By how much a rank's own time for a step must exceed the median of the others' for it to be a straggler."""
    leave_out_stragglers: Switch = False
    """Leave out the nodes of stragglers at the next restart, as long as min_workers fit on the others."""
    verify_steps_every: int = Field(default=0, ge=0, le=MOST)
    """Steps between those in which a gradient of each rank is computed by two others as well, and compared; 0: never.
    Only of pretraining, and where the same bits come out on every rank."""
    on_nonfinite_loss: OnNonFinite = "stop"
    """If a loss or gradient is not finite: `stop` the attempt, `skip_batch`, or `rollback` and skip steps."""
    max_nonfinite_in_a_row: int = Field(default=10, gt=0, le=MOST)
    """Batches that may be skipped, or rollbacks made, in a row before the attempt is stopped anyway."""

    checkpoint_interval: Literal["steps", "seconds", "auto"] = "steps"
    """What decides when to save: one of the two fields below, or the measured cost of saves, failures and restarts
    (`auto`). Checkpoints are also saved at milestones, at the end, and when a run is stopped."""
    checkpoint_every_steps: int = Field(gt=0, le=MOST)
    """Steps between checkpoints with `steps`."""
    checkpoint_every_seconds: float = Field(default=600.0, gt=0)
    """Seconds between checkpoints with `seconds`, and with `auto` until the first one is committed."""
    checkpoint_min_seconds: float = Field(default=60.0, gt=0)
    """Fewest seconds between checkpoints with `auto`."""
    checkpoint_max_seconds: float = Field(default=3600.0, gt=0)
    """Most seconds between checkpoints with `auto`."""
    keep_checkpoints: int = Field(default=3, gt=0, le=MOST)
    """How many of the newest checkpoints to keep; milestones are kept permanently."""
    memory_checkpoint_every_steps: Annotated[int, Field(ge=0, le=MOST)] | Literal["auto"] = "auto"
    """Steps between memory checkpoints, which a restart reads first: the state of each rank, in the memory of its node
    and of another one. `auto`: so rarely that they cost less than 1 % of the time; 0: none."""
    on_damaged_checkpoint: Literal["previous", "fail"] = "previous"
    """If the newest checkpoint is not as it was written: resume from the `previous` one, or `fail`."""
    milestone_epochs: tuple[int, ...] = (200, 400, 800, 1600)
    """Epochs after which a checkpoint is saved and never deleted (the epochs of the paper's ablation)."""
    max_restarts_without_progress: int = Field(default=3, ge=0, le=MOST)
    """Restarts in a row without a new committed checkpoint before the run is abandoned."""
    probes: Switch = True
    """Measure the encoder beside the training, by kNN and a linear probe on labelled samples: before the first step, at
    milestones, every `probe_epochs`, and at the end. Where there are no labels nothing is measured."""
    probe_data: str = ""
    """URL of the labelled data set on which it is measured. Empty: `data`, if that has labels."""
    probe_labels: str = ""
    """URL of a list of labels for it, a key, a tab and a label in each line. Empty: its own."""
    probe_epochs: int = Field(default=0, ge=0, le=MOST)
    """Epochs between probes, at whose end a checkpoint is saved, too; 0: at milestones alone."""
    probe_samples: int = Field(default=10_000, ge=0, le=MOST)
    """Most samples of it that are used, chosen by a hash of their ids; 0: all. They bound memory and time."""
    probe_wait_seconds: float = Field(default=1800.0, ge=0)
    """How long the end of a run waits for probes that are left."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Port of the run's /metrics endpoint; 0: any free one."""
    tracker: tuple[TrackerName, ...] = ()
    """Where the run is shown besides: `tensorboard` (in the run directory), `mlflow`, `wandb` (by their variables)."""
    notify_url: str = ""
    """Webhook for notices, as `env:NAME` of the variable that holds its URL, a secret. Empty: none."""
    notify_format: NotifyFormat = "auto"
    """What is posted there: Slack's `slack`, plain `json`, or `auto` by the host."""

    @property
    def resolutions(self) -> tuple[Resolution, ...]:
        """Sizes of images in the order of epochs, with the model of each; one where there is no schedule."""
        return resolutions_of(self.resolution_schedule, self.model, self.epochs)

    @property
    def learning_rate(self) -> float:
        """Peak learning rate after warm-up."""
        return self.base_learning_rate * self.global_batch_size / 256

    @property
    def statistics(self) -> ChannelStatistics:
        """What images are normalised by. Of a recipe that says nothing ImageNet's: so were runs before it could."""
        return ChannelStatistics(self.image_mean or IMAGENET_MEAN, self.image_std or IMAGENET_STD)

    @property
    def lane_batch_size(self) -> int:
        """Images that one lane contributes to every global batch."""
        return self.global_batch_size // self.lanes

    @property
    def is_exact(self) -> bool:
        """Whether the trajectory has the same bits at any world size."""
        return self.reproducible == "bits" and self.zero_stage < 3

    @property
    def is_probed(self) -> bool:
        """Whether the encoder is measured while it trains; a fine-tuning is validated instead."""
        return self.probes and self.finetune is None

    @property
    def grain(self) -> int:
        """Images in a grain: `grain_size`, else the largest that divides a lane's share of the batch or consists of
        such shares, fits in a micro-batch, and is at most a 64th of the batch where lanes' shares are smaller."""
        if self.grain_size:
            return self.grain_size
        most = min(self.images_at_once, max(self.lane_batch_size, self.global_batch_size // STANDARD_WORKERS))
        return next(size for size in range(most, 0, -1) if self._is_grain(size))

    @property
    def images_at_once(self) -> int:
        """Most images that a rank sends through the model at once: `micro_batch_size`, or all, until that is found."""
        return self.micro_batch_size or self.global_batch_size

    @property
    def lanes_together(self) -> int:
        """Lanes that make up a grain, and so are on one rank."""
        return max(1, self.grain // self.lane_batch_size) if self.is_exact else 1

    @property
    def mixed_images(self) -> int:
        """Neighbours of a batch that mixup and CutMix mix with each other; whatever the world size, on one rank."""
        return self.grain if self.is_exact else self.lane_batch_size

    def _is_grain(self, size: int) -> bool:
        lane, (lanes, rest) = self.lane_batch_size, divmod(size, self.lane_batch_size)
        return lane % size == 0 or (rest == 0 and self.lanes % lanes == 0)

    @field_validator("tracker")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            remedy = f"write {json.dumps(list(dict.fromkeys(names)))}"
            raise RecipeError("tracker", "must name each tracker once", list(names), remedy)
        return names

    @field_validator("notify_url")
    @classmethod
    def _names_a_variable(cls, text: str) -> str:
        check_notify_url(text)
        return text

    @field_validator(*URL_FIELDS, "cache_dir")
    @classmethod
    def _place(cls, url: str, info: ValidationInfo) -> str:
        return _normal_field(str(info.field_name), url) if url else ""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.global_batch_size % self.lanes:
            nearest = _nearest_divisor(self.global_batch_size, self.lanes)
            rule = f"must divide global_batch_size = {self.global_batch_size}"
            raise RecipeError("lanes", rule, self.lanes, f"the nearest that does is lanes={nearest}")
        if self.max_workers > self.lanes:
            remedy = f"lower max_workers, or raise lanes (a divisor of {self.global_batch_size})"
            raise RecipeError("max_workers", f"must be at most lanes = {self.lanes}", self.max_workers, remedy)
        if self.grain_size and not self._is_grain(self.grain_size):
            grains = filter(self._is_grain, range(1, self.global_batch_size + 1))
            nearest = min(grains, key=lambda size: abs(size - self.grain_size))
            lane = f"global_batch_size / lanes = {self.lane_batch_size}"
            rule = f"must divide {lane}, or be {self.lane_batch_size} times a divisor of lanes"
            raise RecipeError("grain_size", rule, self.grain_size, f"the nearest that does is grain_size={nearest}")
        if self.max_workers > self.lanes // self.lanes_together:
            most = self.lanes // self.lanes_together
            rule = f"must be at most {most}, the groups of {self.lanes_together} lanes that make up a grain"
            remedy = f"lower max_workers, or set grain_size={self.lane_batch_size}"
            raise RecipeError("max_workers", rule, self.max_workers, remedy)
        if self.min_workers > self.max_workers:
            remedy = f"set min_workers={self.max_workers} or max_workers={self.min_workers}"
            raise RecipeError(
                "min_workers", f"must be at most max_workers = {self.max_workers}", self.min_workers, remedy
            )
        if self.checkpoint_min_seconds > self.checkpoint_max_seconds:
            rule = f"must be at most checkpoint_max_seconds = {self.checkpoint_max_seconds:g}"
            remedy = f"set checkpoint_max_seconds={self.checkpoint_min_seconds:g} or a smaller checkpoint_min_seconds"
            raise RecipeError("checkpoint_min_seconds", rule, self.checkpoint_min_seconds, remedy)
        if self.model.kept == self.model.mask_patches:
            rule = f"must hide at least one of {self.model.mask_patches} patches, or there is no loss to train with"
            raise RecipeError("model.mask_ratio", rule, self.model.mask_ratio, "the paper uses 0.75")
        if self.compile and self.zero_stage == 3:
            rule = "must be false with zero_stage = 3, which gathers parameters between operations"
            raise RecipeError("compile", rule, self.compile, "set compile=false or zero_stage=2")
        if self.verify_steps_every and not self.is_exact:
            name, value = ("zero_stage", 3) if self.zero_stage == 3 else ("reproducible", self.reproducible)
            rule = f"must be 0 with {name}={value}, where gradients of two ranks differ by rounding"
            remedy = "set verify_steps_every=0, or train with zero_stage=1 reproducible=bits"
            raise RecipeError("verify_steps_every", rule, self.verify_steps_every, remedy)
        if self.verify_steps_every and self.finetune:
            rule = "must be 0 in a fine-tuning, whose grains leave statistics of what was computed"
            raise RecipeError("verify_steps_every", rule, self.verify_steps_every, "set verify_steps_every=0")
        self._check_statistics()
        self._check_resolutions()
        if self.warmup_epochs >= self.epochs:
            remedy = f"set warmup_epochs={self.epochs / 10:g}, a tenth of the epochs, or train longer"
            raise RecipeError("warmup_epochs", f"must be below epochs = {self.epochs}", self.warmup_epochs, remedy)
        if self.finetune:
            self._check_finetune(self.finetune)
        return self

    def _check_statistics(self) -> None:
        if len(self.image_mean) != len(self.image_std):
            rule = f"must have as many numbers as image_mean, {len(self.image_mean)}"
            raise RecipeError("image_std", rule, list(self.image_std), "give both, or neither")
        channels = self.model.in_channels
        kind = PixelKind(channels, self.image_bits)
        operations = self.finetune.randaugment_operations if self.finetune else 0
        if operations and not kind.is_photographic:
            rule = f"must be 0 with images of {channels} channels of {self.image_bits} bits, which are no photographs"
            raise RecipeError("finetune.randaugment_operations", rule, operations, "set it to 0")
        if self.image_mean == IMAGENET_MEAN and not kind.is_photographic:
            rule = f"must not be ImageNet's with images of {self.image_bits} bits"
            remedy = "set image_mean=[] image_std=[] to take the data set's"
            raise RecipeError("image_mean", rule, list(self.image_mean), remedy)
        if self.image_mean and len(self.image_mean) != channels:
            rule = f"must have a number for each channel, {channels}"
            remedy = "set image_mean=[] image_std=[] to take the data set's"
            raise RecipeError("image_mean", rule, list(self.image_mean), remedy)
        if not all(0 <= value <= 1 for value in self.image_mean):
            raise RecipeError("image_mean", "must be from 0 to 1", list(self.image_mean), "divide by 255")
        if not all(0 < value <= 1 for value in self.image_std):
            raise RecipeError("image_std", "must be above 0, up to 1", list(self.image_std), "divide by 255")

    def _check_resolutions(self) -> None:
        if self.resolution_schedule and self.finetune:
            rule = "must be empty in a fine-tuning, whose images have one size"
            written = self.to_json()[RESOLUTION_FIELD]
            raise RecipeError(RESOLUTION_FIELD, rule, written, f"set {RESOLUTION_FIELD}=[]")
        resolutions_of(self.resolution_schedule, self.model, self.epochs)  # raises what is wrong with it

    def _check_finetune(self, part: Finetune) -> None:
        if part.mixes and self.mixed_images < 2:
            size = "a grain" if self.is_exact else "a lane's share of the batch"
            rule = f"need {size} of at least 2 images, which are mixed with each other"
            remedy = "lower lanes or raise global_batch_size"
            if self.is_exact and (grain := next(filter(self._is_grain, range(2, self.global_batch_size + 1)), 0)):
                remedy = f"set grain_size={grain}"  # it may be one image by micro_batch_size or by lanes
            remedy += ", or set finetune.mixup=0 finetune.cutmix=0"
            raise RecipeError("finetune.mixup and cutmix", rule, self.mixed_images, remedy)
        if part.min_learning_rate > self.learning_rate:
            rule = f"must be at most the peak, {self.learning_rate:g}"
            remedy = "lower it, or raise base_learning_rate"
            raise RecipeError("finetune.min_learning_rate", rule, part.min_learning_rate, remedy)
        if part.kind == "linear" and not self.is_exact:
            # Its batch norm has the statistics of grains.
            name, value = ("zero_stage", 3) if self.zero_stage == 3 else ("reproducible", self.reproducible)
            remedy = "set zero_stage=1 reproducible=bits"
            raise RecipeError(name, "must give the same bits at any world size with kind=linear", value, remedy)
        if part.kind == "linear" and self.precision == "bf16_pure":
            rule = "must be bf16 or fp32 with kind=linear, whose batch norm adds up small differences"
            raise RecipeError("precision", rule, self.precision, "set precision=bf16")

    def trajectory(self) -> dict[str, Any]:
        """The fields that decide what is computed; equal for every attempt of one run."""
        fields = {key: value for key, value in self.to_json().items() if key not in PLACEMENT_FIELDS}
        if self.finetune:
            part = {key: value for key, value in fields["finetune"].items() if key not in finetune.PLACEMENT_FIELDS}
            fields["finetune"] = part
        else:
            del fields["finetune"]  # so that a pretraining is what it was before there were fine-tunings
        if self.model.views == 1:
            del fields["model"]["views"]  # likewise
        if self.model.in_channels == RGB_CHANNELS:
            del fields["model"]["in_channels"]  # likewise
        if not self.resolution_schedule:
            del fields[RESOLUTION_FIELD]  # likewise
        if not self.scaled_decode:
            del fields["scaled_decode"]  # likewise
        if self.image_bits == PHOTOGRAPH_BITS:
            del fields["image_bits"]  # likewise
        if self.statistics == (IMAGENET_MEAN, IMAGENET_STD):
            del fields["image_mean"], fields["image_std"]  # likewise
        if self.is_exact:
            return fields | {"grain_size": self.grain}
        # As it was before there were grains, so that checkpoints of older runs are theirs.
        del fields["grain_size"], fields["reproducible"]
        return fields | {"precision": _OLDER_PRECISIONS.get(self.precision, self.precision)}

    def as_begun_before(self) -> Recipe:
        """This recipe as it was meant before there were grains: free micro-batches, and bf16 of weights, too."""
        precision = "bf16_pure" if self.precision == "bf16" else self.precision
        return self.model_copy(update={"reproducible": "rounding", "grain_size": 0, "precision": precision})

    def with_statistics(self, mean: Sequence[float], std: Sequence[float]) -> Recipe:
        """This recipe, whose images are normalised by these where it says nothing itself."""
        return self if self.image_mean else self.amended({"image_mean": list(mean), "image_std": list(std)})

    def digest(self) -> str:
        """SHA-256 of the trajectory, which every checkpoint records."""
        return hashlib.sha256(json.dumps(self.trajectory(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The resolved recipe as plain JSON values; `Recipe.from_json` reads it back."""
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Recipe:
        """Build and validate a recipe.

        Raises:
            RecipeError: Naming the first field that is unknown, mistyped or out of range.
        """
        for key in fields:
            if key not in cls.model_fields:
                raise unknown_key(key, [*cls.model_fields, "model.<field>", "finetune.<field>"])
        # Tuples are lists in JSON and TOML, and an integer is a valid float: strict mode would refuse both.
        values = dict(fields)
        for key in ("image_mean", "image_std", "milestone_epochs", "recompute", "tracker"):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        try:
            return cls(**values)
        except ValidationError as error:
            raise _first_fault(error, cls) from None

    def amended(self, overrides: Mapping[str, Any]) -> Recipe:
        """This recipe with the values of `overrides` (flat keys; `model.<field>` and `finetune.<field>` for parts).

        Raises:
            RecipeError: As `from_json`.
        """
        fields = self.to_json()
        parts: dict[str, dict[str, Any]] = {name: {} for name in PARTS}
        for key, value in overrides.items():
            part, dot, name = key.partition(".")
            if key in PARTS:
                raise RecipeError(key, "must be set field by field", value, _BY_FIELD[key])
            if dot and part in PARTS:
                parts[part][name] = value
            else:
                fields[key] = value
        if "preset" not in parts["model"]:
            parts["model"] = {**fields["model"], **parts["model"]}
        if parts["finetune"] and self.finetune is None:
            key, value = next(item for item in overrides.items() if item[0].startswith("finetune."))
            remedy = "take a recipe of a fine-tuning, like convmae_base_finetune or tiny_finetune"
            raise RecipeError(key, "is of fine-tunings alone", value, remedy)
        parts["finetune"] = {**(fields["finetune"] or {}), **parts["finetune"]}
        return Recipe.from_json({**fields, "model": parts["model"], "finetune": parts["finetune"] or None})


def check_notify_url(text: str) -> None:
    """Refuse a `notify_url` that is not the name of a variable, without quoting it: it may be the secret itself.

    Raises:
        RecipeError: It is not.
    """
    if text and not _VARIABLE.fullmatch(text):
        rule = f"must be env:NAME, of a variable whose name begins with {NOTIFY_PREFIX}, since a recipe is no secret"
        remedy = f"export {NOTIFY_PREFIX}URL=https://... and set notify_url=env:{NOTIFY_PREFIX}URL"
        raise RecipeError("notify_url", rule, "(not shown)", remedy)


def unknown_key(key: str, known: Sequence[str]) -> RecipeError:
    """The error for a key that no recipe has; suggests the nearest one that exists."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    remedy = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(known)}"
    return RecipeError(key if key.strip() else repr(key), "is not a field of a recipe", key, remedy)


def _first_fault(error: ValidationError, of: type[BaseModel], prefix: str = "") -> RecipeError:
    fault = error.errors()[0]
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, RecipeError):
        return cause
    field = str(fault["loc"][0])
    annotation = of.model_fields[field].annotation
    faults = error.errors() if get_origin(annotation) in _UNIONS else [fault]  # one of each kind that may be given
    rules = [each["msg"].replace("Input should", "should") for each in faults if each["loc"][0] == field]
    rule = " or ".join(rules).replace("Field required", "is required")
    value = None if fault["type"] == "missing" else fault["input"]
    remedy = f"give {prefix}{field}=<{_type_name(annotation)}>"
    return RecipeError(f"{prefix}{field}", rule, value, remedy)


def _normal_field(name: str, url: str) -> str:
    """A place in its normal form, so that two spellings make the same recipe.

    Possible secrets are refused: a recipe is written into the run directory and the report.
    """
    try:
        place = normal(url)
    except StorageError as error:
        raise RecipeError(name, error.rule, error.value, error.remedy) from None
    if name == "cache_dir" and not is_local(place):
        raise RecipeError(
            name, "must be a folder on each node's own disk", url, "write a path, like /tmp/convmae-cache"
        )
    if is_web(place) and "?" in place:
        remedy = "give an address that needs none, or copy the object to s3:// or a folder"
        raise RecipeError(name, "must have no query, which may be a signature", f"{url.partition('?')[0]}?...", remedy)
    return place


_UNIONS = (Union, UnionType)


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(annotation))
    if get_origin(annotation) is tuple:
        return f"[{_type_name(get_args(annotation)[0])}, ...]"
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) in _UNIONS:
        return "|".join(map(_type_name, get_args(annotation)))
    return str(annotation.__name__)


def _nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`; the smaller of two."""
    start = min(wanted, number)
    candidates = (candidate for distance in range(start) for candidate in (start - distance, start + distance))
    return next(candidate for candidate in candidates if number % candidate == 0)


def difference(saved: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines `field: saved -> asked` for every leaf that differs."""
    lines: list[str] = []
    for key in sorted({*saved, *asked}):
        before, after = saved.get(key), asked.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += difference(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines
